"""From logits to probabilities to tokens."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import LingcError, UsageError
from lingc.runtime import Sampling
from lingc.runtime.sampling import (
    Row,
    argmax,
    choose,
    log_softmax,
    pick,
    probabilities,
    uniform,
)

# Few distinct values, so that ties are common.
LOGITS = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 9.0]), min_size=1, max_size=20)


def row(values: list[float]) -> Row:
    return np.array(values, np.float32)


def plain(values: list[float], *, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The definition, in plain Python: sort, cut, renormalise."""
    weights = [math.exp((v - max(values)) / temperature) for v in values]
    order = sorted(range(len(values)), key=lambda i: (-weights[i], i))
    kept = order[: top_k or len(order)]
    total = sum(weights[i] for i in kept)
    nucleus: list[int] = []
    for i in kept:
        nucleus.append(i)
        if top_p < 1 and sum(weights[j] for j in nucleus) / total >= top_p - 1e-12:
            break
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(values))]


@settings(max_examples=300, deadline=None)
@given(
    values=LOGITS,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 25),
    # No value at which a sum of shares can land by itself.
    top_p=st.sampled_from([0.0107, 0.1903, 0.4711, 0.7309, 0.9503, 1.0]),
)
def test_probabilities_are_those_of_the_definition(
    values: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    drawn = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)

    found = probabilities(row(values), drawn)

    wanted = plain(values, temperature=temperature, top_k=top_k, top_p=top_p)
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@given(values=LOGITS)
def test_greedy_is_certain_of_the_first_largest(values: list[float]) -> None:
    found = probabilities(row(values), Sampling(temperature=0, top_k=3, top_p=0.5))

    assert found.tolist() == [float(i == values.index(max(values))) for i in range(len(values))]


@pytest.mark.parametrize("temperature", [1e-5, 1e-300, 5e-324])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    found = probabilities(row([1.0, 3.0, 2.0]), Sampling(temperature=temperature))

    assert found.tolist() == [0.0, 1.0, 0.0]


def test_a_huge_temperature_makes_all_tokens_alike() -> None:
    found = probabilities(row([-50.0, 50.0]), Sampling(temperature=1e308))

    assert found.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_no_number_is_reported_and_not_sampled(bad: float) -> None:
    with pytest.raises(LingcError, match=rf"a logit of {bad} for token 1"):
        argmax(row([5.0, bad, 1.0]))


def test_an_excluded_token_is_never_drawn() -> None:
    weights = probabilities(row([-math.inf, 0.0, 1.0]), Sampling(temperature=1.0))

    assert weights[0] == 0
    assert pick(weights, 0.0) == 1


@given(values=LOGITS, drawn=st.floats(0, 1, exclude_max=True))
def test_a_pick_has_weight(values: list[float], drawn: float) -> None:
    weights = probabilities(row(values), Sampling(temperature=1.0, top_k=3, top_p=0.7))

    assert weights[pick(weights, drawn)] > 0


def test_a_pick_at_the_very_top_is_the_last_token_with_weight() -> None:
    assert pick(np.array([0.1, 0.6, 0.3 + 1e-16, 0.0]), np.nextafter(1.0, 0)) == 2


def test_picks_follow_the_weights() -> None:
    weights = np.array([0.5, 0.0, 0.25, 0.25])
    places = (np.arange(1000) + 0.5) / 1000

    counts = np.bincount([pick(weights, float(u)) for u in places], minlength=4)

    assert counts.tolist() == [500, 0, 250, 250]


def test_random_numbers_belong_to_seed_request_position_and_purpose() -> None:
    def numbers(seed: int) -> list[float]:
        settings = Sampling(temperature=1.0, seed=seed)
        return [
            uniform(settings, request=r, position=p, purpose=purpose)
            for r in range(4)
            for p in range(4)
            for purpose in range(3)
        ]

    first = numbers(2**64 - 1)

    assert first == numbers(2**64 - 1)
    assert len({*first, *numbers(0)}) == 2 * len(first)
    assert all(0 <= u < 1 for u in first)


def test_random_numbers_are_the_same_on_every_machine() -> None:
    """Recorded values: a seed printed in a report must give the same tokens elsewhere."""
    settings = Sampling(temperature=1.0, seed=7)

    found = [uniform(settings, request=1, position=p, purpose=0) for p in (0, 1, 100)]

    assert found == [0.8824668302545412, 0.3956684723964201, 0.08097465329826292]


def test_choosing_draws_from_the_probabilities() -> None:
    settings = Sampling(temperature=1.0, top_k=2)
    logits = row([0.0, 2.0, 1.0, -1.0])

    counts = np.bincount(
        [choose(logits, settings, request=0, position=p) for p in range(4000)], minlength=4
    )

    # Four standard deviations of a binomial.
    share = 1 / (1 + math.exp(-1))
    assert counts[1] == pytest.approx(4000 * share, abs=4 * (4000 * share * (1 - share)) ** 0.5)
    assert counts[0] == counts[3] == 0


def test_log_softmax_takes_large_logits() -> None:
    assert log_softmax(row([1000.0, 1000.0])).tolist() == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(bad: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Sampling(**bad)  # type: ignore[arg-type]
