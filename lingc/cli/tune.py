"""`lingc tune`: measure which tactics are fastest on the GPU at hand."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import measuring, output
from lingc.cli.failure import cache_dir, versions
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import GateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lingc.bench.tune import Found, Settings, Shape
    from lingc.device import Device
    from lingc.plan import Plan
    from lingc.targets.cuda.tactics import Row


@click.command()
@click.option("--target", "target_name", default="h200-sxm", show_default=True)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Directory with the model's config.json; its weights are drawn at random.",
)
@click.option("--precision", default="fp8", show_default=True, help="Of the model.")
@click.option("--op", "ops", multiple=True, help="This op alone; again for more.")
@click.option("--batch", default="1,16,32,4,8,2,64", show_default=True, help="Of decode.")
@click.option("--context", help="Of decode, in tokens (default: those of the buckets).")
@click.option("--prefill", default="1024,8192,16,64,256,4096", show_default=True, help="Tokens.")
@click.option("--no-prefill", is_flag=True, help="Decode alone.")
@click.option("--drafts", help="Also verify and draft, with so many drafted tokens a sequence.")
@click.option("--every", is_flag=True, help="Also time what has one tactic alone, for the record.")
@click.option("--again", is_flag=True, help="Also measure what has a row already.")
@click.option(
    "--sms",
    type=click.IntRange(min=1),
    help="Use so many multiprocessors: the device stands in for one that has fewer.",
)
@click.option("--seconds", type=click.FloatRange(min=0), help="Begin no shape after so long.")
@click.option("--dry-run", is_flag=True, help="List what would be measured; needs no GPU.")
@measuring.compiling
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path),
    help="The file of rows, read first (default: the target's own).",
)
@click.option(
    "--record", type=click.Path(path_type=Path), help="Write every candidate's time as well."
)
@click.option(
    "--fit",
    "fitted",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Measure nothing: fit the model of time to this record; again for more.",
)
@click.option(
    "--test",
    "tested",
    type=click.Path(path_type=Path),
    multiple=True,
    help="With --fit: tell how far the fitted model is off on this record; again for more.",
)
@output.options
def command(
    out: Output,
    *,
    target_name: str,
    checkpoint: Path | None,
    precision: str,
    ops: tuple[str, ...],
    batch: str,
    context: str | None,
    prefill: str,
    no_prefill: bool,
    drafts: str | None,
    every: bool,
    again: bool,
    sms: int | None,
    seconds: float | None,
    dry_run: bool,
    into: Path | None,
    binaries: Path | None,
    jobs: int | None,
    path: Path | None,
    record: Path | None,
    fitted: tuple[Path, ...],
    tested: tuple[Path, ...],
) -> None:
    """Time every tactic of a model's steps on this GPU, and keep the fastest as rows.

    Each tactic is held to its reference before it is timed. A row says which was fastest for an op
    on given sizes, how long it took and how long the model's choice, and on what it was measured.
    Builds for the target read the rows. They are written as they come, so that an interrupted run
    goes on where it was.

    With --fit no device is needed: what each kernel reaches of the ceilings is fitted to records,
    and written where builds read it, or to the file of -o.

    \b
    Examples:
      lingc tune --checkpoint artifacts/checkpoints/ling-2.6-flash --dry-run
      lingc tune --checkpoint artifacts/checkpoints/ling-2.6-flash --batch 1 --no-prefill
      lingc tune --checkpoint artifacts/checkpoints/ling-2.6-flash --target h20 --sms 78
      lingc tune --fit h200.json --test h100.json --test h200-78.json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc import targets
        from lingc.bench import tune
        from lingc.bench.work import default_work
        from lingc.targets.cuda.binaries import read_compilers, write_compilers
        from lingc.targets.cuda.tactics import read_rows, rows_file

    if fitted or tested:
        _fit(out, fitted, tested, path)
        return
    if checkpoint is None:
        raise UsageError("--checkpoint is missing: whose steps shall be measured?")
    if into is not None and binaries is not None:
        raise UsageError("--compile and --binaries contradict each other; give one of them")
    target = targets.get(target_name)
    if target.default_engine != "cuda":
        raise UsageError(f"{target.name} has no cuda engine to tune", hint="see `lingc targets`")
    plan = _plan(out, checkpoint, precision, target_name)
    settings = tune.Settings(
        target=target,
        cache_dir=into or binaries or cache_dir(),
        work=default_work(
            plan,
            batches=measuring.sizes(batch, "--batch"),
            contexts=None if context is None else measuring.sizes(context, "--context"),
            prefill=() if no_prefill else measuring.sizes(prefill, "--prefill"),
            drafts=() if drafts is None else measuring.sizes(drafts, "--drafts"),
        ),
        command=shlex.join(("lingc", *sys.argv[1:])),
        date=datetime.now(UTC).date().isoformat(),
        ops=ops,
        every=every,
        sms=sms,
        seconds=seconds,
        jobs=jobs,
        compilers=None if binaries is None else read_compilers(binaries),
    )
    place = rows_file(target) if path is None else path
    rows = read_rows(place)
    shapes = tune.shapes(plan, settings)
    wanted = [one for one in shapes if again or (one.op, one.known_as) not in rows]
    if dry_run:
        _list(out, wanted, len(shapes) - len(wanted))
        return
    if into is not None:
        made = tune.compile_kernels(plan, settings, wanted, out.stage)
        write_compilers(into)
        out.line(f"{len(made)} kernels for {target.arch} are in {into}")
        return
    _run(out, plan, settings, wanted, rows, place, record)


def _fit(
    out: Output, fitted: tuple[Path, ...], tested: tuple[Path, ...], path: Path | None
) -> None:
    """Fit the model to records, and tell how far it is off on others."""
    from lingc.bench import fit
    from lingc.staging import write_whole
    from lingc.targets.cuda.tactics import model_file

    if not fitted:
        raise UsageError("--test needs --fit RECORD: what shall the model be fitted to?")
    records = {file: _record(file) for file in (*fitted, *tested)}
    some = [one for file in fitted for one in fit.read_record(records[file])]
    reaches = fit.fit(some)
    first = records[fitted[0]]
    about = {
        "device": ", ".join(dict.fromkeys(records[file]["device"]["name"] for file in fitted)),
        "date": first["date"],
        "records": [_named(records[file]) for file in fitted],
    }
    told = fit.document(some, reaches, about)
    known = [
        (role, records[file]["device"], what, fit.error(measured, reaches))
        for role, files in (("fitted", fitted), ("tested", tested))
        for file in files
        for what, measured in (
            ("ops", fit.read_record(records[file])),
            ("steps", fit.read_steps(records[file])),
        )
        if measured
    ]
    rows = [
        (
            role,
            what,
            device["name"],
            device["sms"],
            found.count,
            f"{100 * found.median:.1f} %",
            f"{100 * found.p90:.1f} %",
            f"{100 * found.bias:+.1f} %",
        )
        for role, device, what, found in known
    ]
    place = path or model_file()
    told["kinds"] = dict(sorted({**_kinds(place), **told["kinds"]}.items()))
    write_whole(place, json.dumps(told, indent=1) + "\n")
    if out.as_json:
        out.emit(told)
        return
    out.table(("", "of", "device", "SMs", "times", "off, median", "90th percentile", "bias"), rows)
    out.line(f"model: {place}")


def _kinds(model: Path) -> "dict[str, Any]":
    """What a model says of kernels: that of those which no record measured stays as it is."""
    found: dict[str, Any] = _record(model)["kinds"] if model.is_file() else {}
    return found


def _named(record: "dict[str, Any]") -> str:
    """What a record is, without the place where it lay."""
    of = {**record, **record.get("engine", {})}
    what = (of["kind"], of.get("target"), of.get("precision"), of.get("commit"))
    return ", ".join(str(one) for one in what if one)


def _record(file: Path) -> "dict[str, Any]":
    from lingc.errors import InputError

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} cannot be read as a record: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{str(file)!r} is no record")
    return found


def _run(
    out: Output, plan: "Plan", settings: "Settings", wanted: "Sequence[Shape]",
    rows: "dict[tuple[str, str], Row]", place: Path, record: Path | None,
) -> None:  # fmt: skip
    from lingc.bench import tune
    from lingc.bench.record import about
    from lingc.staging import write_whole

    told: dict[str, Any] = {
        "kind": "tune", "format": tune.FORMAT, **about(versions(), settings.date),
        "target": settings.target.name, "precision": plan.precision, "command": settings.command,
        "shapes": [],
    }  # fmt: skip
    table: list[tuple[object, ...]] = []

    def keep(found: "Found", device: "Device") -> None:
        row = tune.row_of(found, settings, device)
        if row is not None:
            rows[row.op, row.key] = row
            write_whole(place, tune.rows_text(rows))
        told["shapes"].append(tune.entry_of(found))
        table.append(_row(found, row))

    done = tune.run(plan, settings, wanted, out.stage, keep)
    told |= done
    measuring.keep(out, record, told)
    if out.as_json:
        out.emit(told)
    else:
        out.line(f"device: {done['device']['name']}, {done['device']['sms']} SMs")
        out.table(("op", "work", "model", "µs", "predicted", "fastest", "µs"), table)
        out.line(f"rows: {place}" + (f"; {done['left']} shapes are left" if done["left"] else ""))
    wrong = [
        f"{one['op']}, {one['work']}, {each['tactic']}: {each['problem']}"
        for one in told["shapes"]
        for each in one["candidates"]
        if each["problem"] is not None
    ]
    if wrong:
        raise GateError(f"{len(wrong)} tactics are wrong, so they have no time", hint=wrong[0])


def _row(found: "Found", row: "Row | None") -> tuple[object, ...]:
    chosen = next(one for one in found.candidates if one.tactic == found.shape.chosen)
    best = "none is right" if row is None else row.tactic
    same = row is not None and row.tactic == chosen.tactic
    return (
        found.shape.op,
        found.shape.work.name,
        chosen.tactic,
        "wrong" if chosen.microseconds is None else f"{chosen.microseconds[1]:.2f}",
        f"{chosen.predicted:.2f}",
        "the same" if same else best,
        "" if row is None or same else f"{row.microseconds:.2f}",
    )


def _list(out: Output, wanted: "Sequence[Shape]", known: int) -> None:
    if out.as_json:
        out.emit(
            {
                "known": known,
                "shapes": [
                    {
                        "op": one.op,
                        "key": one.known_as,
                        "work": one.work.name,
                        "model": one.chosen,
                        "tactics": [tactic.name for tactic in one.tactics],
                    }
                    for one in wanted
                ],
            }
        )
        return
    out.table(
        ("op", "work", "tactics", "the model's choice"),
        [(one.op, one.work.name, len(one.tactics), one.chosen) for one in wanted],
    )
    out.line(f"{len(wanted)} shapes to measure, {known} have rows")


def _plan(out: Output, checkpoint: Path, precision: str, target_name: str) -> "Plan":
    """The plan of the model with one group of its layers."""
    from lingc import compile as compiler
    from lingc import targets
    from lingc.bench.tune import reduced
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import load_recipe

    config = reduced(ModelConfig.from_file(checkpoint))
    recipe = load_recipe(precision)
    request = compiler.Request(precision=recipe.name, target=target_name)
    return compiler.compile_plan(
        config,
        recipe,
        targets.get(target_name),
        has_mtp=config.has_mtp,
        request=request,
        stage=out.stage,
    ).plan
