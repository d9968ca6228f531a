"""The model in plain PyTorch, driven only by `config.json`: the numerical truth ("eager").

`lingc.model.config` needs no torch, so the names below are fetched on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lingc.model.config import ModelConfig

if TYPE_CHECKING:
    from lingc.model.block import State
    from lingc.model.loading import load
    from lingc.model.model import LingModel

_LAZY = {
    "LingModel": "lingc.model.model",
    "State": "lingc.model.block",
    "load": "lingc.model.loading",
}

__all__ = ["LingModel", "ModelConfig", "State", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
