"""Places in one arena: whatever lives together lies apart."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lingc.kernel import align
from lingc.targets.cuda.memory import Lifetime, fullest, place


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    count = draw(st.integers(0, 24))
    return [
        Lifetime(
            bytes=draw(st.integers(0, 5000)),
            first=(first := draw(st.integers(-1, 12))),
            last=draw(st.integers(first, 14)),
        )
        for _ in range(count)
    ]


@given(lifetimes())
def test_what_lives_together_lies_apart(some: list[Lifetime]) -> None:
    offsets, total = place(some)

    for (a, x), (b, y) in itertools.combinations(zip(some, offsets, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert x + a.bytes <= y or y + b.bytes <= x
    assert all(offset % 256 == 0 for offset in offsets)
    assert all(x + a.bytes <= total for a, x in zip(some, offsets, strict=True))


@given(lifetimes())
def test_nothing_does_with_less_than_lives_at_the_fullest_step(some: list[Lifetime]) -> None:
    _, total = place(some)

    assert fullest(some) <= total <= sum(align(one.bytes) for one in some)


def test_layers_that_are_alike_take_the_room_of_two() -> None:
    def layers(count: int) -> list[Lifetime]:
        residual = [Lifetime(8192, 3 * i, 3 * i + 3) for i in range(count)]
        return residual + [Lifetime(40_000, 3 * i + 1, 3 * i + 2) for i in range(count)]

    assert place(layers(100))[1] == place(layers(2))[1] <= align(40_000) + 2 * 8192


def test_of_two_gaps_the_smaller_one_that_fits_is_taken() -> None:
    some = [
        Lifetime(8192, 0, 1),
        Lifetime(4096, 2, 2),
        Lifetime(2048, 0, 9),
        Lifetime(1024, 0, 1),
        Lifetime(512, 0, 9),
        Lifetime(256, 2, 9),
    ]

    offsets, total = place(some)

    assert offsets[3] == 8192 + 2048
    assert offsets[5] == offsets[3]
    assert total == 8192 + 2048 + 1024 + 512
