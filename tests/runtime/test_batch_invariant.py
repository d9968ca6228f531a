"""Requests alone and in company, on a GPU: the same bits, or the same tokens where it matters."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lingc.build import build
from lingc.compile import Request as BuildRequest
from lingc.engine import open_package
from lingc.runtime import Completion, TokenLogprob
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.sequence import Acceptance, Finish
from lingc.weights import open_weights
from tests.runtime import batches
from tests.runtime.cuda_engine import plan_and_weights

TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
TOKENS = 1280
"""Room of a sequence: more than the longest prompt and what follows it."""

Start = Callable[[int], CudaBackend]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(
    scope="module",
    params=[("fp8", True), ("fp8", False), ("bf16", False), ("int4", True)],
    ids=["fp8-invariant", "fp8", "bf16", "int4-invariant"],
)
def engine(
    request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[batches.F64 | None, Start]]:
    """How much margins change by the order of sums alone, None if it is the same; what loads it."""
    path = tmp_path_factory.mktemp("engine") / "tiny.ling"
    precision, is_invariant = request.param
    asked = BuildRequest(precision=precision, target="h200-sxm", batch_invariant=is_invariant)
    build(TINY, path, asked, cache_dir=cache)
    package, loaded = open_package(path), []
    noise = None
    if not is_invariant:
        rows = [one.tokens for one in batches.requests(package.plan.config["vocab_size"])]
        noise = batches.order_noise(
            package.plan, open_weights(package.shards()), rows, device="cuda"
        )

    def start(slots: int) -> CudaBackend:
        limits = Limits.from_tokens(
            slots=slots, tokens_per_sequence=TOKENS, page_size=package.plan.page_size
        )
        loaded.append(CudaBackend(package, open_weights(package.shards()), limits))
        return loaded[-1]

    yield noise, start
    for backend in loaded:
        backend.close()


@pytest.mark.gpu
@pytest.mark.long
def test_company_and_drafts_change_no_bit_or_no_token_that_is_far_ahead(
    engine: tuple[batches.F64 | None, Start],
) -> None:
    """Across buckets sums are made in another order, which may do what it does to the references.

    A token that another one takes the place of was no further ahead than margins move there, and
    half of such tokens no further than nine margins of ten move.
    """
    noise, start = engine
    one, many = start(1), start(64)
    asked = batches.requests(one.plan.config["vocab_size"])
    bare = batches.without_logprobs(asked)
    want = batches.alone(one, asked)
    others = {
        "again": batches.alone(one, asked),
        "drawn on the device": batches.alone(one, bare),
        **{f"{n} drafts": batches.alone(one, asked, drafts=n) for n in (1, 3)},
        **{f"together, {n} drafts": batches.together(many, asked, drafts=n) for n in (0, 1, 3)},
        **{f"{n} drafts, drawn on the device": batches.alone(one, bare, drafts=n) for n in (1, 3)},
        **{f"together, {n} drafts, drawn": batches.together(many, bare, drafts=n) for n in (1, 3)},
        "sixty": batches.together(many, asked, copies=6),
        "sixty, drawn": batches.together(many, bare, copies=6),
    }

    found = {name: batches.differences(want, got) for name, got in others.items()}

    assert found["again"] == []
    if noise is None:
        assert {name: what for name, what in found.items() if what} == {}
        return
    margins: list[float] = []
    for name, got in others.items():
        if "drawn" not in name:
            apart = batches.apart(want, got)
            margins += apart.margins.values()
            assert max(apart.margins.values(), default=0.0) <= noise.max(), f"{name}: {apart}"
    assert np.median(margins or [0.0]) <= np.quantile(noise, 0.9)


# ------------------------------------------------------------------------ what the comparison sees


def completion(index: int, *choices: tuple[int, float, float]) -> Completion:
    """Tokens with their own log-probability, and that of token 9."""
    logprobs = tuple(
        TokenLogprob(logprob=own, top=((token, own), (9, other))) for token, own, other in choices
    )
    return Completion(
        request=index, prompt_tokens=1, tokens=tuple(token for token, _, _ in choices), text="",
        finish=Finish.LENGTH, logprobs=logprobs, acceptance=Acceptance(histogram=(0,)),
        first_token_s=0.0, total_s=0.0,
    )  # fmt: skip


def test_a_last_bit_is_seen() -> None:
    one = completion(0, (1, -0.5, -2.0), (2, -0.25, -3.0))
    other = completion(0, (1, -0.5, -2.0), (2, -0.25000001, -3.0))

    assert batches.differences([one], [one, one]) == []
    assert batches.differences([one], [one, other]) == [
        "request 1: log-probabilities of token 1 differ"
    ]


def test_another_token_is_seen() -> None:
    one = completion(0, (1, -0.5, -2.0), (2, -0.25, -3.0))
    other = completion(0, (1, -0.5, -2.0), (9, -0.3, -0.3))

    assert batches.differences([one], [other]) == ["request 0: token 1 is (9,), not (2,)"]


def test_how_far_behind_another_token_was_is_told() -> None:
    one = completion(0, (1, -0.5, -2.0), (2, -0.25, -3.0))
    near = completion(0, (1, -0.5001, -2.0), (2, -0.25, -3.0))
    far = completion(0, (1, -0.5001, -2.0), (9, -0.3, -0.3))

    assert batches.apart([one], [near]).margins == {}
    found = batches.apart([one], [far])
    assert found.positions == 1
    assert found.largest == pytest.approx(1e-4)
    assert found.margins == {0: pytest.approx(2.75)}


def test_another_order_of_sums_moves_margins_a_little() -> None:
    plan, weights = plan_and_weights()
    some = np.random.default_rng(0)
    rows = [tuple(map(int, some.integers(0, plan.config["vocab_size"], n))) for n in (3, 40, 140)]

    noise = batches.order_noise(plan, weights, rows)

    assert noise.shape == (3 * 183,)
    assert 0 < np.quantile(noise, 0.9) < noise.max() < 1
    # Three tokens are one block in every order.
    assert not noise[:9].any()
