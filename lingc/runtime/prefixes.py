"""What several prompts begin with, computed once."""

from lingc.runtime.backend import Array
from lingc.runtime.saved import Prefix, save
from lingc.runtime.sequence import Request
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import Piece
from lingc.runtime.speculative import Speculator
from lingc.runtime.steps import Steps


def compute(
    steps: Steps, speculator: Speculator | None, request: Request, *, prefill_tokens: int
) -> Prefix:
    """Feed the prompt of a request in chunks, and keep what the model makes of it."""
    table, tokens = steps.table, request.tokens
    s = Running(
        index=0, request=request, lease=table.admit(len(tokens)), limit=len(tokens) + 1, text=None,
        stop_ids=frozenset(),
    )  # fmt: skip
    hidden: Array | None = None
    try:
        while s.is_prefilling:
            some = tokens[s.fed : s.fed + prefill_tokens]
            _, states = steps.prefill([Piece(lease=s.lease, position=s.fed, tokens=some)])
            s.fed += len(some)
            if speculator is None:
                continue
            hidden = states[-1].copy()
            if s.is_prefilling:
                speculator.feed([s], [states])
            elif len(states) > 1:  # each prompt knows by itself what follows the last token
                s.fed -= 1
                speculator.feed([s], [states[:-1]])
                s.fed += 1
        saved = save(steps.backend, table, s.lease, s.fed)
    finally:
        table.release(s.lease)
    return Prefix(tokens=tokens, saved=saved, hidden=hidden)
