"""`lingc bind`: pack a checkpoint's weights for a package that has none."""

from pathlib import Path

import click

from lingc.cli import failure, output
from lingc.cli.output import Output, bytes_text


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(path_type=Path),
    help="The checkpoint whose weights the engine shall have.",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where packed weights are kept (default: $LINGC_CACHE or ~/.cache/lingc).",
)
@output.options
def command(out: Output, package: Path, checkpoint: Path, cache_dir: Path | None) -> None:
    """Pack a checkpoint's weights for an engine that was built without any.

    They are written once for each pair of the two, found by what they are made like and of, and
    checked whenever they are loaded. `lingc run --checkpoint` does the same on first use.

    \b
    Examples:
      lingc bind tiny.ling --checkpoint artifacts/checkpoints/ling-tiny
      lingc bind tiny.ling --checkpoint DIR --cache-dir /var/cache/lingc --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc.engine import open_package
    from lingc.engine.bind import bind

    opened = open_package(package, level="integrity")  # it shall be bound, not run
    total = sum(spec.type.bytes() for spec in opened.plan.weights.values())
    with out.stage("pack weights", total=total, unit="B") as advance:
        seen = 0

        def progress(written: int, _total: int) -> None:
            nonlocal seen
            advance(written - seen)
            seen = written

        bound = bind(
            opened, checkpoint, cache_dir=cache_dir or failure.cache_dir(), progress=progress
        )
    size = sum(path.stat().st_size for path in bound.shards)
    if out.as_json:
        out.emit({"weights": bound.path, "bytes": size, "checkpoint": bound.checkpoint_identity})
        return
    out.line(f"{bound.path}  {bytes_text(size)} in {len(bound.shards)} files")
