"""Every mode feeds a backend so that it scores what the definition says."""

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import IncompatibleError
from lingc.parity.engine import LEAD, EngineSide
from lingc.parity.side import MODES, Choice, Mode, Seen
from lingc.runtime import Limits
from tests.runtime.toy import VOCAB, ToyBackend, expected_logits, plan

ROW = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40)


def side(
    *, slots: int = 3, tokens: int = 48, max_draft: int = 3, has_draft: bool = True, chunk: int = 7
) -> EngineSide:
    limits = Limits.from_tokens(slots=slots, tokens_per_sequence=tokens, page_size=4)
    made = plan(page_size=4, max_draft=max_draft, has_draft=has_draft)
    return EngineSide(ToyBackend(limits, made), "toy", chunk=chunk)


def expected(row: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.stack([expected_logits(row[: t + 1]) for t in range(len(row))])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "draft"])
@given(st.lists(ROW, min_size=1, max_size=3), st.integers(0, 3))
@settings(max_examples=15)
def test_a_mode_scores_every_token_of_every_row(
    mode: Mode, given_rows: list[list[int]], max_draft: int
) -> None:
    found = side(max_draft=max_draft).score(given_rows, mode)

    for row, scores in zip(given_rows, found, strict=True):
        np.testing.assert_array_equal(scores.logits, expected(row))


def test_draft_mode_predicts_the_token_after_next() -> None:
    rows = [list(range(20)), [5, 4, 3]]

    found = side().score(rows, "draft")

    # The toy's draft layer is as good as the model itself: hidden of t and token t+1 are enough.
    for row, scores in zip(rows, found, strict=True):
        np.testing.assert_array_equal(scores.logits, expected(row)[1:])


def test_the_phases_run_are_those_of_the_mode() -> None:
    row = list(range(12)) * 3

    ran: dict[Mode, list[str]] = {}
    for mode in MODES:
        made = side(slots=1)
        assert isinstance(made.backend, ToyBackend)
        made.score([row], mode)
        ran[mode] = [phase for phase, _ in made.backend.calls]

    assert set(ran["prefill"]) == {"prefill"}
    assert ran["decode"].count("decode") == len(row) - LEAD
    assert ran["verify"].count("verify") == (len(row) - LEAD) // 4
    assert ran["rollback"].count("verify") > ran["verify"].count("verify")
    assert ran["draft"].count("draft") == ran["draft"].count("prefill")


def test_one_side_scores_batch_after_batch() -> None:
    made = side()
    rows = [[1, 2, 3], [4, 5], [6] * 9]

    first = made.score(rows, "verify")
    again = made.score(rows[::-1], "decode")

    for a, b in zip(first, again[::-1], strict=True):
        np.testing.assert_array_equal(a.logits, b.logits)


def test_a_missing_program_is_answered() -> None:
    with pytest.raises(IncompatibleError, match="toy has no 'draft' program, which mode 'draft'"):
        side(has_draft=False).score([[1, 2]], "draft")


@pytest.mark.parametrize("mode", ["prefill", "verify", "rollback"])
def test_experts_go_to_their_rows_and_positions(mode: Mode) -> None:
    """A tap tells the tokens that were fed; the experts are made of them."""
    made = side(slots=2)
    backend = made.backend
    assert isinstance(backend, ToyBackend)
    fed: list[Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.int32]]]] = []
    run = backend.run

    def noted(phase: str, inputs: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.int32]]]):  # type: ignore[no-untyped-def]  # noqa: ANN202
        fed.append(inputs)
        return run(phase, inputs)

    backend.run = noted  # type: ignore[method-assign]
    tapped = EngineSide(
        backend, "toy", chunk=5,
        tap=lambda _out: Seen(
            experts={
                2: Choice(ids=np.stack([fed[-1]["token_ids"], fed[-1]["positions"]], 1))
            },
            layers={4: fed[-1]["positions"][:, None].astype(np.float32)},
        ),
    )  # fmt: skip
    rows = [[(3 * t) % VOCAB for t in range(30)], [(5 * t + 1) % VOCAB for t in range(21)]]

    found = tapped.score(rows, mode)

    for row, scores in zip(rows, found, strict=True):
        want = np.stack([np.array(row), np.arange(len(row))], 1)
        np.testing.assert_array_equal(scores.experts[2].ids, want)
        np.testing.assert_array_equal(scores.layers[4][:, 0], np.arange(len(row)))
