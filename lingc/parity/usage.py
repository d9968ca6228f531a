"""Which experts the data reached, and which it did not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lingc.parity.side import Choice

Counts = NDArray[np.int64]


@dataclass(slots=True)
class Usage:
    """Tokens an expert got, layer by layer; of one side, row by row.

    Args:
        experts: How many there are in a layer.
    """

    experts: int
    _counts: dict[int, Counts] = field(default_factory=dict)

    def add(self, chosen: Mapping[int, Choice]) -> None:
        """Count a row's choices."""
        for layer, choice in chosen.items():
            found = np.bincount(choice.ids.reshape(-1), minlength=self.experts)
            self._counts[layer] = self._counts.get(layer, np.zeros(1, np.int64)) + found

    @property
    def counts(self) -> Mapping[int, Sequence[int]]:
        """Layer -> tokens of each expert."""
        return {layer: tuple(found.tolist()) for layer, found in sorted(self._counts.items())}


def silent(counts: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Layer -> experts without a token, of layers that have one."""
    found = {
        layer: tuple(e for e, count in enumerate(each) if not count)
        for layer, each in counts.items()
    }
    return {layer: experts for layer, experts in found.items() if experts}


def listed(experts: Sequence[int]) -> str:
    """Numbers as a person writes them: `3, 7-9`."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and expert == runs[-1][-1] + 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
