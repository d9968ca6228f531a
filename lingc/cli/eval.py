"""`lingc eval`: how well a text is predicted."""

from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import GateError


@click.command()
@click.argument("subject", metavar="ENGINE")
@click.option(
    "--text",
    required=True,
    type=click.Path(path_type=Path),
    help="Text in UTF-8, or a .jsonl file of documents.",
)
@click.option("--against", help="What to hold it against: a checkpoint, a plan or an engine.")
@click.option(
    "--weights",
    type=click.Choice(("engine", "checkpoint")),
    default="checkpoint",
    show_default=True,
    help="Weights of an eager side: as they are, or rounded as the engine's.",
)
@click.option(
    "--window",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens that follow each other; each window begins with an empty state.",
)
@click.option("--windows", type=click.IntRange(min=1), help="How many to take (default: all).")
@click.option(
    "--resamples",
    type=click.IntRange(min=100, max=1_000_000),
    default=2000,
    show_default=True,
    help="Resamples behind the intervals.",
)
@click.option(
    "--max-ratio",
    type=click.FloatRange(min=0),
    help="Exit with 5 where the ratio of perplexities may be above this.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Windows at once."
)
@click.option("--threads", type=output.THREADS, help="Threads of an engine on a CPU.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights for a package that has none (default: those of --against).",
)
@output.options
def command(
    out: Output,
    *,
    subject: str,
    text: Path,
    against: str | None,
    weights: str,
    window: int,
    windows: int | None,
    resamples: int,
    max_ratio: float | None,
    batch: int,
    threads: int | None,
    checkpoint: Path | None,
) -> None:
    """Tell how well a text is predicted: perplexity and bits per byte, with intervals.

    ENGINE is a package, interpret:PACKAGE or a checkpoint directory, as for `lingc parity`. With
    `--against` both are asked, and the ratio of their perplexities has an interval of its own: the
    two see the same windows. Intervals are of 95 %, from resampled windows, or from resampled
    documents where the text is a .jsonl file.

    \b
    Examples:
      lingc eval tiny.ling --text novel.txt
      lingc eval tiny.ling --text novel.txt --against artifacts/checkpoints/ling-tiny
      lingc eval tiny.ling --text held-out.jsonl --against DIR --max-ratio 1.005 --json

    The exit code is 5 where the upper end of the ratio's interval is above `--max-ratio`.
    """  # noqa: D301 click's mark for a block that is not rewrapped
    if max_ratio is not None and against is None:
        raise click.UsageError("--max-ratio needs --against: a ratio is of two")
    with held():
        from lingc.parity.data import refuse_longer
        from lingc.parity.evaluate import evaluate, read_windows
        from lingc.parity.opening import Start, has_package, open_each, refuse_other_weights

    if not has_package(subject, against):
        output.refuse_idle("sides without a package", {"threads", "checkpoint"})
    words = [subject] if against is None else [subject, against]
    subjects = open_each(words, cache_dir=cache_dir(), checkpoint=checkpoint)
    pairs = permutations(subjects, 2)
    beside = [pair for pair in pairs if pair[0].kind == "eager" and pair[1].plan is not None]
    if not beside:
        output.refuse_idle("sides other than eager and an engine", {"weights"})
    if weights == "engine":
        for one, other in beside:
            refuse_other_weights(one, other)
    tokenizer = next((one.tokenizer for one in subjects if one.tokenizer is not None), None)
    vocab = min(one.config.vocab_size for one in subjects)
    read = read_windows(text, vocab=vocab, tokenizer=tokenizer, window=window, limit=windows)
    longest = max(len(each.ids) for each in read)
    positions = min(one.config.max_position_embeddings for one in subjects)
    refuse_longer(f"a window of {text.name!r}", longest, positions, "--window")
    plans = [one.plan for one in subjects]
    with ExitStack() as stack:
        sides = []
        for place, one in enumerate(subjects):
            start = Start(
                slots=min(batch, len(read)),
                tokens=longest,
                phases=("prefill",),
                threads=threads,
                rounding=plans[1 - place] if weights == "engine" and len(plans) == 2 else None,
            )
            sides.append(one.start(start))
            stack.callback(sides[-1].close)
        with out.stage("score windows", total=len(read), unit="windows") as advance:
            found = evaluate(
                sides, read, text=text.name, batch=batch, resamples=resamples, advance=advance
            )
    if out.as_json:
        out.emit(found.document())
    else:
        size = f"{found.bytes} bytes, " if found.bytes else ""
        out.line(f"{found.text}: {size}{found.predictions} predictions in {found.windows} windows")
        columns = ("side", "perplexity (95 %)", "bits per byte (95 %)", "nats a token")
        out.table(
            columns,
            [(s.name, s.perplexity, s.bits_per_byte, f"{s.nats.value:.6f}") for s in found.sides],
        )
        if found.ratio is not None:
            out.line(f"ratio of perplexities: {found.ratio}")
    if max_ratio is not None and found.ratio is not None and not found.ratio.high <= max_ratio:
        raise GateError(
            f"the perplexity may be {found.ratio.high:.5g} times that of {found.sides[1].name}, "
            f"at most {max_ratio:g} is due",
            hint="lingc parity shows where it is lost; more text narrows the interval",
        )
