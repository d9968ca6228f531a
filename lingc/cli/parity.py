"""`lingc parity`: any two of an engine, a checkpoint, an interpreted plan and a record."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import GateError

if TYPE_CHECKING:
    from lingc.parity.run import Result, Settings

_SCORE = frozenset(
    ("data", "modes", "weights", "samples", "max_tokens", "batch", "threads", "checkpoint")
)
_DRIFT = frozenset(("drift", "state_dtype", "budget", "data", "report"))
_OWN = _SCORE | _DRIFT | {"bisect", "repro", "record"}
"""Options by what looks at them, and all of them."""

_MODES = ("prefill", "decode", "verify", "rollback", "draft", "all")


@click.command()
@click.argument("a")
@click.argument("b", required=False)
@click.option("--data", type=click.Path(path_type=Path), help="JSONL rows (default: 16 shipped).")
@click.option("--budget", help="Limits: a built-in name or a JSON file (default: what suits).")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(_MODES),
    multiple=True,
    help="How an engine is fed; may be given several times (default: prefill; bisect: all).",
)
@click.option(
    "--weights",
    type=click.Choice(("engine", "checkpoint")),
    default="engine",
    show_default=True,
    help="Weights of the eager side: rounded as the engine's, or as they are.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Rows to score (default: all).")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="What rows are cut to.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Rows at once."
)
@click.option("--threads", type=output.THREADS, help="Threads of an engine on a CPU.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for a package that has none (default: the other side's).",
)
@click.option("--report", type=click.Path(path_type=Path), help="Write a page to read, as HTML.")
@click.option("--bisect", is_flag=True, help="Find the first step that is wrong by itself.")
@click.option(
    "--repro",
    type=click.Path(path_type=Path),
    default=Path("parity-fault.safetensors"),
    show_default=True,
    help="Where --bisect writes what shows the fault again.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Write what A says to a file, which can be a side later; there is no B.",
)
@click.option(
    "--drift",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure how a narrow state of A drifts over N tokens.",
)
@click.option(
    "--state-dtype",
    type=click.Choice(("bf16", "f16", "f32")),
    default="bf16",
    show_default=True,
    help="What --drift holds the linear states in.",
)
@output.options
def command(
    out: Output,
    *,
    a: str,
    b: str | None,
    data: Path | None,
    budget: str | None,
    modes: tuple[str, ...],
    weights: str,
    samples: int | None,
    max_tokens: int,
    batch: int,
    threads: int | None,
    checkpoint: Path | None,
    report: Path | None,
    bisect: bool,
    repro: Path,
    record: Path | None,
    drift: int | None,
    state_dtype: str,
) -> None:
    """Compare two ways of running a model, token by token, and judge them by a budget.

    A and B are any two of an engine (tiny.ling), its plan run by the references
    (interpret:tiny.ling), a checkpoint directory (eager), and a record of one of these. Both are
    fed the same tokens. Where only B is a checkpoint it is the reference, else A is. Eager gets the
    engine's weights, that is, the checkpoint's rounded as the engine stores them; `--weights
    checkpoint` leaves them as they are and so shows what the precision costs.

    `--bisect` runs both step by step on the same values and names the first tensor that is wrong by
    its own step's doing. It leaves a file that `lingc parity repro FILE` runs again.

    `--drift N` looks at A alone: it holds linear states in another type, rounds them after each of
    N tokens, and tells how far the output of linear attention goes astray. A config.json without
    weights will do. The limit, if there is one, is `state_error` of the budget.

    \b
    Modes:
      prefill   whole rows, in chunks
      decode    one token a step
      verify    as many a step as the engine takes, all accepted
      rollback  the same with wrong tokens at the end, which are taken back
      draft     the MTP layer

    \b
    Examples:
      lingc parity artifacts/checkpoints/ling-tiny tiny.ling
      lingc parity artifacts/checkpoints/ling-tiny tiny.ling --mode all --report parity.html
      lingc parity interpret:tiny.ling tiny.ling --data mine.jsonl --samples 32
      lingc parity artifacts/checkpoints/ling-tiny tiny.ling --weights checkpoint --json
      lingc parity artifacts/checkpoints/ling-tiny tiny.ling --bisect
      lingc parity repro parity-fault.safetensors
      lingc parity artifacts/checkpoints/ling-tiny --record truth.safetensors
      lingc parity truth.safetensors tiny.ling
      lingc parity artifacts/checkpoints/ling-2.6-flash --drift 16384 --report drift.html

    The exit code is 5 where the budget is not kept, and where a step is wrong.
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc.parity import data as rows
        from lingc.parity import run as parity
        from lingc.parity import side
        from lingc.parity.opening import Weights, has_package
        from lingc.staging import refuse_unwritable

    action, used = _action(a, b, drift=drift, record=record, bisect=bisect, budget=budget)
    output.refuse_idle(action, _OWN - used)
    if drift is None and a != "repro" and not has_package(a, b):
        output.refuse_idle("sides without a package", {"threads", "checkpoint"})
    refuse_unwritable(report, record, repro if bisect else None)
    if drift is not None:
        _drift(out, Path(a), drift, state_dtype, budget, data, report)
        return
    if b is not None and a == "repro":
        _again(out, Path(b))
        return
    assert set(side.MODES) | {"all"} == set(_MODES), "the choices are the modes"
    (chosen_weights,) = (one for one in get_args(Weights) if one == weights)
    fallback: tuple[str, ...] = () if bisect else ("prefill",)
    wanted = modes or fallback
    settings = parity.Settings(
        a=a,
        b=b or "",
        cache_dir=cache_dir(),
        checkpoint=checkpoint,
        data=rows.SAMPLE if data is None else data,
        budget=budget,
        weights=chosen_weights,
        modes=side.MODES if "all" in wanted else tuple(m for m in side.MODES if m in wanted),
        samples=samples,
        max_tokens=max_tokens,
        batch=batch,
        threads=threads,
    )
    if record is not None:
        with out.stage("record rows", unit="rows") as advance:
            about = parity.record(settings, record, advance)
        told = {"kind": "record", "file": str(record), "side": about.name, "modes": about.modes}
        if out.as_json:
            out.emit({**told, "rows": len(about.rows)})
        else:
            out.line(f"{record}: {about.name}, {len(about.rows)} rows of {about.data}")
    elif bisect:
        _bisect(out, settings, repro, report)
    else:
        _compare(out, settings, report)


def _action(
    a: str,
    b: str | None,
    *,
    drift: int | None,
    record: Path | None,
    bisect: bool,
    budget: str | None,
) -> tuple[str, frozenset[str]]:
    """What is asked for, and the options that it looks at."""
    alone = "--drift" if drift is not None else "--record" if record is not None else None
    if alone and b is not None:
        raise click.UsageError(f"{alone} is of A alone; leave {b!r} out")
    if not alone and b is None:
        raise click.UsageError("there is no B, which A is held against")
    if alone:
        return alone, _DRIFT if drift is not None else _SCORE - {"weights"} | {"record"}
    if a == "repro":
        return "parity repro", frozenset()
    if bisect:
        if budget is not None:
            raise click.UsageError("--budget judges a comparison; --bisect has limits of its own")
        return "--bisect", _SCORE - {"batch"} | {"bisect", "repro", "report"}
    return "a comparison", _SCORE | {"budget", "report"}


def _compare(out: Output, settings: "Settings", report: Path | None) -> None:
    from lingc.parity import page
    from lingc.parity import run as parity
    from lingc.parity.report import document, verdict

    with out.stage("score rows", unit="rows") as advance:
        result = parity.run(settings, advance)
    if out.as_json:
        out.emit(document(result))
    else:
        _show(out, result)
    if report is not None:  # last: what was found is told even where the disk is full
        page.write(result, report)
        out.note(f"report: {report}")
    if not result.ok:
        raise GateError(verdict(result), hint="--report FILE.html shows where")


def _drift(
    out: Output,
    path: Path,
    tokens: int,
    state_dtype: str,
    budget: str | None,
    data: Path | None,
    report: Path | None,
) -> None:
    with held():
        from lingc.parity import drift_page
        from lingc.parity.budget import load_budget
        from lingc.parity.drift import STATE_DTYPES
        from lingc.parity.drift_run import measure
        from lingc.staging import write_whole

    limit = None if budget is None else load_budget(budget).state_error
    if budget is not None and limit is None:
        raise click.UsageError(f"budget {budget!r} has no state_error: --drift judges nothing else")
    (kind,) = (one for one in STATE_DTYPES if one == state_dtype)
    with out.stage("drift", total=tokens, unit="tokens") as advance:
        found = measure(path, tokens=tokens, state_dtype=kind, data=data, advance=advance)
    verdict = drift_page.verdict(found, limit)
    if out.as_json:
        out.emit({**found.document(), "limit": limit})
    else:
        out.line(f"{found.name}: {found.source}")
        out.table(drift_page.COLUMNS, drift_page.rows(found))
    if report is not None:
        write_whole(report, drift_page.render(found, limit))
        out.note(f"report: {report}")
    if limit is not None and not found.worst.points[-1].max <= limit:
        raise GateError(verdict, hint="keep the state in f32")
    if not out.as_json:
        out.line(verdict)


def _bisect(out: Output, settings: "Settings", repro: Path, report: Path | None) -> None:
    with held():
        from lingc.parity.bisect.search import COLUMNS, bisect
        from lingc.staging import write_whole

    with out.stage("walk the steps", unit="walks of a mode") as advance:
        result = bisect(settings, advance)
    if out.as_json:
        shown = None if result.reproducer is None else str(repro)
        out.emit({**result.document(), "reproducer": shown})
    else:
        out.line(f"reference: {result.reference}")
        out.line(f"suspect:   {result.other}")
        out.table(COLUMNS, [walk.cells() for walk in result.walked])
        for line in [] if result.finding is None else result.finding.lines():
            out.line(line)
        if result.ok:
            out.line(result.verdict())
    if result.reproducer is not None:
        result.reproducer.write(repro)
    if report is not None:
        write_whole(report, result.page(repro))
        out.note(f"report: {report}")
    if not result.ok:
        raise GateError(result.verdict(), hint=f"lingc parity repro {repro} runs that step again")


def _again(out: Output, path: Path) -> None:
    with held():
        from lingc.parity.bisect.search import again

    result = again(path, cache_dir=cache_dir())
    told, now = result.finding, result.judged
    verdict = (
        f"{told['tensor']} is what it should be now"
        if result.ok
        else f"{told['tensor']} is still wrong: error {now.error:.3g}, {now.limit:.3g} is due"
    )
    if out.as_json:
        out.emit(result.document())
    else:
        out.line(f"{told['op']}, layer {told['layer']}, {told['source']}: {told['compared']}")
        out.line(f"ran: {result.what}")
        for element in now.elements:
            out.line(f"  at {list(element.at)}: {element.got!r}, must be {element.want!r}")
        out.line(verdict)
    if not result.ok:
        raise GateError(verdict)


def _show(out: Output, result: "Result") -> None:
    from lingc.parity import report

    out.line(f"reference: {result.reference.name}")
    out.line(f"other:     {result.other.name}")
    out.line(f"data:      {result.data}, {len(result.lines)} rows")
    out.table(report.SUMMARY_COLUMNS, report.summary_rows(result))
    is_short = len(result.modes) > 1 and out.verbosity <= 0
    if not is_short:
        out.table(report.BUCKET_COLUMNS, report.bucket_rows(result))
    flips = list(report.flip_rows(result))
    if flips:
        limit = None if out.verbosity > 0 else report.SHOWN_FLIPS
        out.table(report.FLIP_COLUMNS, flips[:limit], title="Tokens with other experts")
        if len(flips[:limit]) < len(flips):
            out.note(f"{len(flips)} in all: -v lists them, and so do --json and --report")
    limit = 8 if out.verbosity > 0 else 1 if is_short else 3
    out.table(report.WORST_COLUMNS, report.worst_rows(result, limit=limit), title="Worst tokens")
    if not (is_short and result.ok):
        out.table(report.CHECK_COLUMNS, report.check_rows(result))
    if result.ok:
        out.line(report.verdict(result))
