"""Steps that are ATen's own: views, copies and a sum."""

from collections.abc import Callable, Mapping
from typing import Any

from lingc.errors import UnsupportedError
from lingc.plan import Size, Step, TensorType
from lingc.targets.tensorrt.body import Body, Value


def _slice(body: Body, kind: TensorType, x: Value, dim: int, start: Any, _end: Any) -> Value:
    if dim != 1 or x.rank != 2:
        raise UnsupportedError(f"a slice of axis {dim} of {x.type} has no form in TensorRT engines")
    return body.columns(x, start or 0, kind)


def _cat(body: Body, kind: TensorType, tensors: tuple[Value, ...], dim: int = 0) -> Value:
    return body.concat(tensors, dim % len(kind.shape), kind)


def _index_select(body: Body, _kind: TensorType, x: Value, dim: int, index: Value) -> Value:
    if dim:
        raise UnsupportedError(f"rows along axis {dim} have no form in TensorRT engines")
    return body.rows(x, index)


def _add(body: Body, _kind: TensorType, x: Value, y: Value) -> Value:
    return body.add(x, y)


def _reshape(body: Body, kind: TensorType, x: Value, shape: tuple[Any, ...]) -> Value:
    sizes = [-1 if isinstance(size, Size) else size for size in shape]
    if sizes.count(-1) > 1:
        raise UnsupportedError(f"a reshape to {kind} has more than one open size")
    return body.reshape(x, sizes, kind)


VIEWS: Mapping[str, Callable[..., Value]] = {
    "aten.slice.Tensor": _slice,
    "aten.cat.default": _cat,
    "aten.index_select.default": _index_select,
    "aten.add.Tensor": _add,
    "aten.reshape.default": _reshape,
}
"""Op of a step -> what makes it of the body, the result's type and the arguments."""


def is_view(step: Step) -> bool:
    return step.op in VIEWS
