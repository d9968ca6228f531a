"""Small made-up models, compiled, lowered and loaded, and the steps to run on them."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc.checkpoint import SyntheticCheckpoint
from lingc.interpret import InterpreterBackend
from lingc.plan import Plan
from lingc.quantize.layouts import arrange
from lingc.runtime.backend import Limits
from lingc.runtime.onnx_backend import OnnxBackend, OnnxModels
from lingc.targets.onnx import OnnxEngine, lower
from lingc.weights import CheckpointWeights
from tests.programs import compiled, config

Array = NDArray[Any]

LIMITS = Limits(slots=3, pages=30)
PAGES_A_SLOT = 10


@cache
def weights(model: str, precision: str) -> Mapping[str, Array]:
    """The weights of a model's plan, in its own order of rows."""
    plan = compiled(model, precision)
    source = SyntheticCheckpoint(config(model), 0, layout=precision)
    made = CheckpointWeights(plan.weights.values(), source, config(model))
    return {name: np.array(made[name]) for name in plan.weights}


def packed(engine: OnnxEngine, values: Mapping[str, Array]) -> dict[str, Array]:
    return {weight.name: arrange(weight.layout, values[weight.name]) for weight in engine.weights}


def backend(
    model: str,
    precision: str = "bf16",
    *,
    library: str = "ort",
    widen: str = "load",
    taps: Sequence[str] = (),
) -> OnnxBackend:
    plan = compiled(model, precision)
    engine = lower(plan, library=library, widen=widen)
    models = OnnxModels(plan=plan, models=engine.models, info=engine.info)
    held = packed(engine, weights(model, precision))
    return OnnxBackend(models, held, LIMITS, threads=1, taps=taps)


def interpreter(model: str, precision: str = "bf16") -> InterpreterBackend:
    return InterpreterBackend(compiled(model, precision), weights(model, precision), LIMITS)


class Batch:
    """Sequences that each own a slot and its pages; None is padding.

    Args:
        plan: The plan they run on.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = np.random.default_rng(0)

    def step(
        self, phase: str, spans: Sequence[tuple[int | None, int, int]], **more: Array
    ) -> dict[str, Array]:
        """Inputs of a phase.

        Args:
            phase: The phase.
            spans: Slot, first position and number of tokens of each sequence.
            more: Inputs that are not those of every phase.
        """
        size, vocab = self.plan.page_size, self.plan.config["vocab_size"]
        width = max(first + count - 1 for _, first, count in spans) // size + 1
        positions = [np.arange(first, first + count) for _, first, count in spans]
        firsts = [None if slot is None else slot * PAGES_A_SLOT for slot, _, _ in spans]
        rows = [
            np.full(len(p), -1) if page is None else page * size + p
            for page, p in zip(firsts, positions, strict=True)
        ]
        ends = np.cumsum([0, *(count for _, _, count in spans)])
        given = {
            "token_ids": self.random.integers(0, vocab, ends[-1]),
            "positions": np.concatenate(positions),
            "offsets": ends,
            "slots": np.array([-1 if slot is None else slot for slot, _, _ in spans]),
            "cache_rows": np.concatenate(rows),
            "page_table": np.array([np.arange(width) + (page or 0) for page in firsts]),
            "logit_rows": ends[1:] - 1,
        }
        wanted = self.plan.programs[phase].inputs
        made = {name: value.astype(np.int32) for name, value in given.items()} | more
        return {name: made[name] for name in wanted}


def accepted(*counts: int) -> dict[str, Array]:
    return {"accepted": np.array(counts, np.int32)}
