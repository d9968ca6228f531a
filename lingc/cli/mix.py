"""`lingc mix`: a recipe for a budget of bytes a token, by measured sensitivity."""

import contextlib
from pathlib import Path

import click

from lingc.cli import output
from lingc.cli.interrupts import held
from lingc.cli.output import Output, bytes_text

_SIZES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}


def _size(_context: click.Context, _parameter: click.Parameter, value: str) -> float:
    unit = next((unit for unit in _SIZES if value.endswith(unit)), "")
    with contextlib.suppress(ValueError):
        count = float(value.removesuffix(unit)) * _SIZES.get(unit, 1.0)
        if 0 < count < float("inf"):
            return count
    raise click.BadParameter(f"{value!r} is no size; give one like 4.5GB, 820MB or 1200000")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data", "data", required=True, multiple=True, metavar="FILE[:WEIGHT]",
    help="As for `lingc calibrate`; a few rows do.",
)  # fmt: skip
@click.option(
    "--bytes-per-token", "budget", required=True, callback=_size, metavar="SIZE",
    help="What a token may read of the weights: 4.5GB, 820MB.",
)  # fmt: skip
@click.option(
    "-o", "--output", "path", required=True, type=click.Path(path_type=Path, dir_okay=False),
    help="The recipe, as JSON.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=8, show_default=True, help="Rows.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True,
    help="What rows are cut to.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses and orders rows.")
@click.option(
    "--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True,
    help="Where matrices are multiplied.",
)  # fmt: skip
@click.option(
    "--work-dir", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where activations lie meanwhile (default: the system's temporary folder).",
)  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), help="Write the curve as HTML.")
@output.options
def command(
    out: Output,
    *,
    checkpoint: Path,
    data: tuple[str, ...],
    budget: float,
    path: Path,
    samples: int,
    max_tokens: int,
    seed: int,
    device: str,
    work_dir: Path | None,
    report: Path | None,
) -> None:
    """Choose what stays in higher precision, such that a token reads no more than a budget.

    Each part of the model is rounded by itself, to FP8 and to INT4, and the divergence that this
    makes in the predictions is measured, all in one pass over the weights. Then the parts that lose
    most for a byte saved stay in more bits, and the choices are measured as a whole in a second
    pass. The result is a recipe like any other.

    \b
    Examples:
      lingc mix artifacts/checkpoints/ling-tiny --data english --bytes-per-token 12MB -o mixed.json
      lingc mix DIR --data mine.jsonl --bytes-per-token 5.2GB -o mixed.json --report mixed.html
      lingc quantize DIR --recipe mixed.json -o DIR-mixed
    """  # noqa: D301 click's mark for a block that is not rewrapped
    import json

    with held():
        from lingc.calibrate import mix_page
        from lingc.calibrate.mix import count_layers, mix
        from lingc.calibrate.run import device_named
        from lingc.calibrate.samples import samples_for
    from lingc.checkpoint import open_checkpoint, validate
    from lingc.runtime.tokenizer import Tokenizer
    from lingc.staging import refuse_unwritable, write_whole, writing

    refuse_unwritable(path, report)
    source = open_checkpoint(checkpoint)
    validate(source)
    given = samples_for(
        source,
        data,
        tokenizer=Tokenizer.from_directory(checkpoint),
        count=samples,
        max_tokens=max_tokens,
        seed=seed,
    )
    with out.stage("measure", total=count_layers(source.config), unit="layers") as advance:
        found = mix(
            source,
            given,
            budget,
            device=device_named(device),
            work_dir=work_dir,
            done=advance,
        )
    with writing(path):
        write_whole(path, json.dumps(found.recipe.document(), indent=2) + "\n")
    if report is not None:
        mix_page.write(found, report)
        out.note(f"report: {report}")
    if out.as_json:
        out.emit(
            {
                "recipe": found.recipe.document(),
                "output": path,
                "budget": budget,
                "chosen": _point(found.chosen),
                "curve": [_point(point) for point in found.curve],
                "prices": list(found.prices),
            }
        )
        return
    out.table(
        ("unit", "format"),
        [(u.name, f) for u, f in zip(found.units, found.chosen.formats, strict=True)],
        title="Chosen",
    )
    out.table(
        ("bytes a token", "predicted KL", "measured KL"),
        [
            (bytes_text(one.bytes), one.predicted, one.measured)
            for one in found.curve
            if one.measured is not None
        ],
        title="Choices that were run",
    )
    kl = found.chosen.measured
    out.line(
        f"{path}: {bytes_text(found.chosen.bytes)} a token, KL {kl:.3g} by rounding to nearest"
    )


def _point(point: object) -> dict[str, object]:
    from lingc.calibrate.mix import Point

    assert isinstance(point, Point), "of a curve"
    return {
        "formats": [str(one) for one in point.formats],
        "bytes": point.bytes,
        "predicted": point.predicted,
        "measured": point.measured,
    }
