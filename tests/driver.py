"""Drives a backend by hand: packed batches of sequences in any slots and pages, with padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lingc.interpret import InterpreterBackend
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.op import OPS
from lingc.plan import Arg, Plan, Step, TensorType
from lingc.runtime.backend import Limits
from lingc.weights import CheckpointWeights
from tests.evaluate import synthetic
from tests.programs import SIZES, compiled, config

Array = NDArray[Any]
Weights = Mapping[str, Array]

LIMITS = Limits(slots=4, pages=24)


@dataclass(slots=True, kw_only=True)
class Held:
    """A sequence: its tokens, and what it holds of the backend.

    Attributes:
        done: Tokens that count, pending ones included.
        pending: How many tokens of its last verify step count.
    """

    tokens: list[int]
    slot: int
    pages: list[int]
    done: int = 0
    pending: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done


@dataclass(slots=True)
class Padding:
    """A row that fills up a batch."""

    tokens: list[int] = field(default_factory=list)


Share = tuple[Held | Padding, Sequence[int]]
"""A sequence and the tokens that it brings to a step, from position `done` on."""


def pack(phase: str, batch: Sequence[Share]) -> dict[str, Array]:
    """The inputs of a step but for the hidden state of a draft."""
    size = SIZES.page_size
    positions, rows, pages = [], [], []
    for held, tokens in batch:
        start = held.done if isinstance(held, Held) else 0
        span = np.arange(start, start + len(tokens))
        positions.append(span)
        if isinstance(held, Held):
            rows.append(np.array(held.pages)[span // size] * size + span % size)
            pages.append(held.pages[: span[-1] // size + 1])
        else:
            rows.append(np.full(len(tokens), -1))
            pages.append([])
    width = max(1, *map(len, pages))
    lengths = [len(tokens) for _, tokens in batch]
    given: dict[str, Any] = {
        "token_ids": np.concatenate([tokens for _, tokens in batch]),
        "positions": np.concatenate(positions),
        "offsets": np.cumsum([0, *lengths]),
        "slots": [held.slot if isinstance(held, Held) else -1 for held, _ in batch],
        "cache_rows": np.concatenate(rows),
        "page_table": [[*own, *[0] * (width - len(own))] for own in pages],
    }
    if phase in ("decode", "verify"):
        given["accepted"] = [held.pending if isinstance(held, Held) else 2 for held, _ in batch]
    else:
        given["logit_rows"] = np.arange(sum(lengths))
    return {name: np.asarray(value, np.int32) for name, value in given.items()}


def step(
    backend: InterpreterBackend, phase: str, batch: Sequence[Share], **extra: Array
) -> list[tuple[Array, Array]]:
    """Logits and hidden states of every share's tokens."""
    given = {**pack(phase, batch), **extra}
    wanted = backend.plan.programs[phase].inputs
    out = backend.run(phase, {name: given[name] for name in wanted})
    cuts = given["offsets"][1:-1]
    return list(zip(np.split(out["logits"], cuts), np.split(out["hidden"], cuts), strict=True))


@cache
def eager(model: str, layout: str = "bf16", dtype: torch.dtype = torch.float32) -> LingModel:
    """The model in plain torch, with the weights that the backend has."""
    return from_source(synthetic(model, layout), dtype)


def backend(model: str, precision: str = "bf16", target: str = "cpu") -> InterpreterBackend:
    """An interpreted plan of a made-up checkpoint in the recipe's own layout."""
    plan = compiled(model, precision, target)
    return InterpreterBackend(plan, _weights(model, precision, target), LIMITS)


def backend_float64(model: str, precision: str = "bf16", target: str = "cpu") -> InterpreterBackend:
    """The same with every activation, state and f32 weight in float64."""
    plan, weights = compiled(model, precision, target), _weights(model, precision, target)
    return in_float64(plan, weights, config(model), LIMITS)


def in_float64(
    plan: Plan, weights: Weights, model: ModelConfig, limits: Limits
) -> InterpreterBackend:
    """A plan with every activation, state and f32 weight in float64."""
    given = dict(weights)
    for name, spec in plan.weights.items():
        if spec.format == "decay":
            given[name] = model.decay(spec.layer)
        elif spec.type.dtype == "f32":
            given[name] = weights[name].astype(np.float64)
    return InterpreterBackend(_plan_in_float64(plan), given, limits)


def _plan_in_float64(plan: Plan) -> Plan:
    def wide(kinds: Mapping[str, TensorType], narrow: Sequence[str]) -> dict[str, TensorType]:
        return {
            name: TensorType("f64", kind.shape) if kind.dtype in narrow else kind
            for name, kind in kinds.items()
        }

    made = wide({name: spec.type for name, spec in plan.weights.items()}, ["f32"])
    weights = {name: replace(spec, type=made[name]) for name, spec in plan.weights.items()}
    programs = {
        phase: replace(
            program,
            types=wide(program.types, ["f32", "bf16"]) | {n: made[n] for n in program.weights},
            steps=tuple(replace(step, args=_args_in_float64(step)) for step in program.steps),
        )
        for phase, program in plan.programs.items()
    }
    states = wide(plan.states, ["f32", "bf16"])
    return replace(plan, weights=weights, programs=programs, states=states)


def _args_in_float64(step: Step) -> tuple[Arg, ...]:
    op = OPS.get(step.op.removeprefix("lingc."))
    names = op.arguments if op else ()
    at = names.index("dtype") if "dtype" in names else -1
    return tuple("f64" if i == at else arg for i, arg in enumerate(step.args))


@cache
def _weights(model: str, precision: str, target: str) -> Weights:
    plan: Plan = compiled(model, precision, target)
    source = synthetic(model, precision)
    made = CheckpointWeights(plan.weights.values(), source, source.config)
    return {name: made[name] for name in plan.weights}
