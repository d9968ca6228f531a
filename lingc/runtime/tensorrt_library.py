"""The TensorRT libraries as they are installed: what to install, and one repair."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lingc.errors import ResourceError

INSTALL: Mapping[str, str] = {
    "tensorrt_rtx": "pip install 'lingc[tensorrt]'",
    "tensorrt": "on the machine with the GPU: pip install tensorrt 'lingc[tensorrt]'",
}
"""Module -> how to get it."""

_WANTED, _SHIPPED = "libtensorrt_rtx.so", "libtensorrt_rtx.so.1"


def mend(trt: Any) -> None:
    """Give TensorRT for RTX the library's other name, which its parser opens and wheels leave out.

    Without it the process ends when the first plugin is parsed.

    Raises:
        ResourceError: The folder of the libraries cannot be written.
    """
    if trt.__name__ != "tensorrt_rtx":
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
