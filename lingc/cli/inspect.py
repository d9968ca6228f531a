"""`lingc inspect`: what a package or a checkpoint holds, and where it came from."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from lingc import plan as plans
from lingc import plan_text
from lingc.cli import output
from lingc.cli.output import Output, bytes_text
from lingc.engine.contents import judge_plan
from lingc.engine.describe import describe_checkpoint, describe_package
from lingc.engine.layout import MANIFEST
from lingc.engine.reading import package_root, read_manifest
from lingc.errors import IntegrityError, UsageError

Document = Mapping[str, Any]

_USED: Mapping[str, frozenset[str]] = {
    "--plan": frozenset(("is_plan",)),
    "--schedule": frozenset(("schedule", "page", "phase", "batch", "context", "tokens", "target")),
    "--layers": frozenset(("layers", "phase", "target")),
    "--diff": frozenset(("other",)),
    "a list of contents": frozenset(("why",)),
}
"""What is shown, and the options that say something to it."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--why", is_flag=True, help="What was asked for, with which versions, and the passes."
)
@click.option("--plan", "is_plan", is_flag=True, help="Every program of the plan, step by step.")
@click.option(
    "--diff", "other", type=click.Path(path_type=Path), help="Show only where OTHER differs."
)
@click.option("--schedule", is_flag=True, help="What a CUDA engine launches, and where.")
@click.option("--layers", is_flag=True, help="What TensorRT made of a TensorRT engine's phase.")
@click.option(
    "--phase",
    type=click.Choice(plans.PHASES),
    default="decode",
    show_default=True,
    help="With --schedule or --layers: whose steps to show.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens of the longest sequence; less where the model was made for less.",
)
@click.option("--tokens", type=click.IntRange(1), help="Tokens of the step (default: --batch).")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --schedule: write a page with its timeline and memory here.",
)
@click.option(
    "--target", help="With --schedule or --layers: the variant's, of a package with several."
)
@output.options
def command(
    out: Output,
    path: Path,
    other: Path | None,
    *,
    why: bool,
    is_plan: bool,
    schedule: bool,
    layers: bool,
    phase: str,
    batch: int,
    context: int,
    tokens: int | None,
    page: Path | None,
    target: str | None,
) -> None:
    """Show what a package or a checkpoint holds.

    Of a package the manifest alone is read, whatever its size, and checked; the other files are
    not: that is `lingc verify`. `--plan` also reads the plan, after its digest. Of a checkpoint the
    headers are read. `--schedule` reads plan and launch table, `--layers` the report of a TensorRT
    build; neither needs a GPU.

    \b
    Examples:
      lingc inspect tiny.ling
      lingc inspect tiny.ling --why
      lingc inspect tiny.ling --diff other.ling
      lingc inspect h20.ling --schedule --batch 16 --context 32768
      lingc inspect artifacts/checkpoints/ling-tiny --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    shown = next(
        (
            name
            for name, is_asked in (
                ("--plan", is_plan),
                ("--schedule", schedule or page is not None),
                ("--layers", layers),
                ("--diff", other is not None),
            )
            if is_asked
        ),
        "a list of contents",
    )
    output.refuse_idle(shown, frozenset().union(*_USED.values()) - _USED[shown])
    if is_plan:
        _show_plan(out, path)
        return
    if schedule or page is not None:
        from lingc.cli import schedule as view
        from lingc.launch_view import Wanted

        wanted = Wanted(phase=phase, sequences=batch, context=context, tokens=tokens or batch)
        view.show(out, path, wanted, page, target)
        return
    if layers:
        from lingc.cli import layers as layer_view

        layer_view.show(out, path, phase, target)
        return
    document = _describe(path)
    if other is not None:
        _show_differences(out, document, _describe(other))
    elif out.as_json:
        out.emit(document)
    elif document["kind"] == "package":
        _show_package(out, document, why=why)
    else:
        _show_checkpoint(out, document)


def _describe(path: Path) -> Document:
    is_checkpoint = (path / "config.json").is_file() and not (path / MANIFEST).exists()
    return describe_checkpoint(path) if is_checkpoint else describe_package(path)


# ---------------------------------------------------------------------------------------- packages


def _show_package(out: Output, document: Document, *, why: bool) -> None:
    manifest: Document = document["manifest"]
    request, weights, model = manifest["request"], manifest["weights"], manifest["model"]
    checkpoint = model["checkpoint"] or {}
    facts = [
        ("bundle id", manifest["bundle_id"]),
        ("format", manifest["format"]),
        ("model", model["architecture"]),
        ("checkpoint", checkpoint.get("identity", "any of this config")),
        ("precision", request["precision"]),
        ("weights", f"{weights['kind']}, {bytes_text(weights['bytes'])}"),
        *_variant_facts(manifest),
        ("files", f"{len(manifest['files'])}, {bytes_text(document['bytes'])}"),
    ]
    out.table(("package", document["path"]), facts)
    if why:
        _show_why(out, manifest)
        return
    columns = ("weights as", "stored in", "tensors", "bytes")
    rows = [(f["format"], f["dtype"], f["tensors"], f["bytes"]) for f in weights["formats"]]
    out.table(columns, rows)
    states = manifest["graph"]["states"]
    out.table(("state", "type", "count"), [(s["name"], s["type"], s["count"]) for s in states])
    programs = sorted(manifest["graph"]["programs"], key=lambda p: _phase_order(p["phase"]))
    _show_programs(out, programs)
    out.table(
        ("file", "role", "bytes", "sha256"),
        [(f["path"], f["role"], f["size"], f["sha256"][:12]) for f in manifest["files"]],
    )


def _variant_facts(manifest: Document) -> Iterator[tuple[str, str]]:
    for variant in manifest["variants"]:
        needs = variant["runs_on"]
        libraries = [f"{name} {versions}".strip() for name, versions in needs["libraries"].items()]
        where = "; ".join(map(", ".join, filter(None, (needs["os"], needs["arch"], libraries))))
        yield f"for {variant['target']}", f"{variant['engine']} engine on {where}"
        if "tuned_on" in variant:
            yield "tuned on", variant["tuned_on"]
        if "faults" in variant:
            yield "faults of the build", f"{variant['faults']}: `--layers` lists them by phase"
        in_use = variant["weights_in_use_bytes"]
        if in_use is not None:
            yield "weights while it runs", bytes_text(in_use)


def _show_programs(out: Output, programs: list[Document]) -> None:
    ops = sorted({op for program in programs for op in program["ops"]})
    rows = [(op, *(program["ops"].get(op) for program in programs)) for op in ops]
    steps = ("all steps", *(program["steps"] for program in programs))
    out.table(("op", *(program["phase"] for program in programs)), [*rows, steps])


def _phase_order(phase: str) -> int:
    return plans.PHASES.index(phase) if phase in plans.PHASES else len(plans.PHASES)


def _show_why(out: Output, manifest: Document) -> None:
    for name in ("request", "producer", "quant"):
        values = _flat(manifest[name])
        out.table((name, ""), [(key, json.dumps(value)) for key, value in values.items()])
    passes = manifest["graph"]["passes"]
    phases = list(dict.fromkeys(p["phase"] for p in passes))
    counts = {(p["name"], p["phase"]): _count(p) for p in passes}
    out.table(
        ("pass: found, of expected", *phases),
        [
            (name, *(counts.get((name, phase)) for phase in phases))
            for name in dict.fromkeys(p["name"] for p in passes)
        ],
    )


def _count(entry: Document) -> str:
    same = entry["expected"] in (None, entry["found"])
    return str(entry["found"]) if same else f"{entry['found']} of {entry['expected']}"


def _show_plan(out: Output, path: Path) -> None:
    manifest = read_manifest(path)
    plan, checks = judge_plan(package_root(path), manifest)
    if plan is None:
        said = "; ".join(check.found for check in checks)
        raise IntegrityError(
            f"the plan of {str(path)!r} cannot be shown: {said}",
            hint="`lingc verify` lists everything that is wrong",
        )
    if out.as_json:
        out.emit(plans.to_json(plan))
        return
    for line in plan_text.lines(plan):
        out.line(line)


# ------------------------------------------------------------------------------------- checkpoints


def _show_checkpoint(out: Output, document: Document) -> None:
    facts = [
        ("layout", document["layout"]),
        ("identity", document["identity"]),
        ("parameters", document["parameters"]),
        ("bytes", bytes_text(document["bytes"])),
    ]
    config = [(name, json.dumps(value)) for name, value in document["config"].items()]
    out.table(("checkpoint", document["path"]), [*facts, *config])
    out.table(
        ("tensors", "dtype", "shape", "count", "bytes"),
        [
            (t["name"], t["dtype"], str(t["shape"]), t["count"], t["bytes"])
            for t in document["tensors"]
        ],
    )


# ------------------------------------------------------------------------------------- differences


def _show_differences(out: Output, one: Document, other: Document) -> None:
    if one["kind"] != other["kind"]:
        raise UsageError(
            f"{one['path']!r} is a {one['kind']}, {other['path']!r} a {other['kind']}",
            hint="compare two packages, or two checkpoints",
        )
    left, right = _flat(_comparable(one)), _flat(_comparable(other))
    differing = [
        {"field": name, "one": left.get(name), "other": right.get(name)}
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    if out.as_json:
        out.emit({"one": one["path"], "other": other["path"], "differences": differing})
        return
    rows = [(d["field"], _cell(d["one"]), _cell(d["other"])) for d in differing]
    if rows:
        out.table(("differs in", one["path"], other["path"]), rows)
    out.line(f"{len(rows)} differences" if rows else "no difference")


def _comparable(document: Document) -> Document:
    """A document whose lists are by name, so that one entry more does not shift the others."""
    named = {key: value for key, value in document.items() if key not in ("path", "kind")}
    if "manifest" in named:
        manifest = dict(named["manifest"])
        manifest["files"] = {f["path"]: [f["size"], f["sha256"]] for f in manifest["files"]}
        graph = dict(manifest["graph"])
        graph["passes"] = {f"{p['phase']}.{p['name']}": p["found"] for p in graph["passes"]}
        graph["programs"] = {p["phase"]: p for p in graph["programs"]}
        return {**manifest, "graph": graph}
    named["tensors"] = {
        f"{t['name']} {t['dtype']} {t['shape']}": t["count"] for t in named["tensors"]
    }
    return named


def _cell(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def _flat(value: object, where: str = "") -> dict[str, Any]:
    """Nested objects as `a.b` -> value; lists stay whole."""
    if not isinstance(value, dict):
        return {where: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{where}.{key}" if where else key)
    return flat
