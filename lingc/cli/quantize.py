"""`lingc quantize`: a checkpoint in the formats of a recipe."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import output
from lingc.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from lingc.checkpoint.outcomes import Family, Suggestion
    from lingc.checkpoint.quantizer import Outcome, Quantized

_SHOWN = 8


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--recipe",
    required=True,
    metavar="NAME|FILE",
    help="Which matrix is stored how: see `recipes`.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, file_okay=False),
    help="What `lingc calibrate` wrote for this checkpoint and recipe (default: none, round to "
    "nearest).",
)
@click.option(
    "-o", "--output", "out_dir", required=True, type=click.Path(path_type=Path), help="Directory."
)
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layer out, as the INT4 release does.")
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=8 << 30,
    show_default=True,
    help="Bytes a file of weights gets at most, unless one tensor is larger.",
)
@click.option("--fresh", is_flag=True, help="Throw away what a killed run with this output began.")
@output.options
def command(
    out: Output,
    *,
    checkpoint: Path,
    recipe: str,
    calibration: Path | None,
    out_dir: Path,
    no_mtp: bool,
    shard_size: int,
    fresh: bool,
) -> None:
    """Write a quantized checkpoint, tensor by tensor, and tell what was done to each.

    Recipes of one format give the layouts of the releases, which other engines load: FP8 blocks
    with `weight_scale_inv`, compressed-tensors pack-quantized for INT4. Recipes of several formats
    give compressed-tensors mixed-precision. What an engine's kernels want is another order of the
    same bytes: `lingc build` and `lingc bind` make it from any of these.

    A run that was killed goes on where it was when the same command is given again; what it wrote
    stands in OUTPUT.partial until it is whole. quantization.json beside the weights has a line for
    each matrix.

    \b
    Examples:
      lingc quantize artifacts/checkpoints/ling-tiny --recipe fp8 -o ling-tiny-fp8
      lingc quantize DIR --recipe int4 --no-mtp -o DIR-int4
      lingc quantize DIR --recipe int4-all --calibration DIR-calibration -o DIR-int4-all
      lingc quantize DIR --recipe mine.json -o DIR-mine --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc.checkpoint import open_checkpoint, validate
    from lingc.checkpoint.calibrated import open_calibration
    from lingc.checkpoint.outcomes import families, suggestions
    from lingc.checkpoint.quantizer import quantize_checkpoint
    from lingc.quantize.recipes import load_recipe

    chosen = load_recipe(recipe)
    source = open_checkpoint(checkpoint)
    validate(source)
    changes = None if calibration is None else open_calibration(calibration, source, chosen)
    total = sum(2 * math.prod(source.shape(name)) for name in source.names)
    with out.stage("quantize", total=total, unit="B") as advance:
        result = quantize_checkpoint(
            source,
            chosen,
            out_dir,
            changes=changes,
            keep_mtp=not no_mtp,
            shard_bytes=shard_size,
            fresh=fresh,
            progress=advance,
        )
    found = families(result.outcomes)
    better = suggestions(result.outcomes)
    if out.as_json:
        out.emit(_document(result, found, better))
    else:
        _show(out, result, found, better)


def _document(
    result: "Quantized", found: Sequence["Family"], better: Sequence["Suggestion"]
) -> dict[str, Any]:
    return {
        "output": result.path,
        "resumed": result.is_resumed,
        "input_bytes": sum(one.input_bytes for one in result.outcomes),
        "bytes": sum(one.bytes for one in result.outcomes),
        "families": list(found),
        "suggestions": list(better),
        "tensors": list(result.outcomes),
    }


def _show(
    out: Output, result: "Quantized", found: Sequence["Family"], better: Sequence["Suggestion"]
) -> None:
    if result.lacks_input_scales:
        out.note(
            "without a calibration there are no scales of inputs: what loads this rounds weights "
            "alone, or rounds inputs on the fly"
        )
    if result.is_resumed:
        out.note("went on with what an earlier run had written")
    quantized = [one for one in found if one.how != "plain"]
    if quantized:
        out.table(
            ("modules", "format", "matrices", "how", "error", "worst"),
            [
                (one.pattern, one.format, one.matrices, one.how, _percent(one.error),
                 _percent(one.worst))
                for one in quantized
            ],
            title="Quantized",
        )  # fmt: skip
    out.table(
        ("modules", "matrices", "size", "why"),
        [
            (one.pattern, one.matrices, bytes_text(one.bytes), one.why)
            for one in found
            if one.how == "plain"
        ],
        title="Not quantized",
    )
    _show_worst(out, result.outcomes)
    for one in better:
        out.line(
            f"consider keeping {one.module} plain: {one.reason}; it costs {bytes_text(one.bytes)}"
        )
    before = sum(one.input_bytes for one in result.outcomes)
    after = sum(one.bytes for one in result.outcomes)
    counts = Counter(one.how for one in result.outcomes)
    said = ", ".join(f"{count} {how}" for how, count in counts.items())
    out.line(f"{result.path}: {bytes_text(before)} -> {bytes_text(after)}; matrices: {said}")


def _show_worst(out: Output, outcomes: Sequence["Outcome"]) -> None:
    rounded = [one for one in outcomes if one.error is not None]
    rounded.sort(key=lambda one: -(one.error or 0))
    shown = rounded if out.verbosity > 0 else rounded[:_SHOWN]
    if shown:
        out.table(
            ("module", "format", "error", "worst"),
            [(one.name, one.format, _percent(one.error), _percent(one.worst)) for one in shown],
            title="Largest errors",
        )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f} %"
