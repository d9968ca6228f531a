"""`lingc parity`: any two of an engine, a checkpoint and an interpreted plan."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import GateError

if TYPE_CHECKING:
    from lingc.parity.run import Result

_MODES = ("prefill", "decode", "verify", "rollback", "draft", "all")


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL rows (default: 16 shipped).")
@click.option("--budget", help="Limits: a built-in name or a JSON file (default: what suits).")
@click.option(
    "--mode",
    "modes",
    type=click.Choice(_MODES),
    multiple=True,
    default=("prefill",),
    show_default=True,
    help="How an engine is fed; may be given several times.",
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
@click.option("--threads", type=click.IntRange(min=1), help="Threads of an engine on a CPU.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for a package that has none (default: the other side's).",
)
@click.option("--report", type=click.Path(path_type=Path), help="Write a page to read, as HTML.")
@output.options
def command(
    out: Output,
    *,
    a: str,
    b: str,
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
) -> None:
    """Compare two ways of running a model, token by token, and judge them by a budget.

    A and B are any two of an engine (tiny.ling), its plan run by the references
    (interpret:tiny.ling) and a checkpoint directory (eager). Both are fed the same tokens. Where
    only B is a checkpoint it is the reference, else A is. Eager gets the engine's weights, that is,
    the checkpoint's rounded as the engine stores them; `--weights checkpoint` leaves them as they
    are and so shows what the precision costs.

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

    The exit code is 5 where the budget is not kept.
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc.parity import data as rows
        from lingc.parity import page, side
        from lingc.parity import run as parity
        from lingc.parity.opening import Weights
        from lingc.parity.report import document, verdict

    assert set(side.MODES) | {"all"} == set(_MODES), "the choices are the modes"
    (chosen_weights,) = (one for one in get_args(Weights) if one == weights)
    settings = parity.Settings(
        a=a,
        b=b,
        cache_dir=cache_dir(),
        checkpoint=checkpoint,
        data=rows.SAMPLE if data is None else data,
        budget=budget,
        weights=chosen_weights,
        modes=side.MODES if "all" in modes else tuple(m for m in side.MODES if m in modes),
        samples=samples,
        max_tokens=max_tokens,
        batch=batch,
        threads=threads,
    )
    with out.stage("score rows", unit="rows") as advance:
        result = parity.run(settings, advance)
    if report is not None:
        page.write(result, report)
        out.note(f"report: {report}")
    if out.as_json:
        out.emit(document(result))
    else:
        _show(out, result)
    if not result.ok:
        raise GateError(verdict(result), hint="--report FILE.html shows where")


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
