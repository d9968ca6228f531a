"""`lingc deploy`: what a program without Python needs to run a TensorRT package."""

from pathlib import Path

import click

from lingc.cli import output
from lingc.cli.output import Output, bytes_text


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
)
@click.option(
    "--include",
    "includes",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with headers of TensorRT or CUDA: compile the plugins too. Several may be given.",
)
@click.option("--target", help="The variant's, of a package with several (default: this GPU's).")
@click.option("--overwrite", is_flag=True, help="Replace a folder that this command wrote.")
@output.options
def command(
    out: Output,
    package: Path,
    folder: Path,
    includes: tuple[Path, ...],
    target: str | None,
    *,
    overwrite: bool,
) -> None:
    """Write what a program without Python needs to run a TensorRT package.

    Engines, the table that their plugins launch from, its kernels, the plugins in C++ and a
    description of what to bind; weights stay in the package. No GPU is needed. With the headers of
    the host's TensorRT the plugins are compiled as well, with g++.

    \b
    Examples:
      lingc deploy spark.ling -o spark
      lingc deploy h20.ling -o h20 --include TENSORRT/include --include CUDA/include
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc.engine import open_package
    from lingc.runtime.tensorrt_deploy import LIBRARY, deploy

    opened = open_package(package, level="integrity", target=target)  # it need not run here
    with out.stage("write files"):
        made = deploy(opened, folder, includes=includes, overwrite=overwrite)
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    library = made / LIBRARY if includes else None
    chosen = opened.code().target
    if out.as_json:
        out.emit({"path": made, "target": chosen, "bytes": size, "library": library})
        return
    plugins = "plugins compiled" if library else "plugins as source"
    out.line(f"{made}  {bytes_text(size)} for {chosen}, {plugins}")
