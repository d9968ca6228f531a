"""`lingc build`: from a checkpoint to a package."""

from pathlib import Path

import click

from lingc.cli import output
from lingc.cli.failure import cache_dir
from lingc.cli.interrupts import held
from lingc.cli.output import Output, bytes_text, seconds_text


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), help="The package.")
@click.option(
    "--precision",
    metavar="NAME|FILE",
    help="A recipe: bf16, fp8, fp8-max, int4, int4-fp8, int4-all, or a file (default: the"
    " checkpoint's own layout).",
)
@click.option(
    "--target",
    metavar="NAME,...",
    default="cpu",
    show_default=True,
    help="See `lingc targets`. Several share one package where their plans agree.",
)
@click.option(
    "--engine",
    type=click.Choice(("auto", "onnx", "cuda", "tensorrt")),
    default="auto",
    show_default=True,
    help="auto depends on the target alone.",
)
@click.option(
    "--weights",
    type=click.Choice(("embed", "external")),
    default="embed",
    show_default=True,
    help="external: a small package, bound to a checkpoint by `lingc bind` or `run`.",
)
@click.option(
    "--widen",
    type=click.Choice(("auto", "load", "step")),
    default="auto",
    show_default=True,
    help="CPU only. When BF16 and FP8 weights become FP32: once while loading (fast, 4 bytes a"
    " weight in memory) or in every step. auto: load up to 1 GiB.",
)
@click.option(
    "--max-draft",
    type=click.IntRange(0, 15),
    default=3,
    show_default=True,
    help="Most tokens that `run --mtp` drafts a round.",
)
@click.option(
    "--page-size",
    type=click.IntRange(2, 1024),
    default=64,
    show_default=True,
    help="Tokens a page of the latent cache.",
)
@click.option(
    "--waive",
    multiple=True,
    metavar="PASS,...",
    help="Let passes fire less often than they must.",
)
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the program after each stage here.",
)
@click.option(
    "--batch-invariant",
    is_flag=True,
    help="GPU only. Give a request the same bits whatever runs beside it; slower.",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Standard TensorRT only. What it measures is read from this file and added to it"
    " (default: lingc's own, by version, GPU and precision).",
)
@click.option(
    "--lock-tactics",
    is_flag=True,
    help="With --timing-cache: measure nothing, choose by what the file holds.",
)
@click.option("--check", is_flag=True, help="Check the program after every pass.")
@click.option("--overwrite", is_flag=True, help="Replace a package that is there.")
@output.options
def command(
    out: Output,
    checkpoint: Path,
    path: Path | None,
    precision: str | None,
    target: str,
    engine: str,
    weights: str,
    widen: str,
    max_draft: int,
    page_size: int,
    waive: tuple[str, ...],
    dump_ir: Path | None,
    timing_cache: Path | None,
    *,
    batch_invariant: bool,
    lock_tactics: bool,
    check: bool,
    overwrite: bool,
) -> None:
    """Build an engine from a Hugging Face checkpoint directory.

    The package is written whole or not at all. The same checkpoint and options give the same bytes
    on any machine; TensorRT's engines alone differ from build to build.

    \b
    Examples:
      lingc build artifacts/checkpoints/ling-tiny
      lingc build artifacts/checkpoints/ling-tiny --precision int4 -o tiny-int4.ling
      lingc build artifacts/checkpoints/ling-tiny --weights external -o tiny.ling
      lingc build artifacts/checkpoints/ling-tiny --dump-ir ir/ --check --overwrite
      lingc build DIR --precision fp8 --weights external --target h20,h20-3e,h200-sxm -o h20.ling
    """  # noqa: D301 click's mark for a block that is not rewrapped
    import time

    with held():
        from lingc import build as builder
        from lingc.capture import Sizes
        from lingc.compile import Request

    started = time.perf_counter()
    first, *also = (name.strip() for name in target.split(","))
    request = Request(
        precision=precision,
        target=first,
        engine=engine,
        weights=weights,
        widen=widen,
        batch_invariant=batch_invariant,
        timing_cache=timing_cache,
        lock_tactics=lock_tactics,
        sizes=Sizes(page_size=page_size, max_draft=max_draft),
        waive=tuple(name.strip() for names in waive for name in names.split(",")),
        check=check,
        dump_dir=dump_ir,
    )
    path = path or _default_path(checkpoint, precision, "" if also else first)
    built = builder.build(
        checkpoint, path, request, also=also, overwrite=overwrite, stage=out.stage,
        cache_dir=cache_dir(),
    )  # fmt: skip
    plan, manifest = built.compiled.plan, built.manifest
    size = sum(file.size for file in manifest.files.values())
    if out.as_json:
        out.emit(
            {
                "package": path,
                "bundle_id": manifest.bundle_id,
                "bytes": size,
                "precision": plan.precision,
                "target": plan.target,
                "targets": [*manifest.variants],
                "engine": manifest.variants[plan.target].engine,
                "widen": built.code.info.get("widen"),
                "phases": list(plan.programs),
            }
        )
        return
    kind = manifest.variants[plan.target].engine
    others = [other for other in built.compiled.target.engines if other != kind]
    instead = f" (also: --engine {', '.join(others)})" if others else ""
    out.note(f"engine kind {kind} for target {plan.target}{instead}")
    wanted = built.compiled.recipe.activations
    if wanted != "plain" and plan.activation == "f32":
        out.note(f"{plan.precision} is weight-only on {plan.target}: activations stay FP32")
    elif note := manifest.value["quant"]["note"]:
        out.note(f"{plan.precision} on {plan.target}: {note}")
    names = ", ".join(manifest.variants)
    out.line(f"{path}  {bytes_text(size)}  {plan.precision} for {names}")
    out.line(f"bundle {manifest.bundle_id[:16]}, {seconds_text(time.perf_counter() - started)}")
    if weights == "external":
        out.note(f"bind its weights: lingc bind {path} --checkpoint {checkpoint}")


def _default_path(checkpoint: Path, precision: str | None, target: str) -> Path:
    """`artifacts/<checkpoint>-<precision>-<target>.ling`, or without the folder if it is not there.

    A recipe file gives its stem; without a target where there are several.
    """
    name = "-".join(filter(None, (checkpoint.resolve().name, _stem(precision), target)))
    folder = Path("artifacts")
    return (folder if folder.is_dir() else Path()) / f"{name}.ling"


def _stem(precision: str | None) -> str:
    return "" if precision is None else Path(precision).name.removesuffix(".json")
