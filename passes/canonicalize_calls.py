"""One spelling for calls that mean the same.

    view(x, shape), _unsafe_view(x, shape), flatten, unflatten    ->    reshape(x, shape)
    split(x, n, dim)[i], split_with_sizes(x, sizes, dim)[i]        ->    slice(x, dim, start, end)
    slice(slice(x, d, a, b), d, c, e)                              ->    slice(x, d, a + c, a + e)
    to(x, dtype) of a value that has that dtype, alias(x), clone(x), x[0:all]  ->    x

Why: every later pattern is written once. A cast of a weight to the element type it is computed in
also goes: ops widen weights themselves.

Costs nothing in precision.
"""

import operator
from typing import Any

import torch

from lingc.graph import Value, tensor_type
from lingc.op import TORCH_DTYPE
from lingc.plan import TensorType
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite

aten = torch.ops.aten

OPEN_END = 2**62
"""What export writes for a slice without an end is at least this."""


def _fires(_match: Match, _context: Any) -> None:
    return None


def _axis(dim: int, kind: TensorType) -> int:
    return dim % len(kind.shape)


# ---------------------------------------------------------------------------------------- reshape


def _view(x: Value, shape: Value) -> Value:
    return aten.view.default(x, shape)


def _unsafe_view(x: Value, shape: Value) -> Value:
    return aten._unsafe_view.default(x, shape)


def _reshape(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    kind = tensor_type(match.outputs[0])
    return (build.call(aten.reshape.default, match["x"], match["shape"], type=kind),)


VIEWS = Rewrite(
    name="canonicalize_views", patterns=(_view, _unsafe_view), check=_fires, replacement=_reshape
)


# ------------------------------------------------------------------------------------------ slice


def _split(x: Value, size: Value, dim: Value, index: Value) -> Value:
    return operator.getitem(aten.split.Tensor(x, size, dim), index)


def _split_sizes(x: Value, size: Value, dim: Value, index: Value) -> Value:
    return operator.getitem(aten.split_with_sizes.default(x, size, dim), index)


def _as_slice(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    size, index = match["size"], match["index"]
    axis = _axis(match["dim"], match.type("x"))
    if isinstance(size, int):
        whole = match.type("x").shape[axis]
        assert isinstance(whole, int), "checked above"
        start, end = size * index, min(size * (index + 1), whole)
    else:
        start, end = sum(size[:index]), sum(size[: index + 1])
    return (build.slice(match["x"], axis, start, end),)


def _sizes_known(match: Match, _context: Any) -> str | None:
    size, kind = match["size"], match.type("x")
    known = all(isinstance(s, int) for s in (size if isinstance(size, list) else [size]))
    # The last of equal parts may be shorter, which shows where the whole is known.
    equal = isinstance(size, int) and isinstance(kind.shape[_axis(match["dim"], kind)], str)
    return "a split of symbolic size" if equal or not known else None


SPLITS = Rewrite(
    name="canonicalize_splits",
    patterns=(_split, _split_sizes),
    check=_sizes_known,
    replacement=_as_slice,
    shares=True,
)


def _nested(x: Value, dim: Value, a: Value, b: Value, dim2: Value, c: Value, e: Value) -> Value:
    return aten.slice.Tensor(aten.slice.Tensor(x, dim, a, b), dim2, c, e)


def _nests(match: Match, _context: Any) -> str | None:
    kind = match.type("x")
    numbers = all(isinstance(match[n], int) and match[n] >= 0 for n in ("a", "b", "c", "e"))
    same = _axis(match["dim"], kind) == _axis(match["dim2"], kind)
    known = isinstance(kind.shape[_axis(match["dim"], kind)], int)
    return None if numbers and same and known else NOT_MINE


def _one_slice(build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    kind = match.type("x")
    axis = _axis(match["dim"], kind)
    inner = min(kind.shape[axis], match["b"])
    end = min(match["a"] + match["e"], inner)
    return (build.slice(match["x"], axis, match["a"] + match["c"], end),)


NESTED = Rewrite(
    name="fold_nested_slices",
    patterns=(_nested,),
    check=_nests,
    replacement=_one_slice,
    shares=True,
    repeat=True,
)


# ----------------------------------------------------------------------------------------- no-ops


def _to(x: Value, dtype: Value) -> Value:
    return aten.to.dtype(x, dtype)


def _to_copy(x: Value, dtype: Value) -> Value:
    return aten._to_copy.default(x, dtype=dtype)


def _already(match: Match, _context: Any) -> str | None:
    if match.is_weight("x"):
        return None
    return None if TORCH_DTYPE[match.type("x").dtype] == match["dtype"] else NOT_MINE


def _itself(_build: Builder, match: Match, _context: Any) -> tuple[Value, ...]:
    return (match["x"],)


CASTS = Rewrite(
    name="drop_noop_casts", patterns=(_to, _to_copy), check=_already, replacement=_itself
)


def _slice(x: Value, dim: Value, start: Value, end: Value) -> Value:
    return aten.slice.Tensor(x, dim, start, end)


def _whole(match: Match, _context: Any) -> str | None:
    kind = match.type("x")
    size = kind.shape[_axis(match["dim"], kind)]
    start, end = match["start"], match["end"]
    open_end = end is None or (isinstance(end, int) and end >= OPEN_END)
    covers = open_end or (isinstance(end, int) and isinstance(size, int) and end >= size)
    return None if start in (0, None) and covers else NOT_MINE


SLICES = Rewrite(name="drop_whole_slices", patterns=(_slice,), check=_whole, replacement=_itself)


def _alias(x: Value) -> Value:
    return aten.alias.default(x)


def _clone(x: Value) -> Value:
    return aten.clone.default(x)


ALIASES = Rewrite(name="drop_aliases", patterns=(_alias, _clone), check=_fires, replacement=_itself)

RULES = (VIEWS, SPLITS, CASTS, ALIASES, SLICES, NESTED)
