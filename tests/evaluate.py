"""Run a program's graph, in any stage, on tensors: what a rewrite must leave as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from lingc.checkpoint import SyntheticCheckpoint
from lingc.compare import assert_close
from lingc.graph import Program, target_name
from lingc.interpret import stored_tensor
from lingc.op import OPS, TORCH_DTYPE, Mechanism
from lingc.plan import TensorType, WeightSpec
from lingc.samples import Samples
from lingc.weights import materialize
from tests.programs import SIZES, config, copy

LENGTHS = {"prefill": (5, 3, 2), "decode": (1, 1, 1), "verify": (2, 2, 2), "draft": (5, 3, 2)}
"""Tokens of three sequences: one that begins, one that goes on, and padding."""

ACCEPTED = (0, 3, 1)


def evaluate(program: Program, model: str, *, layout: str = "bf16") -> dict[str, Tensor]:
    """Outputs and updated states of a phase of a made-up model, for a fixed packed batch.

    Args:
        program: Captured, fused, or anything between.
        model: Name of its config.
        layout: Recipe by which the made-up checkpoint's values are rounded.
    """
    start = given(model, program.phase)
    values: dict[fx.Node, Any] = {}
    with torch.inference_mode(), one_thread():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = _placeholder(node, start, model, layout)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                values[node] = _call(node, args, kwargs)
    results = (values[node] for node in program.results())
    return dict(zip((*program.outputs, *program.updates), results, strict=True))


def in_f32(program: Program) -> Program:
    """A copy whose activations are f32, so that nothing is rounded between its calls."""
    made = copy(program)
    for node in made.graph.nodes:
        kind = node.meta.get("type")
        if node.op == "placeholder" and node.meta["role"] != "weight" and kind.dtype == "bf16":
            node.meta["type"] = TensorType("f32", kind.shape)
        op = OPS.get(target_name(node).removeprefix("lingc."))
        if op and "dtype" in op.arguments:
            at = op.arguments.index("dtype")
            node.args = (*node.args[:at], "f32", *node.args[at + 1 :])
    return made


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small take longer to hand to a second thread than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same(
    got: Program,
    want: Program,
    model: str,
    *,
    layout: str = "bf16",
    dtype: str = "f32",
    mechanism: Mechanism = "lightning",
) -> None:
    """Two programs of one phase give the same results, but for what nobody may read."""
    left, right = (evaluate(program, model, layout=layout) for program in (got, want))
    assert left.keys() == right.keys()
    for name, value in left.items():
        a, b = (_live(name, x, got.phase) for x in (value, right[name]))
        assert b.isfinite().all()
        assert_close(a.float(), b.float(), dtype=dtype, mechanism=mechanism)


def _live(name: str, value: Tensor, phase: str) -> Tensor:
    """Without scratch rows, and without the rows of the sequence that is padding."""
    if name == "hidden" or (name == "logits" and phase in ("decode", "verify")):
        return value[: sum(LENGTHS[phase][:-1])]
    return value if name == "logits" else value[:-1]


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if node.target is torch.ops.aten.linear.default:
        x, weight = args
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _placeholder(node: fx.Node, start: Mapping[str, Tensor], model: str, layout: str) -> Tensor:
    role, name, kind = (node.meta[key] for key in ("role", "name", "type"))
    if role == "constant":
        return torch.tensor(node.meta["values"], dtype=torch.float32)
    if role == "weight":
        return _weight(node.meta["weight"], model, layout)
    return start[name].to(TORCH_DTYPE[kind.dtype])


@cache
def _weight(spec: WeightSpec, model: str, layout: str) -> Tensor:
    """A weight as stored; plain ones with all the digits that the checkpoint's layout has."""
    plain = spec.format in ("plain", "decay")
    made = replace(spec, type=TensorType("f32", spec.type.shape)) if plain else spec
    checkpoint = synthetic(model, layout)
    return stored_tensor(materialize(made, checkpoint, checkpoint.config), made.type)


@cache
def synthetic(model: str, layout: str) -> SyntheticCheckpoint:
    """The checkpoint that weights are made of."""
    return SyntheticCheckpoint(config(model), seed=3, layout=layout)


@cache
def given(name: str, phase: str) -> Mapping[str, Tensor]:
    """Inputs and states of every name; a phase takes those that it has."""
    model, some = config(name), Samples(dtype="f32", device="cpu", seed=5)
    lengths, page_size = LENGTHS[phase], SIZES.page_size
    tokens, heads, dim = sum(lengths), model.num_attention_heads, model.head_dim
    slots, offsets, positions = some.sequences(lengths)
    pages, rows = some.pages(lengths, page_size)
    sequence = torch.repeat_interleave(torch.tensor(lengths))
    place = positions.long()
    cache_rows = pages[sequence, place // page_size] * page_size + place % page_size
    cache_rows[sequence == len(lengths) - 1] = -1
    values = {
        "token_ids": some.below(model.vocab_size, tokens),
        "hidden": some.normal(tokens, model.hidden_size),
        "positions": positions,
        "offsets": offsets,
        "slots": slots,
        "cache_rows": cache_rows,
        "page_table": pages,
        "accepted": some.ints(ACCEPTED),
        "logit_rows": some.ints((1, sum(lengths[:2]) - 1)),
    }
    slots_held, kept = len(lengths) + 1, SIZES.max_draft + 1
    for layer in range(model.num_hidden_layers + 1):
        values[f"linear_state.{layer}"] = some.state(slots_held, heads, dim, dim)
        values[f"pending_k.{layer}"] = some.state(slots_held, kept, heads, dim)
        values[f"pending_v.{layer}"] = some.state(slots_held, kept, heads, dim)
        values[f"latent_cache.{layer}"] = some.state(rows, model.latent_dim)
    return values
