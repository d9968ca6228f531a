"""One side of a comparison: anything that gives logits for tokens that it is told.

Both sides are fed the same ids, so a difference at one position is not the echo of another token
chosen earlier. The modes feed an engine through its different programs; they mean the same maths.

Axis letters: N scored tokens of a row, V vocabulary, E experts, k experts a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Tokens = Sequence[int]

Mode = Literal["prefill", "decode", "verify", "rollback", "draft"]
"""How an engine is fed.

prefill: in chunks, several rows packed together.
decode: the first tokens by prefill, then one token a step.
verify: the first tokens by prefill, then as many a step as the engine takes, all accepted.
rollback: as verify, but a step's last tokens are wrong ones, which are then not accepted.
draft: the MTP layer, over the hidden states of prefill; it predicts the token after next.
"""

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which experts the tokens of a row went to in one layer.

    Attributes:
        ids: [N, k].
        biased: What they were chosen by, sigmoid of the logits plus bias [N, E]; None where the
            side cannot tell.
    """

    ids: I32
    biased: F32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a side says of one row.

    Attributes:
        logits: After each token, [N, V]; N is one less than the row's length in draft mode.
        experts: Layer -> choice, of the layers that the side can tell of.
        layers: Layer -> residual stream behind it [N, D], likewise.
        states: (Linear layer, position) -> its state [H, K, V] when so many tokens have been seen,
            at some of `STATE_POSITIONS` and at the row's end.
    """

    logits: F32
    experts: Mapping[int, Choice]
    layers: Mapping[int, F32] = field(default_factory=dict)
    states: Mapping[tuple[int, int], F32] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen inside of one run, of all its packed tokens."""

    experts: Mapping[int, Choice] = field(default_factory=dict)
    layers: Mapping[int, F32] = field(default_factory=dict)


STATE_POSITIONS = tuple(4**n for n in range(2, 10))
"""Tokens after which linear states are looked at: 16, 64, 256 and so on."""


class Side(Protocol):
    """A model that scores rows of tokens."""

    @property
    def name(self) -> str:
        """What it is, for a person: `engine tiny.ling (onnx, fp8)`."""
        ...

    @property
    def vocab(self) -> int: ...

    def score(self, rows: Sequence[Tokens], mode: Mode) -> list[Scores]:
        """Score the rows, each from an empty state.

        Raises:
            IncompatibleError: The model cannot be run in that mode.
        """
        ...

    def close(self) -> None:
        """Free what it holds. Nothing may be called after it."""
        ...
