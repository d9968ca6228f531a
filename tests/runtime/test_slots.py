"""Slots and pages: who holds what, and the arrays that say so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import PromptError, ResourceError, UsageError
from lingc.runtime import Limits
from lingc.runtime.slots import Lease, Piece, SlotTable


def table(*, slots: int = 2, pages: int = 5, page_size: int = 4) -> SlotTable:
    return SlotTable(Limits(slots=slots, pages=pages), page_size)


def test_limits_are_counted_in_whole_pages() -> None:
    assert Limits.from_tokens(slots=3, tokens_per_sequence=9, page_size=4) == Limits(
        slots=3, pages=9
    )


@pytest.mark.parametrize(
    ("slots", "tokens", "message"),
    [(0, 8, "slots is 0"), (1, 0, "cannot hold 0 tokens")],
)
def test_limits_that_hold_nothing_are_refused(slots: int, tokens: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Limits.from_tokens(slots=slots, tokens_per_sequence=tokens, page_size=4)


def test_a_step_names_tokens_slots_rows_and_pages() -> None:
    held = table()
    first, second = held.admit(8), held.admit(4)
    held.grow(first, 6)

    packed = held.pack(
        [
            Piece(lease=second, position=0, tokens=[7, 8, 9]),
            Piece(lease=first, position=3, tokens=[4, 5]),
        ]
    )

    assert {name: value.tolist() for name, value in packed.items()} == {
        "token_ids": [7, 8, 9, 4, 5],
        "positions": [0, 1, 2, 3, 4],
        "offsets": [0, 3, 5],
        "slots": [1, 0],
        "cache_rows": [8, 9, 10, 3, 4],
        "page_table": [[2, 0], [0, 1]],
    }
    assert all(value.dtype == np.int32 for value in packed.values())


def test_pages_are_handed_out_as_tokens_come() -> None:
    held = table()
    lease = held.admit(12)

    held.pack([Piece(lease=lease, position=0, tokens=[1] * 4)])
    before = list(lease.pages)
    held.pack([Piece(lease=lease, position=4, tokens=[1])])

    assert (before, lease.pages) == ([0], [0, 1])
    assert held.free_pages == 2


def test_beyond_what_is_free_tokens_go_to_the_scratch_row() -> None:
    held = table(pages=3)
    lease, _other = held.admit(4), held.admit(8)

    packed = held.pack([Piece(lease=lease, position=2, tokens=[1, 2, 3, 4])])

    assert packed["cache_rows"].tolist() == [2, 3, -1, -1]
    assert packed["page_table"].tolist() == [[0, 0]]


def test_behind_all_pages_tokens_stand_at_the_last_position() -> None:
    """So that no table is asked for that has more pages than there are."""
    held = table(pages=2)

    packed = held.pack([Piece(lease=held.admit(8), position=6, tokens=[1, 2, 3, 4])])

    assert packed["positions"].tolist() == [6, 7, 7, 7]
    assert packed["cache_rows"].tolist() == [6, 7, -1, -1]
    assert packed["page_table"].shape == (1, 2)


def test_a_sequence_that_never_fits_is_refused_with_the_numbers() -> None:
    with pytest.raises(PromptError, match="of 21 tokens does not fit the cache of 20") as caught:
        table().admit(21)

    assert caught.value.hint == "5 pages of 4 tokens: load with more"


def test_a_sequence_that_does_not_fit_now_is_refused_with_the_numbers() -> None:
    held = table()
    held.admit(9)

    with pytest.raises(
        ResourceError,
        match="needs a slot and 3 pages, but 1 of 2 slots and 2 of 5 pages are free",
    ):
        held.admit(10)


def test_without_a_slot_there_is_no_room() -> None:
    held = table()
    held.admit(1)
    held.admit(1)

    assert not held.has_room(1)
    with pytest.raises(ResourceError, match="0 of 2 slots and 3 of 5 pages"):
        held.admit(1)


@settings(max_examples=200, deadline=None)
@given(
    page_size=st.integers(1, 5),
    moves=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), max_size=40),
)
def test_no_row_is_ever_held_twice_and_none_is_lost(
    page_size: int, moves: list[tuple[int, int]]
) -> None:
    held = table(slots=3, pages=8, page_size=page_size)
    leases: list[tuple[Lease, int]] = []
    for move, count in moves:
        if move < 2 and held.has_room(count):
            leases.append((held.admit(count), count))
        elif move == 2 and leases:
            lease, promised = leases[count % len(leases)]
            rows = held.pack([Piece(lease=lease, position=0, tokens=[0] * (count + promised))])
            assert (rows["cache_rows"][:promised] >= 0).all(), "what was promised is there"
        elif move == 3 and leases:
            held.release(leases.pop(count % len(leases))[0])
        pages = [page for lease, _ in leases for page in lease.pages]
        assert len(set(pages)) == len(pages)
        assert len({lease.slot for lease, _ in leases}) == len(leases)
        assert held.free_pages == 8 - sum(lease.reserved for lease, _ in leases)
    for lease, _ in leases:
        held.release(lease)
    assert held.admit(8 * page_size).reserved == 8
    assert held.free_slots == 2
