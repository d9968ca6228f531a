"""Values of a network and the native layers that make them, each named after its step.

Only what both flavours have is used. Every layer carries the value of the plan that it is for in
its name, and op and place in the model in its metadata, which TensorRT keeps on what it fuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.plan import Step, TensorType
from lingc.runtime.tensorrt_plugin import DTYPE
from lingc.targets.tensorrt.backend import Backend

Array = NDArray[Any]

_CODES = "/codes"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the network and its type in the plan's words; sizes may be letters."""

    tensor: Any
    type: TensorType

    @property
    def dtype(self) -> str:
        return self.type.dtype

    @property
    def rank(self) -> int:
        return len(self.type.shape)


@dataclass(slots=True)
class Body:
    """A network in the making.

    Attributes:
        constants: Array behind each constant, by the layer's name; TensorRT reads them while it
            builds.
    """

    backend: Backend
    network: Any
    constants: dict[str, Array] = field(default_factory=dict)
    _stem: str = ""
    _note: str = ""
    _taken: dict[str, int] = field(default_factory=dict)

    def begin(self, step: Step) -> None:
        """Name the layers that follow after this step."""
        self._stem = step.outputs[0]
        self._note = f"{step.op} {step.source}"

    def named(self, layer: Any, what: str, of: str = "") -> Any:
        """Name a layer `<value>/<what>`, once more with a number where that is taken.

        Args:
            layer: Of the network.
            what: It does.
            of: What it is for is called, behind the value's name.
        """
        name = f"{self._stem}/{what}"
        seen = self._taken.get(name, 0)
        self._taken[name] = seen + 1
        layer.name = f"{name}.{seen}" if seen else name
        layer.metadata = f"{self._stem}{of} {self._note}"
        return layer

    def input(self, name: str, kind: TensorType) -> Value:
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in kind.shape)
        tensor = self.network.add_input(name, self._type(kind.dtype), shape)
        for axis, dim in enumerate(kind.shape):
            if isinstance(dim, str):
                tensor.set_dimension_name(axis, dim)  # sizes of one name are equal
        return Value(tensor, kind)

    def output(self, value: Value, name: str) -> None:
        """Return a value from the network under a name."""
        value.tensor.name = name
        self.network.mark_output(value.tensor)

    def constant(
        self, array: Array, dtype: str = "f32", shape: Sequence[int] | None = None, of: str = ""
    ) -> Value:
        """A constant; `int4` holds two numbers a byte, the first in the low nibble."""
        kept = np.ascontiguousarray(array)
        dims = kept.shape if shape is None else tuple(shape)
        count = int(np.prod(dims, dtype=np.int64))
        kind = self.backend.trt.DataType.INT4 if dtype == "int4" else self._type(dtype)
        weights = self.backend.trt.Weights(kind, kept.ctypes.data, count)
        layer = self.named(self.network.add_constant(dims, weights), "constant", of)
        self.constants[layer.name] = kept
        # In the plan's words there is no INT4; what it is stored in has its bits.
        return Value(layer.get_output(0), TensorType("u8" if dtype == "int4" else dtype, dims))

    def cast(self, x: Value, dtype: str) -> Value:
        if x.dtype == dtype:
            return x
        layer = self.named(self.network.add_cast(x.tensor, self._type(dtype)), f"to_{dtype}")
        return Value(layer.get_output(0), TensorType(dtype, x.type.shape))

    def add(self, x: Value, y: Value) -> Value:
        return self._elementwise(x, y, "SUM", "add")

    def mul(self, x: Value, y: Value) -> Value:
        return self._elementwise(x, y, "PROD", "mul")

    def div(self, x: Value, y: Value) -> Value:
        return self._elementwise(x, y, "DIV", "div")

    def sqrt(self, x: Value) -> Value:
        operation = self.backend.trt.UnaryOperation.SQRT
        layer = self.named(self.network.add_unary(x.tensor, operation), "sqrt")
        return Value(layer.get_output(0), x.type)

    def sigmoid(self, x: Value) -> Value:
        kind = self.backend.trt.ActivationType.SIGMOID
        layer = self.named(self.network.add_activation(x.tensor, kind), "sigmoid")
        return Value(layer.get_output(0), x.type)

    def mean(self, x: Value) -> Value:
        """Over the last axis, which stays."""
        operation, last = self.backend.trt.ReduceOperation.AVG, 1 << (x.rank - 1)
        layer = self.network.add_reduce(x.tensor, operation, last, True)  # noqa: FBT003
        shape = (*x.type.shape[:-1], 1)
        return Value(self.named(layer, "mean").get_output(0), TensorType(x.dtype, shape))

    def times(self, x: Value, weight: Value) -> Value:
        """The product x @ weight.T, rounded to their dtype."""
        none, turned = (
            getattr(self.backend.trt.MatrixOperation, name) for name in ("NONE", "TRANSPOSE")
        )
        layer = self.network.add_matrix_multiply(x.tensor, none, weight.tensor, turned)
        shape = (*x.type.shape[:-1], weight.type.shape[0])
        return Value(self.named(layer, "matmul").get_output(0), TensorType(x.dtype, shape))

    def rounded(self, x: Value, scale: Array, dtype: str) -> Value:
        """What E4M3 codes of x / scale stand for; to nearest even, saturating.

        TensorRT makes the codes once where several steps read them, in what stands in front, so
        they are for none of those steps: `<value>/codes`.
        """
        by = self.constant(scale, shape=(), of=_CODES).tensor
        layer = self.network.add_quantize(x.tensor, by, self._type("f8e4m3"))
        codes = self.named(layer, "quantize", of=_CODES).get_output(0)
        layer = self.network.add_dequantize(codes, by, self._type(dtype))
        made = self.named(layer, "rounded", of=_CODES).get_output(0)
        return Value(made, TensorType(dtype, x.type.shape))

    def dequantize(self, codes: Value, scale: Value, dtype: str) -> Value:
        kind = self._type(dtype)
        layer = self.network.add_dequantize(codes.tensor, scale.tensor, kind)
        made = TensorType(dtype, codes.type.shape)
        return Value(self.named(layer, "dequantize").get_output(0), made)

    def rows(self, table: Value, ids: Value) -> Value:
        """Rows of a table by their numbers."""
        mode = self.backend.trt.GatherMode.DEFAULT
        layer = self.named(self.network.add_gather_v2(table.tensor, ids.tensor, mode), "gather")
        layer.axis = 0
        shape = (*ids.type.shape, *table.type.shape[1:])
        return Value(layer.get_output(0), TensorType(table.dtype, shape))

    def concat(self, values: Sequence[Value], axis: int, kind: TensorType) -> Value:
        layer = self.network.add_concatenation([one.tensor for one in values])
        self.named(layer, "concat").axis = axis
        return Value(layer.get_output(0), kind)

    def reshape(self, x: Value, shape: Sequence[int], kind: TensorType) -> Value:
        """Reshape; one size may be -1."""
        layer = self.named(self.network.add_shuffle(x.tensor), "reshape")
        layer.reshape_dims = tuple(shape)
        return Value(layer.get_output(0), kind)

    def columns(self, x: Value, start: int, kind: TensorType) -> Value:
        """Some columns of [T, D], T open."""
        shape = self.named(self.network.add_shape(x.tensor), "shape").get_output(0)
        tokens = self.named(self.network.add_slice(shape, (0,), (1,), (1,)), "tokens")
        width = self.constant(np.array([kind.shape[-1]], np.int64), "i64")
        size = self.network.add_concatenation([tokens.get_output(0), width.tensor])
        self.named(size, "size").axis = 0
        layer = self.network.add_slice(x.tensor, (0, start), (0, 0), (1, 1))
        self.named(layer, "slice").set_input(2, size.get_output(0))
        return Value(layer.get_output(0), kind)

    def _elementwise(self, x: Value, y: Value, operation: str, what: str) -> Value:
        kind = getattr(self.backend.trt.ElementWiseOperation, operation)
        layer = self.named(self.network.add_elementwise(x.tensor, y.tensor, kind), what)
        wide = x if x.rank >= y.rank and 1 not in x.type.shape else y
        return Value(layer.get_output(0), TensorType(x.dtype, wide.type.shape))

    def _type(self, dtype: str) -> Any:
        return getattr(self.backend.trt.DataType, DTYPE[dtype])
