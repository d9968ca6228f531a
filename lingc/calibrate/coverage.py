"""Which experts the samples reached, and which they did not."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Below:
    """An expert with fewer tokens than asked for."""

    layer: int
    expert: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Tokens of each expert.

    Attributes:
        layers: Layer -> tokens of its experts.
        floor: What each must have.
        below: Those that have less, by layer and number.
    """

    layers: Mapping[int, Sequence[int]]
    floor: int
    below: tuple[Below, ...]

    def rows(self) -> list[tuple[int, int, int, int, float, int, int]]:
        """A line a layer: experts, tokens, fewest, median, most, and how many have none."""
        return [
            (layer, len(c), sum(c), min(c), median(c), max(c), sum(n == 0 for n in c))
            for layer, c in self.layers.items()
        ]

    def silent_lines(self) -> Iterator[str]:
        """A sentence for each layer with experts that no token reached."""
        for layer, counts in self.layers.items():
            silent = [expert for expert, count in enumerate(counts) if count == 0]
            if silent:
                yield f"layer {layer}: no token reached {_named(silent)}"

    def sentence(self) -> str:
        """What is wrong, for the message of the gate."""
        worst = sorted(self.below, key=lambda one: (one.tokens, one.layer, one.expert))
        listed = "".join(
            f"\n  - layer {one.layer}, expert {one.expert}: {_tokens(one.tokens)}"
            for one in worst[:_NAMED]
        )
        more = len(worst) - _NAMED
        listed += f"\n  - and {more} more" if more > 0 else ""
        count = "1 expert" if len(worst) == 1 else f"{len(worst)} experts"
        return f"{count} saw fewer than {_tokens(self.floor)}:{listed}"


def coverage(counts: Mapping[str, Sequence[int]], *, floor: int) -> Coverage:
    """Judge counts, layer -> tokens of its experts, by a floor."""
    layers = {int(layer): tuple(found) for layer, found in counts.items()}
    below = tuple(
        Below(layer=layer, expert=expert, tokens=tokens)
        for layer, found in layers.items()
        for expert, tokens in enumerate(found)
        if tokens < floor
    )
    return Coverage(layers=layers, floor=floor, below=below)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _named(experts: Sequence[int]) -> str:
    listed = ", ".join(map(str, experts[:_NAMED]))
    rest = len(experts) - _NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return f"expert{'s' if len(experts) > 1 else ''} {listed}{more}"
