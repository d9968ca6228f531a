"""A small CUDA engine for tests: its plan, weights and code, and steps of every phase."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from lingc import compile as compiler
from lingc import targets
from lingc.checkpoint import SyntheticCheckpoint
from lingc.model.config import ModelConfig
from lingc.plan import Plan
from lingc.quantize.formats import round_bf16, widen_bf16
from lingc.quantize.recipes import load_recipe
from lingc.round_memory import ROUND, round_axes
from lingc.runtime import Request
from lingc.runtime.backend import Array, Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_code import CudaCode
from lingc.runtime.slots import Lease, Piece, SlotTable
from lingc.targets.cuda.buckets import Sizes
from lingc.weights import CheckpointWeights
from tests.made_weights import RAW
from tests.runtime.host_device import HostDevice, reference_code

TARGET = "h200-sxm"
LIMITS = Limits(slots=3, pages=12)

SMALL = {
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
CONFIG = ModelConfig.from_dict({**RAW, **SMALL})
"""A linear layer, a latent one with experts, a draft layer; widths are those of the kernels."""


class Predictable(SyntheticCheckpoint):
    """Weights whose draft layer guesses right now and then: layers add little to the embedding."""

    def plain(self, name: str) -> tuple[Array, str]:
        bits, kind = super().plain(name)
        if name.endswith((".dense.weight", "down_proj.weight")):
            return round_bf16(0.1 * widen_bf16(bits)), kind
        if name.endswith("eh_proj.weight"):  # the token's half comes first
            made = 0.02 * widen_bf16(bits)
            made[:, : len(made)] += np.eye(len(made), dtype=np.float32)
            return round_bf16(made), kind
        return bits, kind


@cache
def plan_and_weights(precision: str = "fp8") -> tuple[Plan, dict[str, Array]]:
    torch.set_num_threads(1)
    request = compiler.Request(precision=precision, target=TARGET)
    plan = compiler.compile_plan(
        CONFIG, load_recipe(precision), targets.get(TARGET), has_mtp=True, request=request
    ).plan
    return plan, _weights(plan, SyntheticCheckpoint(CONFIG, 0))


@cache
def predictable() -> dict[str, Array]:
    """Weights with which some drafts are kept and some are not."""
    plan, _ = plan_and_weights()
    return _weights(plan, Predictable(CONFIG, 0))


def _weights(plan: Plan, source: SyntheticCheckpoint) -> dict[str, Array]:
    weights = CheckpointWeights(plan.weights.values(), source, CONFIG)
    return {name: weights[name] for name in plan.weights}


def sizes(phase: str, tokens: int, sequences: int, pages: int) -> Sizes:
    axes = {"T": tokens, "B": sequences, "B+1": sequences + 1, "P": pages, "N": sequences}
    if phase == "decode":
        del axes["T"]
    if phase in ("decode", "verify"):
        del axes["N"]
    return Sizes(phase=phase, axes=axes)


BUCKETS = (
    *(sizes("prefill", tokens, 4, 12) for tokens in (16, 64)),
    *(sizes("decode", n, n, pages) for n in (1, 2, 4) for pages in (1, 12)),
    *(sizes("verify", n * each, n, 12) for each in (2, 3, 4) for n in (1, 4)),
    *(sizes("draft", n, n, 12) for n in (2, 16)),
    sizes("draft", 64, 4, 12),
)

ROUNDS = (
    *(sizes("draft", n, n, 12) for n in (1, 4)),
    *(sizes("draft", n * each, n, 12) for each in (2, 3, 4) for n in (1, 4)),
    *(Sizes(phase=ROUND, axes=round_axes(n, each, 12)) for each in (2, 3, 4) for n in (1, 4)),
)
"""What an engine needs beside for rounds without its host, of up to 4 sequences."""


@cache
def code(*, has_rounds: bool = False) -> CudaCode:
    plan, _ = plan_and_weights()
    every = BUCKETS + (ROUNDS if has_rounds else ())
    return reference_code(plan, targets.get(TARGET), every)


def phases(plan: Plan) -> Iterator[tuple[str, dict[str, Array]]]:
    """A prompt of two sequences, steps of both, some that commit, a draft; others join."""
    table = SlotTable(LIMITS, plan.page_size)
    a, b = (table.admit(200) for _ in range(2))
    random = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = random.integers(0, 4000, count).tolist()
        return found

    def given(phase: str, pieces: list[Piece], **more: Array) -> tuple[str, dict[str, Array]]:
        every = table.pack(pieces) | more
        return phase, {name: every[name] for name in plan.programs[phase].inputs}

    def piece(lease: Lease, position: int, count: int) -> Piece:
        return Piece(lease=lease, position=position, tokens=tokens(count))

    def ints(*values: int) -> Array:
        return np.array(values, np.int32)

    prompt = [piece(a, 0, 37), piece(b, 0, 5)]
    hidden = round_bf16(random.standard_normal((42, 256)).astype(np.float32))
    yield given("prefill", prompt, logit_rows=ints(36, 41))
    yield given("decode", [piece(a, 37, 1), piece(b, 5, 1)], accepted=ints(0, 0))
    yield given("verify", [piece(a, 38, 4), piece(b, 6, 4)], accepted=ints(0, 0))
    yield given("decode", [piece(a, 40, 1), piece(b, 10, 1)], accepted=ints(2, 4))
    yield given("draft", prompt, hidden=hidden, logit_rows=ints(36, 41))
    yield given("verify", [piece(b, 11, 2)], accepted=ints(0))
    yield given("verify", [piece(b, 12, 2)], accepted=ints(1))
    c = table.admit(70)
    yield given("prefill", [piece(c, 0, 64)], logit_rows=ints(63))
    yield given("prefill", [piece(a, 41, 16)], logit_rows=ints(*range(16)))
    three = [piece(c, 64, 1), piece(a, 57, 1), piece(b, 14, 1)]
    yield given("decode", three, accepted=ints(0, 0, 2))
    table.release(b)
    yield given("prefill", [piece(table.admit(9), 0, 9)], logit_rows=ints(8, 0, 1, 2, 3))


def loaded(limits: Limits = LIMITS, device: HostDevice | None = None) -> CudaBackend:
    _, weights = plan_and_weights()
    return CudaBackend(code(), weights, limits, device=device or HostDevice())


REQUESTS = [
    Request(tokens=tuple(range(5, 5 + length)), max_tokens=most, stop_ids=frozenset())
    for length, most in ((20, 9), (3, 2), (70, 6), (9, 12), (1, 1))
]
