"""The loop on the trained checkpoint, run by the references, against the published code's tokens.

The acceptance of drafts was recorded from an independent implementation; it has to be the same
round for round, which no error in the draft layer's cache or in the rollback would leave alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc import compile as compiler
from lingc import targets
from lingc.interpret import InterpreterBackend
from lingc.quantize.recipes import load_recipe
from lingc.runtime import Acceptance, Completion, Generator, Limits, Request
from lingc.runtime.speculative import Forced
from lingc.weights import CheckpointWeights

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/ling-tiny"

pytestmark = pytest.mark.long


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def backend() -> InterpreterBackend:
    config, checkpoint = compiler.read_config(ROOT / "artifacts/checkpoints/ling-tiny")
    assert checkpoint is not None
    plan = compiler.compile_plan(
        config,
        load_recipe("bf16"),
        targets.get("cpu"),
        has_mtp=True,
        request=compiler.Request(),
    ).plan
    weights = CheckpointWeights(plan.weights.values(), checkpoint, config)
    room = Limits.from_tokens(slots=16, tokens_per_sequence=672, page_size=plan.page_size)
    return InterpreterBackend(plan, weights, room)


def generate(
    backend: InterpreterBackend, drafts: int, force_reject: Forced | None = None
) -> list[Completion]:
    requests = [Request(tokens=tuple(p["ids"]), max_tokens=64) for p in lines("prompts.jsonl")]
    return Generator(backend, drafts=drafts, force_reject=force_reject).generate(requests)


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_tokens_and_acceptance_are_the_recorded_ones(
    backend: InterpreterBackend, drafts: int
) -> None:
    found = generate(backend, drafts)

    assert [list(c.tokens) for c in found] == [line["ids"] for line in lines("greedy.jsonl")]
    if drafts:
        recorded = json.loads((GOLDEN / "mtp_acceptance.json").read_text())[f"k{drafts}"]
        total = Acceptance.total([c.acceptance for c in found])
        assert list(total.histogram) == recorded["accepted_histogram"]
        each = [(c.acceptance.rounds, sum(c.acceptance.accepted)) for c in found]
        per_prompt = recorded["per_prompt"].values()
        assert each == [(line["rounds"], line["accepted"]) for line in per_prompt]


@pytest.mark.parametrize("drafts", [1, 3])
def test_random_rejections_do_not_change_the_tokens(
    backend: InterpreterBackend, drafts: int
) -> None:
    rng = np.random.default_rng(drafts)

    found = generate(backend, drafts, force_reject=lambda _index, _at: rng.random() < 0.4)

    assert [list(c.tokens) for c in found] == [line["ids"] for line in lines("greedy.jsonl")]
