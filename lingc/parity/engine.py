"""Anything that implements the runtime's backend as a side: an engine, or an interpreted plan.

The phases get their slots, pages and rows from the runtime's own table, so that what is proven is
what generation uses. Logits of every token are asked for where a phase lets one ask.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lingc.errors import IncompatibleError
from lingc.parity.side import F32, STATE_POSITIONS, Choice, Mode, Scores, Seen, Tokens
from lingc.plan import Plan, Ref, Step
from lingc.runtime.backend import Array, Backend
from lingc.runtime.slots import Lease, Piece, SlotTable

LEAD = 16
"""Tokens by prefill before the steps of decode and verify, so that the handing over is compared."""

Tap = Callable[[Mapping[str, Array]], Seen]
"""What was seen of a run's packed tokens, given what the run returned."""

_PHASES: Mapping[Mode, tuple[str, ...]] = {
    "prefill": ("prefill",),
    "decode": ("prefill", "decode"),
    "verify": ("prefill", "verify", "decode"),
    "rollback": ("prefill", "verify", "decode"),
    "draft": ("prefill", "draft"),
}


ROUTERS = ("lingc.router", "lingc.norm_router")
"""The ops that choose experts; their first result is the ids."""


def router_outputs(plan: Plan) -> dict[str, int]:
    """Name of the ids of each router -> its layer."""
    steps = (step for program in plan.programs.values() for step in program.steps)
    return {step.outputs[0]: step.layer for step in steps if step.op in ROUTERS}


def layer_outputs(plan: Plan) -> dict[str, int]:
    """Name of the residual stream behind each layer -> the layer.

    It is what the norm of the next layer reads, or the last norm of all.
    """
    layers = plan.config["num_hidden_layers"]
    norms = {f"model.layers.{i + 1}.input_layernorm.weight": i for i in range(layers - 1)}
    norms |= {"model.norm.weight": layers - 1}
    norms |= {f"model.layers.{layers}.final_layernorm.weight": layers}
    found: dict[str, int] = {}
    for program in plan.programs.values():
        for step in program.steps:
            for name in (arg.name for arg in step.args if isinstance(arg, Ref)):
                spec = plan.weights.get(name)
                if spec is not None and len(spec.sources) == 1 and spec.sources[0] in norms:
                    found[_normed(step)] = norms[spec.sources[0]]
    return found


def _normed(step: Step) -> str:
    """What a norm is taken of: the sum that it makes, or what it reads."""
    if step.op in ("lingc.add_rms_norm", "lingc.add_rms_norm_fp8"):
        return step.outputs[1]
    first = step.args[0]
    assert isinstance(first, Ref), "a norm reads a tensor"
    return first.name


def tap_outputs(plan: Plan) -> Tap:
    """A tap for a backend that returns, beside its outputs, what `taps` names."""
    experts, layers = router_outputs(plan), layer_outputs(plan)
    return lambda out: Seen(
        experts={layer: Choice(ids=out[name]) for name, layer in experts.items() if name in out},
        layers={layer: out[name] for name, layer in layers.items() if name in out},
    )


def taps(plan: Plan) -> tuple[str, ...]:
    """Values that `tap_outputs` wants to see."""
    return (*router_outputs(plan), *layer_outputs(plan))


def phases(mode: Mode) -> tuple[str, ...]:
    """The programs that a mode runs."""
    return _PHASES[mode]


@dataclass(slots=True, kw_only=True)
class _Running:
    """A row under way.

    Attributes:
        tokens: The row.
        fed: Tokens that the model has seen.
        accepted: Of the tokens that the last verify left pending, how many to commit.
        logits: Blocks of scored tokens, in order.
        experts: Layer -> blocks of choices.
        layers: Layer -> blocks of the residual stream.
        states: (Layer, position) -> state.
    """

    tokens: Tokens
    lease: Lease
    fed: int = 0
    accepted: int = 0
    logits: list[F32] = field(default_factory=list)
    experts: dict[int, list[Choice]] = field(default_factory=dict)
    layers: dict[int, list[F32]] = field(default_factory=dict)
    states: dict[tuple[int, int], F32] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.fed


class EngineSide:
    """Implements `lingc.parity.side.Side` with a backend.

    Args:
        backend: Its limits say how many rows and how long a row can be scored at once.
        name: What to call it.
        tap: Tells the experts, where the backend can.
        chunk: Most tokens of a row in a prefill step.
    """

    def __init__(
        self, backend: Backend, name: str, *, tap: Tap | None = None, chunk: int = 128
    ) -> None:
        self.backend = backend
        self.name = name
        self.vocab: int = backend.plan.config["vocab_size"]
        self._tap = tap
        self._chunk = chunk

    def score(self, rows: Sequence[Tokens], mode: Mode) -> list[Scores]:
        missing = [phase for phase in phases(mode) if phase not in self.backend.plan.programs]
        if missing:
            raise IncompatibleError(
                f"{self.name} has no {missing[0]!r} program, which mode {mode!r} needs",
                hint="leave that mode out, or build the engine from weights that have that part",
            )
        table = SlotTable(self.backend.limits, self.backend.plan.page_size)
        running = [_Running(tokens=row, lease=table.admit(len(row))) for row in rows]
        _Scoring(self.backend, table, self._tap, self._chunk).run(running, mode)
        return [_scores(row) for row in running]

    def close(self) -> None:
        self.backend.close()


class _Scoring:
    """The steps that take a batch of rows to their ends."""

    def __init__(self, backend: Backend, table: SlotTable, tap: Tap | None, chunk: int) -> None:
        self.backend = backend
        self.table = table
        self.tap = tap
        self.chunk = chunk
        stem = "linear_state."
        self.linear = {
            int(name.removeprefix(stem)): name
            for name in backend.plan.states
            if name.startswith(stem)
        }
        self.seen = Seen()

    def run(self, rows: list[_Running], mode: Mode) -> None:
        if mode == "draft":
            self._draft(rows)
            return
        self._prefill(rows, is_whole=mode == "prefill")
        if mode in ("verify", "rollback"):
            self._verify(rows, is_wrong=mode == "rollback")
        while ready := [row for row in rows if row.left]:
            self._decode(ready)

    def _prefill(self, rows: list[_Running], *, is_whole: bool) -> None:
        ends = [len(r.tokens) if is_whole else min(LEAD, len(r.tokens) // 2) for r in rows]
        while ready := [(r, end) for r, end in zip(rows, ends, strict=True) if r.fed < end]:
            counts = [min(self.chunk, end - r.fed) for r, end in ready]
            self._step("prefill", [r for r, _ in ready], counts)

    def _decode(self, rows: list[_Running]) -> None:
        self._step("decode", rows, [1] * len(rows))
        for row in rows:
            row.accepted = 0

    def _verify(self, rows: list[_Running], *, is_wrong: bool) -> None:
        width = self.backend.plan.max_draft + 1
        turn = 0
        while ready := [row for row in rows if row.left >= width]:
            # 1 ... width tokens are right, all turns apart, and another number for each row.
            right = [(turn + i) % width + 1 if is_wrong else width for i in range(len(ready))]
            self._step("verify", ready, right, width=width)
            for row, count in zip(ready, right, strict=True):
                row.accepted = count
            turn += 1

    def _draft(self, rows: list[_Running]) -> None:
        """Prefill and the MTP layer after it, chunk by chunk as in generation."""
        while ready := [row for row in rows if row.left > 1]:
            counts = [min(self.chunk, row.left - 1) for row in ready]
            pieces = [_piece(row, count) for row, count in zip(ready, counts, strict=True)]
            hidden = self._run("prefill", pieces)["hidden"]
            main = self.seen
            later = [
                Piece(lease=p.lease, position=p.position, tokens=row.tokens[p.position + 1 :][:n])
                for row, p, n in zip(ready, pieces, counts, strict=True)
            ]
            out = self._run("draft", later, hidden=hidden)
            self.seen = Seen(
                experts={**main.experts, **self.seen.experts},
                layers={**main.layers, **self.seen.layers},
            )
            self._keep(ready, counts, counts, out["logits"])

    def _step(
        self, phase: str, rows: list[_Running], counts: list[int], *, width: int | None = None
    ) -> None:
        """Feed `counts` tokens of each row, filled up to `width` with wrong ones."""
        widths = counts if width is None else [width] * len(rows)
        pieces = [
            _piece(row, count, self._wrong(row, count, size - count))
            for row, count, size in zip(rows, counts, widths, strict=True)
        ]
        accepted = np.array([row.accepted for row in rows], np.int32)
        out = self._run(phase, pieces, accepted=accepted)
        self._keep(rows, counts, widths, out["logits"])
        if phase != "verify":  # which leaves its tokens out of the state
            self._keep_states(rows)

    def _keep_states(self, rows: list[_Running]) -> None:
        for row in rows:
            if row.fed in STATE_POSITIONS or not row.left:
                for layer, name in self.linear.items():
                    state = self.backend.state(name)[row.lease.slot]
                    row.states[layer, row.fed] = np.array(state, np.float32)

    def _wrong(self, row: _Running, count: int, more: int) -> list[int]:
        start = row.fed + count
        vocab: int = self.backend.plan.config["vocab_size"]
        return [(row.tokens[start + i] + 1) % vocab for i in range(more)]

    def _run(
        self,
        phase: str,
        pieces: list[Piece],
        *,
        accepted: Array | None = None,
        hidden: Array | None = None,
    ) -> dict[str, Array]:
        given = self.table.pack(pieces)
        given["logit_rows"] = np.arange(len(given["token_ids"]), dtype=np.int32)
        given |= {} if accepted is None else {"accepted": accepted}
        given |= {} if hidden is None else {"hidden": hidden}
        wanted = self.backend.plan.programs[phase].inputs
        out = self.backend.run(phase, {name: given[name] for name in wanted})
        self.seen = Seen() if self.tap is None else self.tap(out)
        return out

    def _keep(
        self, rows: list[_Running], counts: list[int], widths: list[int], logits: F32
    ) -> None:
        first = 0
        for row, count, width in zip(rows, counts, widths, strict=True):
            part = slice(first, first + count)
            row.logits.append(logits[part])
            for layer, choice in self.seen.experts.items():
                row.experts.setdefault(layer, []).append(_part(choice, part))
            for layer, stream in self.seen.layers.items():
                row.layers.setdefault(layer, []).append(np.array(stream[part], np.float32))
            row.fed += count
            first += width


def _piece(row: _Running, count: int, more: Sequence[int] = ()) -> Piece:
    tokens = [*row.tokens[row.fed : row.fed + count], *more]
    return Piece(lease=row.lease, position=row.fed, tokens=tokens)


def _part(choice: Choice, part: slice) -> Choice:
    biased = None if choice.biased is None else choice.biased[part]
    return Choice(ids=choice.ids[part], biased=biased)


def _scores(row: _Running) -> Scores:
    experts = {}
    for layer, parts in row.experts.items():
        scores = [part.biased for part in parts if part.biased is not None]
        experts[layer] = Choice(
            ids=np.concatenate([part.ids for part in parts]),
            biased=np.concatenate(scores) if len(scores) == len(parts) else None,
        )
    return Scores(
        logits=np.concatenate(row.logits),
        experts=experts,
        layers={layer: np.concatenate(parts) for layer, parts in row.layers.items()},
        states=row.states,
    )
