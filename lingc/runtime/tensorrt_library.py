"""The TensorRT libraries as they are installed: what to install, and one repair."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingc.errors import MissingExtraError, ResourceError
from lingc.targets.spec import Target

RTX_CAPABILITIES: Mapping[tuple[int, int], str] = {
    (8, 9): "SM89",
    (12, 0): "SM120",
    (12, 1): "SM121",
}
"""What TensorRT for RTX builds for, as its `ComputeCapability` calls it; it has no sm_90."""

RTX, STANDARD = "tensorrt_rtx", "tensorrt"
"""Modules of the two flavours."""


def module_of(target: Target) -> str:
    """The flavour whose engines a target runs."""
    return RTX if target.compute_capability in RTX_CAPABILITIES else STANDARD


def require(target: Target) -> Any:
    """The module that builds for a target.

    Raises:
        MissingExtraError: It is not installed; the hint says what builds here instead.
    """
    name = module_of(target)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if name == RTX:
            raise MissingExtraError(
                f"a TensorRT engine for {target.name!r} is built by TensorRT for RTX, and its "
                f"package {name!r} is not installed",
                hint="pip install 'lingc[tensorrt]'; it needs no GPU",
            ) from error
        instead = (
            f"; without --engine, or with --engine cuda, an engine for {target.name!r} is built "
            "here: no GPU, kernels compiled ahead of time"
            if "cuda" in target.engines
            else ""
        )
        raise MissingExtraError(
            f"a TensorRT engine for {target.name!r} is built by standard TensorRT, which times its "
            f"kernels on a GPU of compute capability "
            f"{'.'.join(map(str, target.compute_capability or ()))}, and its package {name!r} is "
            "not installed here",
            hint=f"on a host with {target.title}: pip install 'tensorrt>=10.16' "
            f"'lingc[build,tensorrt]'{instead}",
        ) from error


_WANTED, _SHIPPED = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"


def mend(trt: Any) -> None:
    """Give TensorRT for RTX the library's other name, which its parser opens and wheels leave out.

    Without it the process ends when the first plugin is parsed.

    Raises:
        ResourceError: The folder of the libraries cannot be written.
    """
    if trt.__name__ != RTX:
        return
    folder = Path(str(importlib.import_module("tensorrt_rtx_libs").__file__)).parent
    link = folder / _WANTED
    if link.exists():
        return
    try:
        link.symlink_to(_SHIPPED)
    except FileExistsError:
        return  # another process was quicker
    except OSError as error:
        raise ResourceError(
            f"TensorRT for RTX needs {_WANTED!r} beside its libraries: {error}",
            hint=f"let somebody who may write there run: ln -s {_SHIPPED} {link}",
        ) from error
