"""Eager's values between its modules, as they are made, under names of the checkpoint.

model.layers.3.attention.dense          what a linear, a norm or the embedding gives
model.layers.3.attention.dense.input    what it is given
model.layers.0.attention.q, .k, .v      normed and roped, of a linear layer
model.layers.3.attention.q, .row        roped query and row of the cache, of an MLA layer
model.layers.1.mlp.gate.ids, .weights   of a router
model.layers.1.mlp.experts              the weighted sum of the routed experts
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lingc.model.linear_attention import LinearAttention
from lingc.model.mla import MLA
from lingc.model.model import LingModel
from lingc.model.moe import Experts, Router
from lingc.model.norm import GroupRMSNorm, RMSNorm

Visit = Callable[[str, Tensor, str], Tensor]
"""Told a name, a value and the line of the model that makes it; gives the value to go on with."""

INPUT = ".input"

_LEAVES = (nn.Linear, nn.Embedding, RMSNorm, GroupRMSNorm)
_METHODS: tuple[tuple[type[nn.Module], str, tuple[str, ...]], ...] = (
    (LinearAttention, "project", ("q", "k", "v")),
    (MLA, "latent", ("q", "row")),
    (Router, "logits", ("logits",)),
    (Router, "select", ("ids", "weights")),
)


@contextmanager
def watched(module: LingModel, visit: Visit) -> Iterator[None]:
    """Have `visit` see, and choose, what goes from one part of the model to the next."""
    with ExitStack() as stack:
        for name, part in module.named_modules():
            for handle in _hooks(name, part, visit):
                stack.callback(handle.remove)
            for kind, method, results in _METHODS:
                if isinstance(part, kind):
                    _wrap(part, method, [f"{name}.{result}" for result in results], visit)
                    stack.callback(delattr, part, method)
        yield


def _hooks(name: str, part: nn.Module, visit: Visit) -> Iterator[Any]:
    if not isinstance(part, (*_LEAVES, Experts)):
        return
    source = line_of(type(part).forward) if type(part).__module__.startswith("lingc.") else ""

    def after(_: nn.Module, __: Any, value: Tensor) -> Tensor:
        return visit(name, value, source)

    def before(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (visit(f"{name}{INPUT}", given[0], source), *given[1:])

    if not isinstance(part, Experts | nn.Embedding):
        yield part.register_forward_pre_hook(before)
    yield part.register_forward_hook(after)


def _wrap(part: nn.Module, method: str, names: list[str], visit: Visit) -> None:
    sound = getattr(part, method)
    source = line_of(sound)

    def watching(*args: Any, **kwargs: Any) -> Any:
        made = sound(*args, **kwargs)
        if isinstance(made, Tensor):
            return visit(names[0], made, source)
        return tuple(visit(name, value, source) for name, value in zip(names, made, strict=True))

    setattr(part, method, watching)


def line_of(function: Callable[..., Any]) -> str:
    """Where a function of the model stands: `mla.py:59`."""
    code = inspect.unwrap(function).__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"
