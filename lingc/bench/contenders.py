"""The two kinds of side that can be timed."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from lingc.model.block import State
from lingc.model.model import LingModel
from lingc.runtime.backend import Array, Backend
from lingc.runtime.slots import Lease, Piece, SlotTable
from lingc.runtime.steps import Steps

Tokens = Sequence[int]

CHUNK = 512
"""Most tokens of a prefill step, as in generation."""


class Contender(Protocol):
    """One side of a timing."""

    def prefill(self, prompt: Tokens) -> Array:
        """Logits [vocab] after a prompt, from an empty state."""
        ...

    def begin(self, rows: Sequence[Tokens]) -> None:
        """Have these rows behind the steps that follow."""
        ...

    def step(self, tokens: Tokens) -> Array:
        """Logits [B, vocab] after one more token of each row."""
        ...


class Engine:
    """A started engine, its state kept by the runtime's own table."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._leases: list[Lease] = []
        self._length = 0
        self._reset()

    def prefill(self, prompt: Tokens) -> Array:
        self._reset()
        logits: Array = self._feed([prompt])[0]
        return logits

    def begin(self, rows: Sequence[Tokens]) -> None:
        self._reset()
        self._feed(rows)

    def step(self, tokens: Tokens) -> Array:
        pieces = [
            Piece(lease=lease, position=self._length, tokens=[token])
            for lease, token in zip(self._leases, tokens, strict=True)
        ]
        self._length += 1
        return self._steps.decode(pieces, [0] * len(pieces))

    def _reset(self) -> None:
        limits, page_size = self.backend.limits, self.backend.plan.page_size
        table = SlotTable(limits, page_size)
        self._steps = Steps(self.backend, table)
        share = limits.pages // limits.slots * page_size
        self._leases = [table.admit(share) for _ in range(limits.slots)]

    def _feed(self, rows: Sequence[Tokens]) -> Array:
        self._leases = self._leases[: len(rows)]
        self._length = len(rows[0])
        width = max(1, CHUNK // len(rows))
        logits: Array = np.empty(0, np.float32)
        for start in range(0, self._length, width):
            pieces = [
                Piece(lease=lease, position=start, tokens=row[start : start + width])
                for lease, row in zip(self._leases, rows, strict=True)
            ]
            logits, _ = self._steps.prefill(pieces)
        return logits


class Eager:
    """The module with its own cache; its experts are gathered, not looped over, for few tokens."""

    def __init__(self, module: LingModel) -> None:
        self.module = module
        self._state: State | None = None

    def prefill(self, prompt: Tokens) -> Array:
        logits: Array = self._last([prompt], None)[0]
        return logits

    def begin(self, rows: Sequence[Tokens]) -> None:
        self._state = self.module.new_state(len(rows))
        self._last(rows, self._state)

    def step(self, tokens: Tokens) -> Array:
        return self._last([[token] for token in tokens], self._state)

    def _last(self, rows: Sequence[Tokens], state: State | None) -> Array:
        with torch.inference_mode():
            ids = torch.tensor([list(row) for row in rows])
            hidden = self.module.forward_hidden(ids, state)
            logits = self.module.logits(hidden[:, -1])
        found: Array = logits.numpy()
        return found
