"""What `lingc inspect --schedule` shows of a CUDA engine."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingc import launch_page, launch_view, targets
from lingc.cli.output import Output, bytes_text
from lingc.engine.choosing import choose
from lingc.engine.contents import judge_plan, read_listed
from lingc.engine.reading import package_root, read_manifest
from lingc.errors import IncompatibleError, IntegrityError
from lingc.launch_table import LaunchTable, from_value
from lingc.launch_view import Wanted
from lingc.plan import Plan
from lingc.runtime.cuda_code import TABLE, TABLE_BYTES, unpacked
from lingc.staging import writing


def read(path: Path, target: str | None = None) -> tuple[Plan, LaunchTable]:
    """The plan and the launch table of a package, each after its digest; nothing else is read.

    Args:
        path: Of the package.
        target: Of the variant; the one that the plan was made for where None.

    Raises:
        IncompatibleError: It is no CUDA engine.
        IntegrityError: They are not what was written.
        UsageError: It has no code for that target.
    """
    manifest, root = read_manifest(path), package_root(path)
    target = choose(manifest, None, target)
    variant = manifest.variants[target]
    if variant.engine != "cuda":
        raise IncompatibleError(
            f"{str(path)!r} is an engine of kind {variant.engine!r}, whose steps are no launches",
            hint="`lingc inspect --plan` shows what it computes"
            + (", `--layers` what TensorRT made of it" if variant.engine == "tensorrt" else ""),
        )
    plan, checks = judge_plan(root, manifest)
    entry = manifest.files.get(f"variants/{target}/{TABLE}")
    if plan is None or entry is None:
        said = "; ".join(check.found for check in checks) if plan is None else f"no {TABLE}"
        raise IntegrityError(
            f"the schedule of {str(path)!r} cannot be shown: {said}",
            hint="`lingc verify` lists everything that is wrong",
        )
    try:
        value = json.loads(unpacked(read_listed(root, entry), TABLE, TABLE_BYTES))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"the launch table of {str(path)!r} cannot be read: {error}",
            hint="`lingc verify` lists everything that is wrong",
        ) from error
    return plan, from_value(value)


def show(
    out: Output, path: Path, wanted: Wanted, page: Path | None, target: str | None = None
) -> None:
    """Print the table and one bucket of it; write it as a page too if asked."""
    plan, table = read(path, target)
    most = int(plan.config["max_position_embeddings"])
    wanted = replace(wanted, context=min(wanted.context, most))
    bucket = launch_view.find(table, plan, wanted)
    folded = launch_view.folded(table, bucket)
    document = {
        "path": str(path),
        **launch_view.overview(table, plan),
        "bucket": {
            **launch_view.totals(table, bucket),
            "steps": launch_view.steps(table, bucket),
            "memory": launch_view.memory(table, plan, bucket),
        },
    }
    if page is not None:
        title = f"{path.name}: {plan.precision} for {table.target}"
        with writing(page):
            page.write_text(launch_page.html(document, folded, title), encoding="utf-8")
        out.note(f"wrote {page}")
    if out.as_json:
        out.emit(document)
        return
    _show_overview(out, document)
    _show_steps(out, table.target, folded, document["bucket"])
    _show_memory(out, document["bucket"])


def _show_overview(out: Output, document: Mapping[str, Any]) -> None:
    rows = [(name, bytes_text(size)) for name, size in document["memory"].items()]
    out.table((f"memory for {document['target']}", "bytes"), rows)
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for one in document["buckets"]:
        phases.setdefault(one["phase"], []).append(one)
    columns = ("phase", "buckets", "launches", "predicted ms", "arena")
    rows_of = [
        (
            phase, len(some), _span(some, "launches", str),
            _span(some, "microseconds", lambda us: f"{us / 1e3:.3g}"),
            _span(some, "arena_bytes", bytes_text),
        )
        for phase, some in phases.items()
    ]  # fmt: skip
    out.table(columns, rows_of)


def _span(some: list[Mapping[str, Any]], field: str, written: Any) -> str:
    values = [one[field] for one in some]
    return f"{written(min(values))} to {written(max(values))}"


def _show_steps(
    out: Output, target: str, rows: list[dict[str, Any]], bucket: Mapping[str, Any]
) -> None:
    sizes = ", ".join(f"{axis} {size}" for axis, size in bucket["sizes"].items())
    out.line(f"{bucket['phase']} with {sizes}")
    bandwidth = targets.get(target).hbm_bytes_per_s
    out.table(
        ("step", "layers", "op", "tactic", "launches", "µs", "MB", "GFLOP", "GB/s", "all µs",
         "origin"),
        [
            (
                one["step"], one["layers"] or None, one["op"], one["tactic"], one["launches"],
                f"{one['microseconds']:.2f}", f"{one['moved_bytes'] / 1e6:.3f}",
                f"{one['flops'] / 1e9:.3f}",
                f"{one['moved_bytes'] / max(one['microseconds'], 1e-3) / 1e3:.0f}",
                f"{one['microseconds'] * one['count']:.1f}", one["origin"],
            )
            for one in rows
        ],
    )  # fmt: skip
    milliseconds = bucket["microseconds"] / 1e3
    out.line(
        f"{bucket['launches']} launches, {milliseconds:.3f} ms predicted, "
        f"{bucket['moved_bytes'] / 1e9:.3f} GB, {bucket['flops'] / 1e9:.1f} GFLOP"
    )
    if bandwidth:
        bound = bucket["moved_bytes"] / bandwidth * 1e3
        out.line(f"at the datasheet's bandwidth its bytes take {bound:.3f} ms")


def _show_memory(out: Output, bucket: Mapping[str, Any]) -> None:
    out.table(
        (f"in an arena of {bytes_text(bucket['arena_bytes'])}", "layers", "bytes", "steps"),
        [
            (row["holds"], row["layers"] or None, row["bytes"], row["steps"])
            for row in launch_view.folded_memory(bucket["memory"])
        ],
    )
    out.line("with --json or --html: where each lies, and from which step to which")
