"""Runs a built network in torch, layer by layer: what a lowering computes, where no engine can run.

The network is walked as TensorRT was given it, through its own layers and tensors; only plugins are
replaced, by the references of their ops. It is run once without rounding, every float in f64, so
that the lowering's maths can be held to eager's; and once with every tensor rounded to the type
that the network declares for it, as an engine rounds at the least.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingc.errors import StageError
from lingc.interpret import InterpreterBackend
from lingc.math import E4M3_MAX
from lingc.op import OPS
from lingc.plan import Plan
from lingc.runtime.backend import Limits
from lingc.runtime.tensorrt_plugin import OpPlugin
from lingc.targets.tensorrt.lower import Network

Array = NDArray[Any]

_TORCH = {
    "FLOAT": torch.float32,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "INT4": torch.int8,
}
"""How a value of each of TensorRT's types is held; INT4 a number a byte."""


class Walk:
    """A network as a function of its inputs.

    Args:
        made: The network.
        trt: The module that made it.
        rounded: Whether values are rounded to their declared types.
    """

    def __init__(self, made: Network, trt: Any, *, rounded: bool) -> None:
        self._trt = trt
        self._made = made
        self._rounded = rounded
        self._layers = _ordered(made.network)
        self._constants: dict[str, Tensor] = {}

    @property
    def layers(self) -> Sequence[Any]:
        """Those that an output hangs on, in the order of running."""
        return self._layers

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name.

        Raises:
            StageError: A layer that has no reference, or one that fails.
        """
        network = self._made.network
        values: dict[str, Tensor] = {}
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            values[tensor.name] = self._held(inputs[tensor.name], tensor)
        for layer in self._layers:
            given = [_named(values, layer.get_input(i)) for i in range(layer.num_inputs)]
            try:
                results = self._run(layer, given)
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                raise StageError(f"layer {layer.name!r} failed: {error}") from error
            for i, result in enumerate(results):
                values[layer.get_output(i).name] = self._held(result, layer.get_output(i))
        outputs = (network.get_output(i) for i in range(network.num_outputs))
        return {tensor.name: values[tensor.name] for tensor in outputs}

    def _held(self, value: Tensor, tensor: Any) -> Tensor:
        """A value as its tensor declares it, or widened."""
        dtype = _TORCH[tensor.dtype.name]
        is_float = dtype in (torch.bfloat16, torch.float32)
        return value.to(torch.float64 if is_float and not self._rounded else dtype)

    def _run(self, layer: Any, given: Sequence[Tensor | None]) -> Sequence[Tensor]:
        # Casting a layer to its class below hides this attribute in some classes.
        kind = self._trt.ILayer.type.fget(layer).name
        if kind == "PLUGIN_V3":
            return self._plugin(self._made.plugins[layer.name], [x for x in given if x is not None])
        if kind == "CONSTANT":
            layer.__class__ = self._trt.IConstantLayer
            if layer.name not in self._constants:
                kept = self._made.body.constants[layer.name]
                self._constants[layer.name] = _constant(layer, kept)
            return [self._constants[layer.name]]
        if kind not in _LAYERS:
            raise StageError(f"layer {layer.name!r} is a {kind}, which this walk does not know")
        class_name, run = _LAYERS[kind]
        layer.__class__ = getattr(self._trt, class_name)
        return [run(layer, *given)]

    def _plugin(self, plugin: OpPlugin, given: Sequence[Tensor]) -> Sequence[Tensor]:
        call, op = plugin.call, OPS[plugin.call.op]
        tensors = dict(zip((name for name, _, _ in call.inputs), given, strict=True))
        arguments = []
        for name in op.arguments:
            value = tensors[name] if name in tensors else call.literals[name]
            # A literal that names the element type of a result.
            arguments.append("f64" if value == "bf16" and not self._rounded else value)
        made = op.reference(*arguments)
        return [made] if isinstance(made, Tensor) else list(made)


def _ordered(network: Any) -> list[Any]:
    """Layers that outputs hang on, each behind what it reads.

    In a network's own order seeded plugins come first.
    """
    makers = {}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for k in range(layer.num_outputs):
            makers[layer.get_output(k).name] = layer
    ordered, seen = [], set[str]()
    waiting = [(network.get_output(i).name, False) for i in range(network.num_outputs)]
    while waiting:
        name, ready = waiting.pop()
        layer = makers.get(name)
        if layer is None or (layer.name in seen and not ready):
            continue
        if ready:
            ordered.append(layer)
            continue
        seen.add(layer.name)
        waiting.append((name, True))
        inputs = (layer.get_input(i) for i in range(layer.num_inputs))
        waiting += [(tensor.name, False) for tensor in inputs if tensor is not None]
    return ordered


def _named(values: Mapping[str, Tensor], tensor: Any) -> Tensor | None:
    return None if tensor is None else values[tensor.name]


# ---------------------------------------------------------------------------------- native layers


def _constant(layer: Any, kept: Array) -> Tensor:
    """What a constant holds; the bindings give back no numbers that NumPy has no type for."""
    shape, kind = tuple(layer.shape), layer.get_output(0).dtype.name
    if kind == "INT4":
        count = int(np.prod(shape, dtype=np.int64))
        nibbles = np.stack((kept & 15, kept >> 4), -1).reshape(-1)[:count].astype(np.int8)
        return torch.from_numpy(np.where(nibbles > 7, nibbles - 16, nibbles)).reshape(shape)
    if kind in ("BF16", "FP8"):
        raw = torch.from_numpy(kept.reshape(-1).view(np.uint8).copy())
        return raw.view(_TORCH[kind]).reshape(shape)
    return torch.from_numpy(kept.copy()).reshape(shape)


def _cast(_layer: Any, x: Tensor) -> Tensor:
    return x  # what it is held in says the rest


def _elementwise(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    known: Mapping[str, Any] = {
        "SUM": torch.add, "PROD": torch.mul, "DIV": torch.div, "SUB": torch.sub,
    }  # fmt: skip
    made: Tensor = known[layer.op.name](_wide(x), _wide(y))
    return made


def _unary(layer: Any, x: Tensor) -> Tensor:
    return {"SQRT": torch.sqrt, "EXP": torch.exp, "RECIP": torch.reciprocal}[layer.op.name](
        _wide(x)
    )


def _activation(layer: Any, x: Tensor) -> Tensor:
    return {"SIGMOID": torch.sigmoid, "RELU": torch.relu}[layer.type.name](_wide(x))


def _reduce(layer: Any, x: Tensor) -> Tensor:
    axes = [i for i in range(x.dim()) if layer.axes >> i & 1]
    run = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax}[layer.op.name]
    return run(_wide(x), axes, keepdim=layer.keep_dims)  # type: ignore[operator,no-any-return]


def _matmul(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    left, right = (
        value.transpose(-1, -2) if operation.name == "TRANSPOSE" else value
        for value, operation in ((_wide(x), layer.op0), (_wide(y), layer.op1))
    )
    return left @ right


def _shuffle(layer: Any, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = list(layer.reshape_dims) if shape is None else shape.tolist()
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _slice(layer: Any, x: Tensor, *given: Tensor | None) -> Tensor:
    start, size, stride = (
        list(static) if more is None else more.tolist()
        for static, more in zip(
            (layer.start, layer.shape, layer.stride), (*given, None, None, None)[:3], strict=True
        )
    )
    ends = (a + (n - 1) * b + 1 for a, n, b in zip(start, size, stride, strict=True))
    return x[tuple(slice(*one) for one in zip(start, ends, stride, strict=True))]


def _gather(layer: Any, x: Tensor, ids: Tensor) -> Tensor:
    made = x.index_select(layer.axis, ids.reshape(-1).long())
    return made.reshape(*x.shape[: layer.axis], *ids.shape, *x.shape[layer.axis + 1 :])


def _concat(layer: Any, *given: Tensor) -> Tensor:
    return torch.cat(given, layer.axis)


def _shape(_layer: Any, x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def _dequantize(_layer: Any, codes: Tensor, scale: Tensor) -> Tensor:
    wide, by = _wide(codes.to(scale.dtype)), _wide(scale)
    for axis, size in enumerate(by.shape):
        if size not in (1, wide.shape[axis]):
            by = by.repeat_interleave(wide.shape[axis] // size, axis)
    return wide * by


def _quantize(_layer: Any, x: Tensor, scale: Tensor) -> Tensor:
    # In f32 also where nothing is rounded, as ops do: ties must not hang on the division.
    ratio = (x.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX)
    return ratio.to(torch.float8_e4m3fn)


def _wide(x: Tensor) -> Tensor:
    """At least f32, where it is a float."""
    return x.float() if x.is_floating_point() and x.dtype != torch.float64 else x


_LAYERS: Mapping[str, tuple[str, Callable[..., Tensor]]] = {
    "CAST": ("ICastLayer", _cast),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "REDUCE": ("IReduceLayer", _reduce),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "GATHER": ("IGatherLayer", _gather),
    "CONCATENATION": ("IConcatenationLayer", _concat),
    "SHAPE": ("IShapeLayer", _shape),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
}
"""Type of a layer -> its class, which its attributes are read by, and what it does."""


class NetworkBackend(InterpreterBackend):
    """A plan's networks as a runtime backend; `InterpreterBackend` holds weights and states.

    Args:
        plan: What the networks were lowered from.
        networks: By phase.
        trt: The module that made them.
        weights: As for `InterpreterBackend`.
        limits: How many slots and pages of state to hold.
        rounded: Whether every tensor is rounded to its declared type.
    """

    def __init__(
        self,
        plan: Plan,
        networks: Mapping[str, Network],
        trt: Any,
        weights: Mapping[str, Array],
        limits: Limits,
        *,
        rounded: bool,
    ) -> None:
        super().__init__(plan, weights, limits)
        self._walks = {phase: Walk(one, trt, rounded=rounded) for phase, one in networks.items()}
        if not rounded:
            for held in (self.states, self.weights):
                for name, value in held.items():
                    if value.dtype in (torch.bfloat16, torch.float32):
                        held[name] = value.double()

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        program = self.plan.programs[phase]
        given = {name: torch.from_numpy(np.asarray(inputs[name])) for name in program.inputs}
        given |= {name: self.states[name] for name in program.states}
        given |= {name: self.weights[name] for name in program.weights}
        made = self._walks[phase](given)
        for state, name in program.updates.items():
            self.states[state] = made[name]
        return {role: _wide(made[name]).numpy().copy() for role, name in program.outputs.items()}
