"""One call of each phase, with the packed arrays that it takes."""

from collections.abc import Sequence

import numpy as np

from lingc.errors import LingcError
from lingc.runtime.backend import Array, Backend, Drawing, Ticket
from lingc.runtime.sampling import Draws
from lingc.runtime.slots import Piece, SlotTable


class Steps:
    """The phases of a backend, over the slots and pages of a table."""

    def __init__(self, backend: Backend, table: SlotTable) -> None:
        self.backend = backend
        self.table = table

    def prefill(self, pieces: Sequence[Piece]) -> tuple[Array, Array]:
        """Logits after the last token of each piece [B, vocab], hidden of all tokens [T, D]."""
        out = self._run("prefill", pieces, {"logit_rows": _last_rows(pieces)})
        return out["logits"], out["hidden"]

    def decode(self, pieces: Sequence[Piece], accepted: Sequence[int]) -> Array:
        """Logits after the one token of each piece [B, vocab]."""
        return self._run("decode", pieces, {"accepted": np.array(accepted, np.int32)})["logits"]

    def draw_prefill(self, pieces: Sequence[Piece], draws: Draws) -> Array:
        """The token after each piece [B], of a backend that draws tokens itself."""
        inputs = self._inputs("prefill", pieces, {"logit_rows": _last_rows(pieces)})
        return self._drawing().draw("prefill", inputs, draws)

    def queue(self, pieces: Sequence[Piece], draws: Draws, *, chained: bool) -> Ticket:
        """Begin a decode step; see `lingc.runtime.backend.Drawing`."""
        none = np.zeros(len(pieces), np.int32)  # nothing is pending in a run that only decodes
        inputs = self._inputs("decode", pieces, {"accepted": none})
        return self._drawing().queue(inputs, draws, chained=chained)

    def verify(self, pieces: Sequence[Piece], accepted: Sequence[int]) -> tuple[Array, Array]:
        """Logits [B, Q, vocab] and hidden [B, Q, D] of pieces of Q tokens each.

        Their linear state stays pending: the next decode or verify says how many were accepted.
        """
        out = self._run("verify", pieces, {"accepted": np.array(accepted, np.int32)})
        shape = (len(pieces), len(pieces[0].tokens), -1)
        return out["logits"].reshape(shape), out["hidden"].reshape(shape)

    def draft(self, pieces: Sequence[Piece], hidden: Array) -> tuple[Array, Array]:
        """The draft layer over (hidden of a token, the token after it).

        Returns logits and hidden of the last token of each piece: [B, vocab], [B, D].
        """
        last = _last_rows(pieces)
        out = self._run("draft", pieces, {"hidden": hidden, "logit_rows": last})
        return out["logits"], out["hidden"][last]

    def _run(
        self, phase: str, pieces: Sequence[Piece], special: dict[str, Array]
    ) -> dict[str, Array]:
        return self.backend.run(phase, self._inputs(phase, pieces, special))

    def _inputs(
        self, phase: str, pieces: Sequence[Piece], special: dict[str, Array]
    ) -> dict[str, Array]:
        given = self.table.pack(pieces) | special
        wanted = self.backend.plan.programs[phase].inputs
        unknown = [name for name in wanted if name not in given]
        if unknown:
            raise LingcError(
                f"the engine's {phase} program asks for {', '.join(map(repr, unknown))}",
                hint="it was built by another version of lingc; build it again with this one",
            )
        return {name: given[name] for name in wanted}

    def _drawing(self) -> Drawing:
        assert isinstance(self.backend, Drawing), "who asks knows that it draws"
        return self.backend


def _last_rows(pieces: Sequence[Piece]) -> Array:
    return np.cumsum([len(piece.tokens) for piece in pieces], dtype=np.int32) - 1
