"""One program of a plan as a graph of own-domain nodes, with the functions that define them."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from onnx import FunctionProto, GraphProto, ValueInfoProto, helper

from lingc.errors import UnsupportedError
from lingc.plan import Arg, Program, Ref, Size, Step, TensorType
from lingc.runtime.onnx_weights import Initializer
from lingc.targets.onnx.body import LAST, LINGC, ONNX_DTYPE, Body, Value
from lingc.targets.onnx.functions import FUNCTIONS
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.weights import Weights

FEW_TOKENS = frozenset({"decode", "verify"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model to make of a program.

    Attributes:
        name: Its name.
        phase: The program's phase.
        settled: For steps of decode in which every sequence goes on and none has accepted tokens to
            commit: what decoding without drafts always is. Such a model has fewer nodes: it is
            given the linear states of the sequences alone, in their order, and updates them whole.
        sizes: Open sizes that are fixed.
    """

    name: str
    phase: str
    settled: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


ONE_SEQUENCE = {"B": 1, "B+1": 2}

MORE_MODELS = (
    Model(name="prefill_one", phase="prefill", sizes=ONE_SEQUENCE),
    Model(name="decode_settled", phase="decode", settled=True),
    Model(name="decode_one", phase="decode", settled=True, sizes=ONE_SEQUENCE),
)
"""Models beside the general one of each phase. Those of one sequence need no padding."""


class Phase:
    """A model in the making.

    Args:
        model: Which one.
        program: The program of its phase.
        library: What its functions are written in.
        weights: The weights of all models.

    Attributes:
        functions: By op and by what its arguments are, in order of first use.
        initializers: The weights that the nodes read, in order of first use.
    """

    def __init__(
        self, model: Model, program: Program, library: type[Standard], weights: Weights
    ) -> None:
        self.functions: dict[tuple[Any, ...], FunctionProto] = {}
        self.initializers: dict[str, Initializer] = {}
        self._model = model
        self._program = program
        self._library = library
        self._weights = weights
        self._body = Body(prefix=f"{LINGC}.")
        self._views: Mapping[str, Callable[..., Value]] = {
            "aten.slice.Tensor": self._slice,
            "aten.cat.default": self._cat,
            "aten.index_select.default": self._index_select,
            "aten.add.Tensor": self._add,
            "aten.reshape.default": self._reshape,
        }

    def graph(self) -> GraphProto:
        """The graph, without its initializers."""
        program = self._program
        for step in program.steps:
            view = self._views.get(step.op)
            if view is not None:
                self._body.publish(view(*step.args), step.outputs[0])
            else:
                self._fused(step)
        # In the order of their keys, which survives JSON.
        returned = [program.outputs[role] for role in sorted(program.outputs)]
        updated = [program.updates[state] for state in sorted(program.updates)]
        named = list(dict.fromkeys((*returned, *updated)))
        inputs = [self._declared(n) for n in (*program.inputs, *program.states)]
        outputs = [self._declared(n) for n in named]
        return helper.make_graph(self._body.needed(named), self._model.name, inputs, outputs)

    def _declared(self, name: str) -> ValueInfoProto:
        found = self._type(name)
        return helper.make_tensor_value_info(name, ONNX_DTYPE[found.dtype], found.shape)

    def _type(self, name: str) -> TensorType:
        """Type of a value, as this model has it."""
        dtype, shape = self._program.types[name].dtype, self._program.types[name].shape
        if self._model.settled and name in {*_slot_states(self._program)}:
            shape = ("B", *shape[1:])
        sizes = self._model.sizes
        return TensorType(dtype, tuple(sizes.get(s, s) if isinstance(s, str) else s for s in shape))

    def _fused(self, step: Step) -> None:
        op = step.op.removeprefix(f"{LINGC}.")
        if op not in FUNCTIONS:
            raise UnsupportedError(
                f"op {step.op!r} of layer {step.layer} has no ONNX form",
                hint="the plan was made for another engine kind",
            )
        parameters = list(inspect.signature(FUNCTIONS[op]).parameters.values())[1:]
        given = {p.name: arg for p, arg in zip(parameters, step.args, strict=True)}
        tensors = [p.name for p in parameters if _is_tensor(p)]
        inputs = self._tensors(op, {name: given[name] for name in tensors})
        proto = self._function(op, given | inputs, tensors)
        self._body.node(
            f"{LINGC}::{op}",
            list(inputs.values()),
            step.outputs,
            overload=proto.overload,
            attrs={n.lstrip("_"): arg for n, arg in given.items() if n not in tensors},
        )

    def _function(
        self, op: str, values: Mapping[str, Any], tensors: Sequence[str]
    ) -> FunctionProto:
        """The function for tensors of these types and for these literals; made once."""
        key = (op, *((name, _kind(value)) for name, value in values.items()))
        if key in self.functions:
            return self.functions[key]
        body = Body()
        library = self._library(
            body,
            few_tokens=self._model.phase in FEW_TOKENS,
            many_tokens=self._model.phase == "prefill",
            single=self._model.phase == "decode",
            settled=self._model.settled,
        )
        formal = (
            replace(value, name=name, body=body) if isinstance(value, Value) else value
            for name, value in values.items()
        )
        returned = FUNCTIONS[op](library, *formal)
        results = returned if isinstance(returned, tuple) else (returned,)
        outputs = [f"out{i}" for i in range(len(results))]
        for value, name in zip(results, outputs, strict=True):
            body.publish(value, name)
        same = sum(known.name == op for known in self.functions.values())
        self.functions[key] = helper.make_function(
            LINGC,
            op,
            list(tensors),
            outputs,
            body.needed(outputs),
            [helper.make_opsetid(*domain) for domain in library.domains],
            attributes=[name.lstrip("_") for name in values if name not in tensors],
            overload=str(same) if same else "",
        )
        return self.functions[key]

    def _tensors(self, op: str, given: Mapping[str, Arg]) -> dict[str, Value | None]:
        """What the tensors among a step's arguments are in the graph."""
        names = {argument: ref.name for argument, ref in given.items() if isinstance(ref, Ref)}
        weights = {argument: name for argument, name in names.items() if name in self._weights}
        bound = self._weights.bound(op, weights)
        values: dict[str, Value | None] = dict.fromkeys(given)
        for argument, name in names.items():
            made = bound.get(argument)
            if made is not None:
                self.initializers[made.name] = made
                values[argument] = Value(made.name, self._body, made.dtype, made.shape)
            elif argument not in bound:
                values[argument] = self._computed(name)
        return values

    def _computed(self, name: str) -> Value:
        found = self._type(name)
        return Value(name, self._body, found.dtype, found.shape)

    # -------------------------------------------------------------------------- ATen: views, copies

    def _operand(self, ref: Arg) -> Value:
        value = self._tensors("aten", {"tensor": ref})["tensor"]
        assert value is not None, f"{ref!r} is no tensor"
        return value

    def _slice(self, x: Arg, dim: int, start: int | None, end: Arg) -> Value:
        # An end that is a symbolic size is the end of the axis.
        last = end if isinstance(end, int) else LAST
        return self._operand(x).slice(dim, start or 0, last)

    def _cat(self, tensors: Sequence[Arg], dim: int = 0) -> Value:
        return self._body.concat([self._operand(x) for x in tensors], dim)

    def _index_select(self, x: Arg, dim: int, index: Arg) -> Value:
        return self._operand(x).gather(self._operand(index), axis=dim)

    def _add(self, x: Arg, y: Arg) -> Value:
        return self._operand(x) + self._operand(y)

    def _reshape(self, x: Arg, shape: Sequence[int | Size]) -> Value:
        value = self._operand(x)
        sizes: list[int | Value] = []
        for size in shape:
            if isinstance(size, int):
                sizes.append(size)
            elif -1 not in sizes and sum(isinstance(s, Size) for s in shape) == 1:
                sizes.append(-1)
            else:
                sizes.append(self._size(size.name))
        return value.reshape(*sizes)

    def _size(self, symbol: str) -> Value:
        """A symbolic size, read off an input that has it."""
        for name in (*self._program.inputs, *self._program.states):
            shape = self._program.types[name].shape
            if symbol in shape:
                return self._computed(name).length(shape.index(symbol))
        raise UnsupportedError(f"no input has the size {symbol!r} that a reshape asks for")


def _is_tensor(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is Value or Value in get_args(parameter.annotation)


def _kind(value: Any) -> Any:
    """What of an argument a function depends on."""
    return (value.dtype, value.shape) if isinstance(value, Value) else value


def _slot_states(program: Program) -> Iterator[str]:
    """States of slots that the program updates, and what they are updated to."""
    for state, updated in program.updates.items():
        if program.types[state].shape[0] == "S":
            yield from (state, updated)
