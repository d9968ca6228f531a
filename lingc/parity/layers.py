"""How far two sides are apart inside: behind each layer, and in the linear states.

Of a token, the error behind a layer is |b - a| / |a| with a and b the residual streams and norms
over the channels. Of a state it is the same over all its elements. Nothing is fed back, so an error
is all that came of the layers and tokens before; where it jumps, something is lost.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lingc.parity.side import F32, STATE_POSITIONS, Scores

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Behind one layer, over all tokens.

    Attributes:
        layer: Absolute; that of the MTP layer follows the last.
        mean: Over tokens.
        max: Of any token.
    """

    layer: int
    mean: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StateError:
    """Of one layer's state after so many tokens.

    Attributes:
        rows: Rows that are so long.
        mean: Over these.
        max: Of any of them.
    """

    layer: int
    position: int
    rows: int
    mean: float
    max: float


@dataclass(slots=True)
class Inside:
    """Gathers rows."""

    _layers: dict[int, list[F64]] = field(default_factory=dict)
    _states: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def add(self, reference: Scores, other: Scores) -> None:
        """Compare what both sides tell of a row."""
        for layer in reference.layers.keys() & other.layers.keys():
            found = relative(reference.layers[layer], other.layers[layer])
            self._layers.setdefault(layer, []).append(found)
        for key in reference.states.keys() & other.states.keys():
            a, b = (side.states[key].reshape(1, -1) for side in (reference, other))
            self._states.setdefault(key, []).append(float(relative(a, b)[0]))

    @property
    def layers(self) -> tuple[LayerError, ...]:
        """By layer."""
        return tuple(self._layer_errors())

    @property
    def states(self) -> tuple[StateError, ...]:
        """By layer and position; of the ends of rows, that of the longest."""
        last = max((position for _, position in self._states), default=0)
        return tuple(
            StateError(
                layer=layer,
                position=position,
                rows=len(found),
                mean=float(np.mean(found)),
                max=float(np.max(found)),
            )
            for (layer, position), found in sorted(self._states.items())
            if position in STATE_POSITIONS or position == last
        )

    @property
    def tokens(self) -> Mapping[int, F64]:
        """Layer -> errors of all tokens, row after row."""
        return {layer: np.concatenate(parts) for layer, parts in sorted(self._layers.items())}

    def _layer_errors(self) -> Iterator[LayerError]:
        for layer, errors in self.tokens.items():
            yield LayerError(layer=layer, mean=float(errors.mean()), max=float(errors.max()))


def relative(a: F32, b: F32) -> F64:
    """|b - a| / |a| of rows [N, D] in f64; infinite where a value is not finite."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wide = a.astype(np.float64)
        error = np.linalg.norm(b - wide, axis=-1)
        size = np.linalg.norm(wide, axis=-1)
        found: F64 = np.where(error == 0, 0.0, error / size)
    return np.where(np.isfinite(found), found, np.inf)
