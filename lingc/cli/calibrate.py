"""`lingc calibrate`: sample data decides how weights and activations are rounded."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import output
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import GateError

if TYPE_CHECKING:
    from lingc.calibrate.coverage import Coverage
    from lingc.calibrate.matrices import Method
    from lingc.calibrate.samples import Samples
    from lingc.checkpoint.source import Source
    from lingc.quantize.recipes import Recipe

_SHOWN = 8


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "data",
    required=True,
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="JSONL rows of text, messages or input_ids, and their share; may be given several times. "
    "A name of a shipped set also does: chinese, code, english, tools.",
)
@click.option("--recipe", required=True, metavar="NAME|FILE", help="See `lingc recipes`.")
@click.option(
    "-o", "--output", "out_dir", required=True, type=click.Path(path_type=Path), help="Directory."
)
@click.option("--samples", type=click.IntRange(min=1), help="Rows to use (default: all there are).")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="What rows are cut to.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses and orders rows.")
@click.option(
    "--int4",
    type=click.Choice(("gptq", "search", "nearest")),
    default="gptq",
    show_default=True,
    help="How INT4 weights are rounded: errors made up for, scales searched, or not by data.",
)
@click.option(
    "--fp8",
    type=click.Choice(("gptq", "search", "nearest")),
    default="gptq",
    show_default=True,
    help="How FP8 weights are.",
)
@click.option(
    "--loss",
    type=click.Choice(("model", "matrix")),
    default="model",
    show_default=True,
    help="Whose error gptq keeps small: the model's, for which gradients are taken back through "
    "it first, or that of each matrix for itself, which takes less time and disk.",
)
@click.option(
    "--observer",
    type=click.Choice(("absmax", "percentile", "mse")),
    default="absmax",
    show_default=True,
    help="What bounds activations that have one scale.",
)
@click.option(
    "--percentile",
    type=click.FloatRange(50, 100),
    default=99.99,
    show_default=True,
    help="Of `--observer percentile`.",
)
@click.option(
    "--fallback-below",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Experts with fewer tokens are rounded to nearest, as without a calibration.",
)
@click.option(
    "--min-tokens-per-expert",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Fewer for any expert is exit code 5; the calibration is written all the same.",
)
@click.option(
    "--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True,
    help="Where matrices are multiplied.",
)  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="Write a page to read, as HTML.")
@click.option("--fresh", is_flag=True, help="Throw away what a killed run with this output began.")
@output.options
def command(
    out: Output,
    *,
    checkpoint: Path,
    data: tuple[str, ...],
    recipe: str,
    out_dir: Path,
    samples: int | None,
    max_tokens: int,
    seed: int,
    int4: str,
    fp8: str,
    loss: str,
    observer: str,
    percentile: float,
    fallback_below: int,
    min_tokens_per_expert: int,
    device: str,
    report: Path | None,
    fresh: bool,
) -> None:
    """Run sample data through the model and round its weights by what is seen.

    Gradients of the model's loss on the samples say first what an error costs, and where. Then
    it works layer by layer: weights are read from the checkpoint as they are needed, activations
    of all samples lie in files, and what is held in memory does not grow with the model's depth
    or the number of samples. `lingc quantize --calibration` then writes a checkpoint.

    A run that was killed goes on with the layer it was in when the same command is given again, and
    comes to the same bytes. It is refused where checkpoint, data, recipe or method are others.

    The shipped sets are short and for trying things out. Calibrate a release on some hundred rows
    of what it will be asked.

    \b
    Examples:
      lingc calibrate artifacts/checkpoints/ling-tiny --data english --recipe int4 -o calibration
      lingc calibrate DIR --data chat.jsonl:0.7 --data code.jsonl:0.3 --recipe int4-all -o out
      lingc calibrate DIR --data mine.jsonl --recipe int4 --min-tokens-per-expert 64 -o calibration
      lingc calibrate DIR --data mine.jsonl --recipe fp8-static --observer percentile -o calibration
      lingc quantize DIR --recipe int4 --calibration calibration -o DIR-int4

    The exit code is 5 where an expert saw fewer tokens than --min-tokens-per-expert.
    """  # noqa: D301 click's mark for a block that is not rewrapped
    with held():
        from lingc.calibrate import page
        from lingc.calibrate.coverage import coverage
        from lingc.calibrate.matrices import Method
        from lingc.calibrate.run import Settings, calibrate, count_steps, device_named
        from lingc.calibrate.samples import samples_for
    from lingc.checkpoint import open_checkpoint, validate
    from lingc.quantize.recipes import load_recipe
    from lingc.runtime.tokenizer import Tokenizer
    from lingc.staging import refuse_same, refuse_unwritable

    if math.isnan(percentile):  # a range lets it pass
        raise click.BadParameter("nan is no percentile", param_hint="'--percentile'")
    refuse_same(out_dir, report)
    if report is not None and out_dir not in report.parents:  # which is made meanwhile
        refuse_unwritable(report)
    chosen = load_recipe(recipe)
    source = open_checkpoint(checkpoint)
    validate(source)
    method = Method(int4=int4, fp8=fp8, loss=loss)
    _refuse_idle(source, chosen, method, observer)
    given = samples_for(
        source,
        data,
        tokenizer=Tokenizer.from_directory(checkpoint),
        count=samples,
        max_tokens=max_tokens,
        seed=seed,
    )
    _tell_data(out, given)
    if samples is not None and len(given.samples) < samples:
        out.note(f"the files give {len(given.samples)} of the {samples} rows of --samples")
    settings = Settings(
        method=method,
        observer=observer,
        percentile=percentile,
        fallback_below=fallback_below,
        device=device_named(device),
    )
    steps = count_steps(source, chosen, settings)
    with out.stage("calibrate", total=steps, unit="matrices") as advance:
        result = calibrate(source, chosen, given, out_dir, settings, fresh=fresh, done=advance)
    covered = coverage(result.document["coverage"], floor=min_tokens_per_expert)
    if out.as_json:
        document = {**result.document, "output": result.path, "resumed": result.is_resumed}
        out.emit({**document, "below_floor": list(covered.below)})
    else:
        _show(out, result.document, covered)
        out.line(f"{result.path}: calibrated on {given.tokens} tokens of {len(given.samples)} rows")
    if report is not None:
        page.write(result.document, covered, report)
        out.note(f"report: {report}")
    if covered.below:
        raise GateError(covered.sentence(), hint="give data that reaches them, more of it, or a "
                        "lower --min-tokens-per-expert; the calibration is written")  # fmt: skip


def _refuse_idle(source: "Source", recipe: "Recipe", method: "Method", observer: str) -> None:
    """Refuse options that the recipe, or another option, leaves without anything to decide."""
    from lingc.calibrate.run import has_use_of_gradients
    from lingc.checkpoint.expected import matrix_modules

    modules = matrix_modules(source.config)
    recipe.check_matches(modules)
    formats = {module: recipe.format_of(module) for module in modules}
    has_int4 = any(one.kind == "int4_group" for one in formats.values())
    has_fp8 = any(one.kind.startswith("fp8") for one in formats.values())
    by = f"recipe {recipe.name!r}"
    if not has_int4:
        output.refuse_idle(f"{by}, which has no INT4 matrix", {"int4"})
    if not has_fp8:
        output.refuse_idle(f"{by}, which has no FP8 matrix", {"fp8"})
    if not has_use_of_gradients(source, recipe, method):
        output.refuse_idle(f"{by} where gptq has no use for gradients", {"loss"})
    if not (has_fp8 and recipe.activations == "fp8_static"):
        static = "which has no static scales of inputs"
        output.refuse_idle(f"{by}, {static}", {"observer", "percentile"})
    elif observer != "percentile":
        output.refuse_idle(f"--observer {observer}", {"percentile"})
    if not any(method.is_used(one) for name, one in formats.items() if ".experts." in name):
        output.refuse_idle(f"{by} where no expert is rounded by data", {"fallback_below"})


def _tell_data(out: Output, given: "Samples") -> None:
    for one in given.files:
        notes = [f"{one.rows} rows", f"{one.chosen} used"]
        notes += [f"{one.repeated} said twice"] if one.repeated else []
        notes += [f"{one.cut} cut"] if one.cut else []
        out.note(f"data: {one.name}: {', '.join(notes)}")
    lengths = ", ".join(f"{count} {name}" for name, count in given.histogram())
    out.note(f"tokens of a row: {lengths}")


def _show(out: Output, document: Mapping[str, Any], covered: "Coverage") -> None:
    if covered.layers:
        rows = covered.rows()
        out.table(
            ("layer", "experts", "tokens", "fewest", "median", "most", "silent"),
            rows,
            title="Tokens of an expert",
        )
    for line in covered.silent_lines():
        out.line(line)
    _show_losses(out, document["matrices"])
    if document["input_bounds"]:
        out.line(f"scales of inputs: {len(document['input_bounds'])} modules")


def _show_losses(out: Output, matrices: Sequence[Mapping[str, Any]]) -> None:
    made = [one for one in matrices if one["how"] == "calibrated"]
    if not made:
        out.line("no matrix was rounded by what was seen")
    else:
        gains = sorted(one["loss"] / one["nearest_loss"] for one in made if one["nearest_loss"])
        if gains:
            middle = gains[len(gains) // 2]
            out.line(
                f"{len(made)} matrices: error of outputs on the samples {middle:.2f} of rounding "
                f"to nearest (median; {gains[0]:.2f} to {gains[-1]:.2f})"
            )
        worst = sorted(made, key=lambda one: -one["loss"])
        out.table(
            ("module", "format", "tokens", "loss", "by nearest"),
            [
                (one["module"], one["format"], one["tokens"], _percent(one["loss"]),
                 _percent(one["nearest_loss"]))
                for one in (worst if out.verbosity > 0 else worst[:_SHOWN])
            ],
            title="Largest losses: energy of outputs that rounding changes",
        )  # fmt: skip
    fallen = [one["module"] for one in matrices if one["how"] == "fallback"]
    if fallen:
        out.line(f"rounded to nearest for want of tokens: {len(fallen)} matrices")
        for name in fallen if out.verbosity > 0 else fallen[:_SHOWN]:
            out.detail(f"  {name}")


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"
