"""Runs a CUDA engine: buckets recorded as graphs, replayed over memory that is laid out once.

A step is copied to the device in one piece, runs as one graph, and its results are copied back.
Neither torch nor a compiler is needed: the driver does everything.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingc.device import Binary, Device, Pinned
from lingc.engine import Package
from lingc.errors import IncompatibleError, UsageError
from lingc.launch_table import Bucket
from lingc.plan import Plan, Program, TensorType
from lingc.runtime.backend import Array, Limits, SlotState, Ticket
from lingc.runtime.cuda_bucket import AGAIN, DRAWN, SAMPLE, WHOLE, BoundBucket
from lingc.runtime.cuda_code import CudaCode, all_sizes, check, read_code, read_kernel
from lingc.runtime.cuda_inputs import (
    EVEN,
    NUMPY_DTYPE,
    ROWS,
    TOKENS,
    drawing,
    fill,
    halves,
    order,
    reachable,
    runs,
    sizes_of,
    smallest,
    too_large,
    view_of,
)
from lingc.runtime.cuda_memory import DeviceMemory, Held
from lingc.runtime.cuda_rounds import CudaRounds
from lingc.runtime.cuda_state import CudaState
from lingc.runtime.cuda_weights import upload_weights
from lingc.weights import Progress

IDS = "token_ids"

GIVE_BYTES = 1 << 20
"""Room for a step's inputs to begin with; it grows to what the largest step needs."""

FETCH_BYTES = 4 << 20
"""What is copied back at once: several rows of logits."""


@dataclass(slots=True, kw_only=True)
class _Turn:
    """Pinned memory of a queued step: its inputs, and its tokens."""

    given: Pinned
    fetched: Pinned
    queued: "Queued | None" = None  # whose tokens were not taken


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Queued:
    """A queued step; see `lingc.runtime.backend.Ticket`."""

    event: Any
    turn: _Turn
    rows: int


class CudaBackend:
    """A loaded engine; `lingc.runtime.backend.Backend` says what it does.

    Outputs in bf16 come as their bits, and `hidden` may be given so or in f32.

    Args:
        package: A checked package of the kind `cuda`, or its code.
        weights: Its weights, by name, as they are stored; None leaves their memory as it is, for
            whoever fills it (`weight`).
        limits: How many slots and pages of state to hold.
        threads: Threads that read weights; as many as help where None.
        progress: Told while weights are loaded.
        device: The first one where None.

    Raises:
        IncompatibleError: The device or its driver cannot run the engine.
        ResourceError: The device has not enough free memory.
        UsageError: More slots than the largest bucket has sequences.
        IntegrityError: The code is not what a build makes.
    """

    def __init__(
        self,
        package: Package | CudaCode,
        weights: Mapping[str, Array] | None,
        limits: Limits,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
        device: Device | None = None,
    ) -> None:
        code = package if isinstance(package, CudaCode) else read_code(package)
        check(code)
        self._code, self._limits = code, limits
        every = {
            phase: sorted((b for b in code.table.buckets if b.phase == phase), key=order)
            for phase in code.plan.programs
        }
        _check_slots(every, limits)
        self._buckets = {
            phase: reachable(phase, buckets, limits) for phase, buckets in every.items()
        }
        self.device = device or Device()
        self._owns_device = device is None
        self._kernels: dict[int, Binary] = {}
        self._bound: dict[int, BoundBucket] = {}
        self._pinned: list[Pinned] = []
        self._turns: list[_Turn] = []
        self._drawn_programs: dict[str, Program] = {}
        self._rounds: CudaRounds | None = None
        self._drawn: Held | None = None
        """Where the step before drew its tokens, if it was queued."""
        used = [bucket for buckets in self._buckets.values() for bucket in buckets]
        self._memory = DeviceMemory(self.device, code, limits, used)
        axes = {name: str(kind.shape[0]) for name, kind in code.plan.states.items()}
        self._state = CudaState(self.device, self._memory.states, axes, self._fetch)
        try:
            if weights is not None:
                upload_weights(
                    self.device, weights, self._memory.weights, progress=progress, threads=threads
                )
            self._given = self._pin(GIVE_BYTES)
            self._fetched = self._pin(FETCH_BYTES)
        except BaseException:
            self.close()
            raise

    @property
    def plan(self) -> Plan:
        return self._code.plan

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def prefill_tokens(self) -> int:
        """The most tokens of a prefill step."""
        return max(bucket.sizes["T"] for bucket in self._buckets["prefill"])

    @property
    def batch_invariant(self) -> bool:
        return self._code.batch_invariant

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one phase; see `lingc.runtime.backend.Backend`.

        Raises:
            UsageError: The plan has no such phase, or no bucket holds the step.
            InputError: An input is missing, or of another type or shape.
        """
        return self._run(phase, self._program(phase), WHOLE, inputs)

    def can_draw(self, phase: str) -> bool:
        steps = self._code.table.phases[phase].steps
        return bool(steps) and steps[-1].op == SAMPLE

    def draw(self, phase: str, inputs: Mapping[str, Array], draws: Mapping[str, Array]) -> Array:
        program = self._drawing(phase)
        return self._run(phase, program, DRAWN, {**inputs, **draws})[TOKENS]

    def queue(
        self, inputs: Mapping[str, Array], draws: Mapping[str, Array], *, chained: bool = False
    ) -> Queued:
        phase = "decode"
        program = self._drawing(phase)
        given = {**inputs, **draws}
        bucket = smallest(phase, self._buckets[phase], sizes := sizes_of(phase, program, given))
        if bucket is None:
            raise too_large(phase, sizes)
        bound = self._bind(bucket)
        turn = self._turn()
        ids = bound.value(IDS, program.types[IDS])
        if chained:
            if self._drawn is None or self._drawn.bytes != ids.bytes:
                raise UsageError("a decode step takes over the tokens of a step that was not ahead")
            if self._drawn.address != ids.address:
                self.device.copy(ids.address, self._drawn.address, ids.bytes)
        self._give(bound, program, given, turn.given, kept=IDS if chained else None)
        bound.replay(DRAWN)
        tokens = _first_rows(bound, program.types[TOKENS], TOKENS, sizes)
        self.device.download(turn.fetched.address, tokens.address, tokens.bytes)
        self._drawn = bound.value(TOKENS, program.types[TOKENS])
        turn.queued = Queued(event=self.device.mark(), turn=turn, rows=sizes["B"])
        return turn.queued

    def take(self, ticket: Ticket) -> Array:
        assert isinstance(ticket, Queued), "a ticket of another backend"
        if ticket.turn.queued is not ticket:
            raise UsageError("the tokens of a queued step are taken once")
        self.device.wait(ticket.event)
        ticket.turn.queued = None
        found: Array = ticket.turn.fetched.array.view(np.int32)[: ticket.rows].copy()
        return found

    def rounds(self, drafts: int) -> CudaRounds:
        self._drawn = None  # rounds have the arena
        if self._rounds is None or self._rounds.drafts != drafts:
            self._end_rounds()
            self._rounds = CudaRounds(
                self.device, self._code, self._memory, self._limits, self._kernel, self._buckets,
                drafts,
            )  # fmt: skip
        return self._rounds

    def _end_rounds(self) -> None:
        if self._rounds is not None:
            self._rounds.close()
            self._rounds = None

    def state(self, name: str) -> Array:
        """A copy of a state tensor, scratch included; bf16 widened."""
        return self._state.whole(name)

    def save_slot(self, slot: int) -> SlotState:
        return self._state.save_slot(slot)

    def load_slot(self, slot: int, saved: SlotState) -> None:
        self._state.load_slot(slot, saved)

    def save_rows(self, rows: Array) -> SlotState:
        return self._state.save_rows(rows)

    def load_rows(self, rows: Array, saved: SlotState) -> None:
        self._state.load_rows(rows, saved)

    @property
    def code(self) -> CudaCode:
        """What runs."""
        return self._code

    def weight(self, name: str) -> Held:
        """Where a weight lies on the device."""
        return self._memory.weights[name]

    def held_state(self, name: str) -> Held:
        """Where a state tensor lies on the device, scratch included."""
        return self._state.place(name)

    def prepare(self, phase: str, inputs: Mapping[str, Array]) -> BoundBucket:
        """The bucket that a step runs in, with its inputs in place and nothing run; see `run`.

        Of rows of logits the bucket has room for, those in front.
        """
        program = self._program(phase)
        bucket = smallest(phase, self._buckets[phase], sizes := sizes_of(phase, program, inputs))
        if bucket is None:
            raise too_large(phase, sizes)
        bound = self._bind(bucket)
        self._drawn = None
        rows, most = inputs.get(ROWS), bound.sizes.get("N", 0)
        now = inputs if rows is None else {**inputs, ROWS: rows[:most]}
        self._give(bound, program, now, self._block(bucket, program))
        self._finish()
        return bound

    def close(self) -> None:
        # A device that has failed answers nothing any more, and what it was asked last is told.
        with suppress(IncompatibleError):
            self._close()

    def _close(self) -> None:
        for turn in self._turns:
            if turn.queued is not None:
                self.take(turn.queued)
        self._turns.clear()
        self._end_rounds()
        self.device.synchronize()
        for bound in self._bound.values():
            bound.close()
        self._bound.clear()
        for pinned in self._pinned:
            self.device.unpin(pinned)
        self._pinned.clear()
        self._memory.close()
        self._kernels.clear()
        if self._owns_device:
            self.device.close()

    # ------------------------------------------------------------------------------------- a step

    def _program(self, phase: str) -> Program:
        program = self.plan.programs.get(phase)
        if program is None:
            known = ", ".join(self.plan.programs)
            raise UsageError(f"the engine has no phase {phase!r}", hint=f"it has: {known}")
        return program

    def _drawing(self, phase: str) -> Program:
        """A phase with the drawing of tokens behind it."""
        if phase not in self._drawn_programs:
            self._drawn_programs[phase] = drawing(self._program(phase))
        return self._drawn_programs[phase]

    def _bind(self, bucket: Bucket) -> BoundBucket:
        key = id(bucket)
        if key not in self._bound:
            self._bound[key] = BoundBucket(
                self.device, self._code, bucket, self._memory, self._limits, self._kernel
            )
        return self._bound[key]

    def _kernel(self, index: int) -> Binary:
        if index not in self._kernels:
            self._kernels[index] = read_kernel(self._code, index)
        return self._kernels[index]

    def _run(
        self, phase: str, program: Program, which: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Outputs of a step, by role; one that is too large for any bucket is run in parts."""
        bucket = smallest(phase, self._buckets[phase], sizes := sizes_of(phase, program, inputs))
        if bucket is None:
            if sizes["B"] < 2:
                raise too_large(phase, sizes)
            return self._run_halves(phase, program, which, inputs)
        bound = self._bind(bucket)
        self._drawn = None
        most = bound.sizes.get("N", 0)
        rows = inputs.get(ROWS)
        now = inputs if rows is None else {**inputs, ROWS: rows[:most]}
        self._give(bound, program, now, self._block(bucket, program))
        bound.replay(which)
        found = {
            role: self._fetch(_first_rows(bound, program.types[name], name, sizes))
            for role, name in program.outputs.items()
        }
        if rows is not None and len(rows) > most:
            more = [found["logits"], *self._more_logits(bound, program, rows[most:])]
            found["logits"] = np.concatenate(more)
        return found

    def _run_halves(
        self, phase: str, program: Program, which: str, inputs: Mapping[str, Array]
    ) -> dict[str, Array]:
        parts = halves(inputs)
        made = [self._run(phase, program, which, part) for part, _, _ in parts]
        found = {}
        for role in program.outputs:
            places = [tokens if role == "hidden" else rows for _, tokens, rows in parts]
            every = np.concatenate([one[role] for one in made])
            found[role] = np.empty_like(every)
            found[role][np.concatenate(places)] = every
        return found

    def _give(
        self,
        bound: BoundBucket,
        program: Program,
        inputs: Mapping[str, Array],
        block: Pinned,
        *,
        kept: str | None = None,
    ) -> None:
        """Copy inputs to where a bucket has them, from the first of them to the last at once.

        Args:
            block: Not copied from any more, and large enough.
            kept: An input that stays as it is on the device.
        """
        places = {name: bound.value(name, program.types[name]) for name in inputs}
        start = min(held.address for held in places.values())
        views = {
            name: view_of(block.array, held, held.address - start) for name, held in places.items()
        }
        fill(bound.bucket.phase, views, inputs, without=() if kept is None else (kept,))
        for first, last in runs(places, kept):
            self.device.upload(first, block.address + first - start, last - first)

    def _block(self, bucket: Bucket, program: Program) -> Pinned:
        """Pinned memory for all inputs of a bucket, when nothing is copied from it."""
        size = self._span(bucket, program)
        if size > len(self._given.array):
            self._unpin(self._given)
            self._given = self._pin(size)
        return self._given

    def _turn(self) -> _Turn:
        """Memory for a queued step: of two, the one that was used longer ago."""
        if not self._turns:
            program, buckets = self._drawing("decode"), self._buckets["decode"]
            size = max(self._span(bucket, program) for bucket in buckets)
            rows = max(bucket.sizes["B"] for bucket in buckets)
            self._turns = [
                _Turn(given=self._pin(size), fetched=self._pin(4 * rows)) for _ in range(2)
            ]
        self._turns.reverse()
        if self._turns[0].queued is not None:
            raise UsageError("a third step is queued before the first one's tokens were taken")
        return self._turns[0]

    def _span(self, bucket: Bucket, program: Program) -> int:
        """Bytes from the first input of a bucket to the end of the last."""
        phase = self._code.table.phases[bucket.phase]
        offsets = dict(zip(phase.arena, bucket.offsets, strict=True))
        sizes = all_sizes(bucket.sizes)
        starts = {name: offsets[phase.values[name]] for name in program.inputs}
        ends = (start + program.types[name].bytes(sizes) for name, start in starts.items())
        return max(ends) - min(starts.values())

    def _more_logits(self, bound: BoundBucket, program: Program, rows: Array) -> Iterator[Array]:
        """Logits of more rows than a bucket has room for, so many at a time.

        What they are computed from is an output of the step, so that it is still there.
        """
        most = bound.sizes["N"]
        name = program.outputs["logits"]
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            self._give(bound, program, {ROWS: part}, self._given)
            bound.replay(AGAIN)
            yield self._fetch(_first_rows(bound, program.types[name], name, {"N": len(part)}))

    def _fetch(self, held: Held) -> Array:
        """A copy of a tensor; what is on the stream before it is done then."""
        found = np.empty(held.kind.bind({}), NUMPY_DTYPE[held.kind.dtype])
        raw, pinned = found.reshape(-1).view(np.uint8), self._fetched
        for start in range(0, held.bytes, FETCH_BYTES):
            size = min(FETCH_BYTES, held.bytes - start)
            self.device.download(pinned.address, held.address + start, size)
            self._finish()
            raw[start : start + size] = pinned.array[:size]
        return found

    def _finish(self) -> None:
        self.device.wait(self.device.mark())

    def _pin(self, size: int) -> Pinned:
        self._pinned.append(self.device.pin(size))
        return self._pinned[-1]

    def _unpin(self, pinned: Pinned) -> None:
        self._pinned.remove(pinned)
        self.device.unpin(pinned)


def _check_slots(buckets: Mapping[str, Sequence[Bucket]], limits: Limits) -> None:
    """Refuse more sequences than a step can have."""
    for phase, found in buckets.items():
        spare = 0 if phase in EVEN or phase == "draft" else 1
        most = max(bucket.sizes["B"] for bucket in found) - spare
        if limits.slots > most and phase in ("prefill", "decode"):
            raise UsageError(
                f"slots is {limits.slots}, the engine takes at most {most} sequences in a "
                f"{phase} step",
                hint=f"load it with {most} slots; other requests wait",
            )


def _first_rows(bound: BoundBucket, kind: TensorType, name: str, sizes: Mapping[str, int]) -> Held:
    """The rows of an output that belong to the step itself."""
    whole = bound.value(name, kind)
    axis = str(kind.shape[0])
    rows = min(sizes[axis], bound.sizes[axis])
    found = TensorType(kind.dtype, (rows, *whole.kind.shape[1:]))
    return Held(kind=found, address=whole.address, bytes=found.bytes())
