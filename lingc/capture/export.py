"""One block through `torch.export` on the meta device, with named axes."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from lingc.capture import blocks
from lingc.errors import StageError
from lingc.model import linear_attention, mla, moe, rope
from lingc.model import norm as model_norm
from lingc.op import DTYPE_NAME, TORCH_DTYPE
from lingc.plan import TensorType

# Example sizes: distinct, and neither 0 nor 1, which torch.export would specialise.
EXAMPLE = {"T": 14, "B": 7, "S": 9, "R": 11, "P": 5, "N": 3}
MOST_TOKENS = 1 << 20

ROOT = Path(__file__).parents[1]
FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+)')

SIZES: Mapping[str, Any] = {
    "T": Dim("T", min=2, max=MOST_TOKENS),
    "B": Dim("B", min=2, max=1 << 16),
    "S": Dim("S", min=2, max=1 << 16),
    "R": Dim("R", min=2, max=1 << 30),
    "P": Dim("P", min=2, max=1 << 16),
    "N": Dim("N", min=2, max=MOST_TOKENS),
}
DIMS: Mapping[str, Any] = {**SIZES, "B+1": SIZES["B"] + 1}


def _is_type(value: Any) -> bool:
    return isinstance(value, TensorType)


def example(types: Any) -> Any:
    """Example tensors of the types, in the same structure."""
    sizes = {**EXAMPLE, "B+1": EXAMPLE["B"] + 1}

    def made(kind: TensorType) -> Tensor:
        return torch.empty(kind.bind(sizes), dtype=TORCH_DTYPE[kind.dtype], device="meta")

    return torch.utils._pytree.tree_map(made, types, is_leaf=_is_type)


def _dynamic(kind: TensorType) -> dict[int, Any]:
    return {i: DIMS[d] for i, d in enumerate(kind.shape) if isinstance(d, str)}


def _keep_model_lines() -> None:
    """Have torch record the model's and the blocks' lines, not only those of `forward`.

    Only for messages: where this torch has no such registration, the line is that of `forward`.
    """
    register = getattr(torch.fx.proxy, "_register_stack_trace_anchor", None)
    if register is None:
        return
    for module in (blocks, linear_attention, mla, model_norm, moe, rope):
        for thing in vars(module).values():
            if inspect.isfunction(thing):
                register(thing)
            elif inspect.isclass(thing):
                for method in vars(thing).values():
                    if inspect.isfunction(method):
                        register(method)


_keep_model_lines()


@dataclass(frozen=True, slots=True)
class Piece:
    """An exported block: its graph and what its placeholders are.

    Attributes:
        graph: Functional ATen.
        sources: Placeholder -> `("parameter" | "buffer" | "argument", name or flat index)`.
    """

    graph: fx.Graph
    sources: Mapping[fx.Node, tuple[str, Any]]


def export_block(module: nn.Module, types: tuple[Any, ...], what: str) -> Piece:
    """Export one block, with named axes.

    Args:
        module: On the meta device.
        types: Of the arguments of its `forward`, possibly nested.
        what: Name of the block, for messages.

    Raises:
        StageError: `torch.export` cannot say the block as functional ATen.
    """
    spec = torch.utils._pytree.tree_map(_dynamic, types, is_leaf=_is_type)
    try:
        with torch.device("meta"):
            exported = torch.export.export(
                module, example(types), dynamic_shapes=spec, strict=False
            )
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise StageError(f"block {what!r} cannot be captured: {error}") from error
    flat = torch.utils._pytree.tree_leaves(types, is_leaf=_is_type)
    sources: dict[fx.Node, tuple[str, Any]] = {}
    names: dict[Any, Any] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    position = 0
    for node, given in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        kind = given.kind.name
        if kind == "USER_INPUT":
            sources[node] = ("argument", position)
            _name_axes(node, flat[position], names)
            position += 1
        elif kind in ("PARAMETER", "BUFFER"):
            sources[node] = (kind.lower(), given.target)
        else:
            raise StageError(f"block {what!r} lifts {given.target!r} as {kind.lower()}")
    for node in exported.graph.nodes:
        if "val" in node.meta:
            node.meta["type"] = _typed(node.meta["val"], names)
        node.meta["source"] = _source(node)
    return Piece(exported.graph, sources)


def _name_axes(node: fx.Node, kind: TensorType, names: dict[Any, Any]) -> None:
    for size, name in zip(node.meta["val"].shape, kind.shape, strict=True):
        if isinstance(name, str) and name != "B+1":
            names[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)


def _typed(value: Any, names: Mapping[Any, Any]) -> Any:
    """The named type of a fake value: a tensor, several, or a size."""
    if isinstance(value, Tensor):
        return TensorType(DTYPE_NAME[value.dtype], tuple(_dim(s, names) for s in value.shape))
    if isinstance(value, list | tuple):
        return tuple(_typed(item, names) for item in value)
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return _dim(value, names)
    return value


def _dim(size: Any, names: Mapping[Any, Any]) -> int | str:
    if isinstance(size, int):
        return size
    return str(size.node.expr.xreplace(names)).replace(" ", "")


def _source(node: fx.Node) -> str:
    """The innermost line of the model or of a block: `mla.py:87`."""
    trace: str = node.meta.get("stack_trace") or ""
    ours = [found for found in FRAME.finditer(trace) if found["path"].startswith(f"{ROOT}/")]
    return f"{Path(ours[-1]['path']).name}:{ours[-1]['line']}" if ours else ""
