"""Writes the nodes of a function or graph, as expressions of Python.

    y = x * (x.cast("f32") + 1.0)

A `Value` is the name of a result in the `Body` that makes it. Python numbers and arrays among the
inputs become constants. Nodes that no output needs are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from lingc.errors import UnsupportedError

OPSET = 23
CONTRIB = "com.microsoft"
LINGC = "lingc"

ONNX_DTYPE: Mapping[str, int] = {
    "f64": TensorProto.DOUBLE,
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "f8e4m3": TensorProto.FLOAT8E4M3FN,
    "i64": TensorProto.INT64,
    "i32": TensorProto.INT32,
    "u8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}

LAST = (1 << 63) - 1
"""The end of an axis, for `Slice`."""

Operand = Union["Value", int, float, NDArray[Any], None]
Attributes = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Value:
    """A result.

    Attributes:
        name: Its name in the body.
        body: Where nodes that read it go.
        dtype: Element type, of an argument; empty for what is computed.
        shape: Sizes of an argument, symbolic ones as names.
    """

    name: str
    body: "Body" = field(repr=False, compare=False)
    dtype: str = ""
    shape: tuple[int | str, ...] = ()

    def size(self, axis: int) -> int:
        """The size of an argument's axis, which must be a number."""
        size = self.shape[axis]
        if isinstance(size, str):
            raise UnsupportedError(f"axis {axis} of {self.name!r} has the open size {size!r}")
        return size

    def __add__(self, other: Operand) -> "Value":
        return self.body.op("Add", self, other)

    def __sub__(self, other: Operand) -> "Value":
        return self.body.op("Sub", self, other)

    def __rsub__(self, other: Operand) -> "Value":
        return self.body.op("Sub", other, self)

    def __mul__(self, other: Operand) -> "Value":
        return self.body.op("Mul", self, other)

    def __truediv__(self, other: Operand) -> "Value":
        return self.body.op("Div", self, other)

    def __neg__(self) -> "Value":
        return self.body.op("Neg", self)

    def __matmul__(self, other: "Value") -> "Value":
        return self.body.op("MatMul", self, other)

    def cast(self, dtype: str) -> "Value":
        if self.dtype == dtype:
            return self
        made = self.body.op("Cast", self, attrs={"to": ONNX_DTYPE[dtype]})
        return Value(made.name, self.body, dtype, self.shape)

    def reshape(self, *sizes: "int | Value") -> "Value":
        """Reshape; 0 keeps an axis, -1 takes the rest, a `Value` is a shape's part."""
        return self.body.op("Reshape", self, self.body.sizes(sizes))

    def transpose(self, *axes: int) -> "Value":
        return self.body.op("Transpose", self, attrs={"perm": axes})

    def unsqueeze(self, *axes: int) -> "Value":
        return self.body.op("Unsqueeze", self, self.body.ints(axes))

    def squeeze(self, *axes: int) -> "Value":
        return self.body.op("Squeeze", self, self.body.ints(axes))

    def gather(self, rows: Operand, axis: int = 0) -> "Value":
        return self.body.op("Gather", self, rows, attrs={"axis": axis})

    def slice(self, axis: int, start: int, end: int = LAST) -> "Value":
        ints = self.body.ints
        return self.body.op("Slice", self, ints([start]), ints([end]), ints([axis]))

    def split(self, axis: int, sizes: Sequence[int]) -> list["Value"]:
        if len(sizes) == 1:
            return [self]
        given = self.body.ints(sizes)
        return self.body.ops("Split", len(sizes), self, given, attrs={"axis": axis})

    def sum(self, *axes: int, keep: bool = False) -> "Value":
        given = self.body.ints(axes)
        return self.body.op("ReduceSum", self, given, attrs={"keepdims": int(keep)})

    def max(self, axis: int, *, keep: bool = False) -> "Value":
        axes = self.body.ints([axis])
        return self.body.op("ReduceMax", self, axes, attrs={"keepdims": int(keep)})

    def length(self, axis: int) -> "Value":
        """Size of an axis, as a shape of one entry."""
        return self.body.op("Shape", self, attrs={"start": axis, "end": axis + 1})


class Body:
    """Nodes in the making.

    Args:
        prefix: Begins the name of every result that is not named otherwise.
    """

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[NodeProto] = []
        self._prefix = prefix
        self._named = 0
        self._published: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    def op(self, kind: str, *inputs: Operand, attrs: Attributes | None = None) -> Value:
        """The one result of a node; `com.microsoft::MoE` names another domain."""
        return self.ops(kind, 1, *inputs, attrs=attrs)[0]

    def ops(
        self, kind: str, count: int, *inputs: Operand, attrs: Attributes | None = None
    ) -> list[Value]:
        """The results of a node with several."""
        names = [f"{self._prefix}{self._named + i}" for i in range(count)]
        self._named += count
        self.node(kind, inputs, names, attrs=attrs)
        return [Value(name, self) for name in names]

    def node(
        self,
        kind: str,
        inputs: Sequence[Operand],
        outputs: Sequence[str],
        *,
        overload: str = "",
        attrs: Attributes | None = None,
    ) -> None:
        """Add a node whose results have given names; an empty name is a result left out."""
        domain, _, op_type = kind.rpartition("::")
        given = ["" if x is None else self.value(x).name for x in inputs]
        while given and not given[-1]:
            given.pop()
        node = helper.make_node(op_type, given, list(outputs), domain=domain)
        node.overload = overload
        # make_node skips what is falsy; sorted, so that the bytes do not hang on an argument order.
        for key in sorted(attrs or {}):
            node.attribute.append(_attribute(key, (attrs or {})[key]))
        self.nodes.append(node)

    def value(self, given: Operand) -> Value:
        """`given`, a number or array as a constant."""
        match given:
            case Value():
                return given
            case int():
                return self._constant(np.asarray(given, np.int64))
            case float():
                return self._constant(np.asarray(given, np.float32))
            case np.ndarray():
                return self._constant(given)
        raise TypeError(f"{given!r} is no operand")

    def ints(self, values: Sequence[int]) -> Value:
        return self._constant(np.asarray(values, np.int64))

    def floats(self, values: Sequence[float]) -> Value:
        return self._constant(np.asarray(values, np.float32))

    def sizes(self, sizes: Sequence[int | Value]) -> Value:
        """A shape of numbers and of parts of other shapes."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints([size for size in sizes if isinstance(size, int)])
        parts = [self.ints([size]) if isinstance(size, int) else size for size in sizes]
        return self.concat(parts, 0)

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        if len(values) == 1:
            return values[0]
        return self.op("Concat", *values, attrs={"axis": axis})

    def where(self, condition: Value, yes: Operand, no: Operand) -> Value:
        return self.op("Where", condition, yes, no)

    def count_to(self, length: Value) -> Value:
        """0, 1, … below `length`, a shape of one entry."""
        return self.op("Range", 0, length.squeeze(0), 1)

    def full(self, shape: Value, value: NDArray[Any]) -> Value:
        tensor = numpy_helper.from_array(value.reshape(1))
        return self.op("ConstantOfShape", shape, attrs={"value": tensor})

    def publish(self, value: Value, name: str) -> None:
        """Give a result another name, that of an output."""
        made = [node for node in self.nodes if value.name in node.output]
        if not made or name in self._published.values() or value.name in self._published.values():
            self.node("Identity", [value], [name])
            return
        self._published[value.name] = name
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, known in enumerate(names):
                    if known == value.name:
                        names[i] = name

    def needed(self, outputs: Sequence[str]) -> list[NodeProto]:
        """The nodes that `outputs` hang on, in order."""
        wanted, kept = set(outputs), list[NodeProto]()
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def _constant(self, array: NDArray[Any]) -> Value:
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            tensor = numpy_helper.from_array(np.asarray(array, order="C"))
            self._constants[key] = self.op("Constant", attrs={"value": tensor})
        return self._constants[key]


def _attribute(key: str, value: Any) -> AttributeProto:
    if isinstance(value, tuple | list) and all(isinstance(item, int) for item in value):
        return helper.make_attribute(key, list(value), attr_type=AttributeProto.INTS)
    if isinstance(value, tuple | list):
        return helper.make_attribute(key, list(value), attr_type=AttributeProto.FLOATS)
    return helper.make_attribute(key, int(value) if isinstance(value, bool) else value)
