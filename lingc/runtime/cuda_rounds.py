"""Speculative rounds of a CUDA engine: one graph a round, over memory that stays between rounds.

`lingc.round_memory` says what a round is and what it keeps. A graph takes nothing from the host but
what is known before the round ahead of it is read: pages, and how much room there is in them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingc.device import Binary, Device, Graph, Pinned
from lingc.errors import ResourceError, UsageError
from lingc.kernel import align
from lingc.launch_table import Bucket, LaunchTable, TablePhase, TableStep, TableTactic
from lingc.plan import Plan, TensorType
from lingc.round_memory import LOGITS, ROUND, pitch, round_program
from lingc.runtime.backend import Array, Limits, RoundStart
from lingc.runtime.cuda_bucket import DRAWN, SAMPLE, WHOLE, BoundBucket, BoundLaunch, record
from lingc.runtime.cuda_code import CudaCode, all_sizes
from lingc.runtime.cuda_inputs import NUMPY_DTYPE, view_of
from lingc.runtime.cuda_memory import DeviceMemory, Held

_TOLD = ("token_ids", "accepted")
"""What the host reads, side by side."""

_RENEWED = ("rooms", "forced")
"""What the host gives each round, beside the page table; side by side."""

_LARGE = ("tokens", "chained", "hidden", "draft_logits", "page_table")
"""What is not given at the start with the small tensors, which lie before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Buckets of one number of sequences, tokens of each, and pages."""

    round: Bucket
    verify: Bucket
    single: Bucket
    """The draft layer over a token of each sequence."""
    draft: Bucket
    """The draft layer over what a verify leaves."""

    @property
    def sequences(self) -> int:
        return self.round.sizes["B"]

    @property
    def pages(self) -> int:
        return self.round.sizes["P"]


@dataclass(slots=True, kw_only=True)
class _Turn:
    """Pinned memory of a round on its way: what it is given, and what it tells."""

    given: Pinned
    fetched: Pinned
    queued: "QueuedRound | None" = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueuedRound:
    """A queued round; see `lingc.runtime.backend.Ticket`."""

    event: Any
    turn: _Turn
    sequences: int
    padded: int


class CudaRounds:
    """Rounds of one number of drafts; `lingc.runtime.backend.DeviceRounds` says what it does.

    Args:
        buckets: Of verify and draft, those that may be run.
        kernel: The kernel of a number in the table.

    Raises:
        ResourceError: The device has no room for what rounds keep.
    """

    def __init__(
        self,
        device: Device,
        code: CudaCode,
        memory: DeviceMemory,
        limits: Limits,
        kernel: Callable[[int], Binary],
        buckets: Mapping[str, Sequence[Bucket]],
        drafts: int,
    ) -> None:
        self.drafts = drafts
        self._device, self._code, self._memory = device, code, memory
        self._limits, self._kernel = limits, kernel
        self._each = drafts + 1
        self._types = round_program(code.plan).types
        self._sizes = _sizes(code, buckets, self._each)
        self._graphs: dict[int, Graph] = {}
        self._now: _Sizes | None = None
        self._count = 0
        self._shown: dict[str, Array] = {}
        self._pinned: list[Pinned] = []
        self._turns: list[_Turn] = []
        self._address = 0
        if self._sizes:
            try:
                self._take()
            except BaseException:
                self.close()
                raise

    def _take(self) -> None:
        """Memory for the largest sizes, on the device and for what goes there and back."""
        device, drafts = self._device, self.drafts
        # Layouts that differ in pages alone agree up to the page table, which lies last.
        room = max(self._layout(one)[1] for one in self._sizes)
        free, _ = device.memory_bytes()
        if room > free:
            raise ResourceError(
                f"rounds of {drafts} drafts need {room / 1e6:.1f} MB of device memory beside the "
                f"engine; {device.name} has {free / 1e6:.1f} MB free",
                hint="load with fewer slots or tokens, or run with fewer drafts or none",
            )
        self._address = device.allocate(room)
        small = max(self._places(one)["tokens"].address for one in self._sizes) - self._address
        table = max(self._places(one)["page_table"].bytes for one in self._sizes)
        told = max(self._span(one, _TOLD)[1] for one in self._sizes)
        renewed = max(self._span(one, _RENEWED)[1] for one in self._sizes)
        self._start = self._pin(small)
        self._turns = [
            _Turn(given=self._pin(align(renewed) + table), fetched=self._pin(told))
            for _ in range(2)
        ]

    def fits(self, sequences: int, pages: int) -> bool:
        return self._find(sequences, pages) is not None

    def begin(self, start: RoundStart) -> None:
        assert not any(turn.queued for turn in self._turns), "rounds were read or dropped"
        count, each = len(start.tokens), self._each
        sizes = self._find(count, start.pages)
        assert sizes is not None, "who begins has asked"
        places, padded = self._places(sizes), sizes.sequences
        self._now, self._count, self._shown = sizes, count, {}
        block = self._start.array
        block[:] = 0
        views = {
            name: view_of(block, held, held.address - self._address)
            for name, held in places.items()
            if name not in _LARGE
        }
        by_place = {name: views[name].reshape(each, -1) for name in ("drafts", "ahead_positions",
                                                                    "ahead_rows")}  # fmt: skip
        for name in ("token_ids", "cache_rows", "slots", "logit_rows", "ahead_rows", "drafts"):
            views[name][:] = -1
        views["top_p"][:] = 1
        views["token_ids"].reshape(padded, each)[:count, -1] = start.tokens
        views["accepted"][:count] = start.accepted
        views["slots"][:count] = start.slots
        views["offsets"][:] = np.arange(padded + 1) * each
        views["single_offsets"][:] = np.arange(padded + 1)
        views["single_rows"][:] = np.arange(padded)
        by_place["drafts"][0, :count] = start.drafts
        by_place["ahead_positions"][:, :count] = start.positions.T
        by_place["ahead_rows"][:, :count] = start.cache_rows.T
        views["draws"].reshape(each, -1, 6)[:, :count] = (
            start.draws["draws"].reshape(count, each, 6).swapaxes(0, 1)
        )
        for name in ("temperature", "top_k", "top_p"):
            views[name][:count] = start.draws[name][::each]
        device = self._device
        device.upload(self._address, self._start.address, places["tokens"].address - self._address)
        large = {"chained": start.hidden, "draft_logits": start.logits}
        kept = []  # until it is copied
        for name, given in large.items():
            if given is not None:
                kept.append(np.ascontiguousarray(given))
                device.upload(places[name].address, kept[-1].ctypes.data, kept[-1].nbytes)
        device.wait(device.mark())

    def queue(self, page_table: Array, rooms: Array, forced: Array) -> QueuedRound:
        assert self._now is not None, "begin comes first"
        count, pages = page_table.shape
        sizes = self._find(self._now.sequences, pages)
        if sizes is None or (sizes.sequences, count) != (self._now.sequences, self._count):
            raise UsageError("a round is of other sequences than it began with")
        self._turns.reverse()
        turn = self._turns[0]
        if turn.queued is not None:
            raise UsageError("a third round is queued before the first one was read")
        self._now = sizes
        places = self._places(sizes)
        self._renew(sizes, places, turn, page_table, {"rooms": rooms, "forced": forced})
        self._graph(sizes).replay()
        start, size = self._span(sizes, _TOLD)
        self._device.download(turn.fetched.address, start, size)
        turn.queued = QueuedRound(
            event=self._device.mark(), turn=turn, sequences=count, padded=sizes.sequences
        )
        return turn.queued

    def take(self, ticket: QueuedRound) -> tuple[Array, Array]:
        if ticket.turn.queued is not ticket:
            raise UsageError("a queued round is read once")
        self._device.wait(ticket.event)
        ticket.turn.queued = None
        found = ticket.turn.fetched.array.view(np.int32)
        tokens = found[: ticket.padded * self._each].reshape(ticket.padded, self._each)
        accepted = found[align(tokens.nbytes) // 4 :]
        return tokens[: ticket.sequences].copy(), accepted[: ticket.sequences].copy()

    def leads(self, *, has_logits: bool) -> tuple[Array, Array | None, Array]:
        assert self._now is not None, "a round was run"
        places = self._places(self._now)
        logits = self._fetch(places["draft_logits"]) if has_logits else None
        return self._fetch(places["drafts"]), logits, self._fetch(places["chained"])

    def tactics(self) -> list[TableTactic]:
        """What the launches of a round come from; for measurements."""
        assert self._now is not None, "begin comes first"
        table, sizes = self._code.table, self._now
        model = [index for step, index in _steps(table, sizes.verify) if step.op != SAMPLE]
        drafts = [*sizes.draft.tactics, *sizes.single.tactics * (self.drafts - 1)]
        return [table.tactics[index] for index in (*model, *sizes.round.tactics, *drafts)]

    def seconds(self, replays: int) -> list[float]:
        """Seconds of each of some more rounds; for measurements."""
        assert self._now is not None, "begin comes first"
        return self._graph(self._now).seconds(replays)

    def close(self) -> None:
        """Give everything back; the engine goes on without."""
        for turn in self._turns:
            if turn.queued is not None:
                self.take(turn.queued)
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        for pinned in self._pinned:
            self._device.unpin(pinned)
        self._pinned.clear()
        if self._address:
            self._device.free(self._address)
            self._address = 0

    # ------------------------------------------------------------------------------------- memory

    def _find(self, sequences: int, pages: int) -> _Sizes | None:
        found = (one for one in self._sizes if one.sequences >= sequences and one.pages >= pages)
        return next(found, None)

    def _layout(self, sizes: _Sizes) -> tuple[dict[str, int], int]:
        """Where each tensor begins, and where all end."""
        dims, at, found = all_sizes(sizes.round.sizes), 0, {}
        for name, kind in self._types.items():
            if name != LOGITS:
                found[name] = at
                at += align(kind.bytes(dims))
        return found, at

    def _places(self, sizes: _Sizes) -> dict[str, Held]:
        offsets, _ = self._layout(sizes)
        dims, found = all_sizes(sizes.round.sizes), {}
        for name, offset in offsets.items():
            kind = TensorType(self._types[name].dtype, self._types[name].bind(dims))
            found[name] = Held(kind=kind, address=self._address + offset, bytes=kind.bytes())
        return found

    def _span(self, sizes: _Sizes, names: Sequence[str]) -> tuple[int, int]:
        """Where tensors that lie side by side begin, and their bytes."""
        places = self._places(sizes)
        first, last = places[names[0]], places[names[-1]]
        return first.address, last.address + last.bytes - first.address

    def _renew(
        self, sizes: _Sizes, places: Mapping[str, Held], turn: _Turn, page_table: Array,
        small: Mapping[str, Array],
    ) -> None:  # fmt: skip
        """Give the round what differs from the one before."""
        device, count = self._device, self._count
        start, size = self._span(sizes, _RENEWED)
        table = np.zeros((sizes.sequences, sizes.pages), np.int32)
        table[:count, : page_table.shape[1]] = page_table
        given = turn.given
        if not all(self._is_shown(name, new) for name, new in small.items()):
            given.array[:size] = 0
            for name, new in small.items():
                view = view_of(given.array, places[name], places[name].address - start)
                view[:count] = new
                self._shown[name] = new.copy()
            device.upload(start, given.address, size)
        if not self._is_shown("page_table", table):
            at = len(given.array) - places["page_table"].bytes
            view_of(given.array, places["page_table"], at)[...] = table
            device.upload(places["page_table"].address, given.address + at, table.nbytes)
            self._shown["page_table"] = table

    def _is_shown(self, name: str, new: Array) -> bool:
        """Whether the device has it already."""
        return name in self._shown and np.array_equal(self._shown[name], new)

    def _fetch(self, held: Held) -> Array:
        """The rows of the sequences of a tensor."""
        shape = (self._count, *held.kind.bind({})[1:])
        found = np.empty(shape, NUMPY_DTYPE[held.kind.dtype])
        self._device.download(found.ctypes.data, held.address, found.nbytes)
        self._device.wait(self._device.mark())
        return found

    def _pin(self, size: int) -> Pinned:
        self._pinned.append(self._device.pin(size))
        return self._pinned[-1]

    # -------------------------------------------------------------------------------------- graph

    def _graph(self, sizes: _Sizes) -> Graph:
        key = id(sizes.round)
        if key not in self._graphs:
            self._graphs[key] = record(self._device, self._parts(sizes))
        return self._graphs[key]

    def _parts(self, sizes: _Sizes) -> list[list[BoundLaunch]]:
        """Launches of a round, as runs of which each begins when the one before it has ended."""
        at = {name: held.address for name, held in self._places(sizes).items()}
        step = 4 * pitch(sizes.sequences)
        verify = self._bind(sizes.verify, self._verify_buffers(at))
        logits = verify.addresses[_output(self._code, "verify", "logits")]
        between = self._bind(sizes.round, {**at, LOGITS: logits})
        before, *behind = (
            [*between.launches({one.name})] for one in self._code.table.phases[ROUND].steps
        )
        parts = []
        for place in range(1, self.drafts):
            inputs = {
                "token_ids": at["drafts"] + (place - 1) * step,
                "positions": at["ahead_positions"] + (place - 1) * step,
                "cache_rows": at["ahead_rows"] + (place - 1) * step,
                "hidden": at["chained"],
                "offsets": at["single_offsets"],
                "logit_rows": at["single_rows"],
            }
            bound = self._bind(sizes.single, self._draft_buffers(sizes, at, place) | inputs)
            parts.append([*bound.launches(bound.names(DRAWN))])
        inputs = {
            name: at[name]
            for name in ("token_ids", "positions", "cache_rows", "hidden", "offsets", "logit_rows")
        }
        draft = self._bind(sizes.draft, self._draft_buffers(sizes, at, 0) | inputs)
        model = [*verify.launches(verify.names(WHOLE))]
        parts += [before, [*model, *(one for some in behind for one in some)]]
        parts.append([*draft.launches(draft.names(DRAWN))])
        return parts

    def _bind(self, bucket: Bucket, elsewhere: Mapping[str, int]) -> BoundBucket:
        return BoundBucket(
            self._device, self._code, bucket, self._memory, self._limits, self._kernel,
            elsewhere=elsewhere,
        )  # fmt: skip

    def _verify_buffers(self, at: Mapping[str, int]) -> dict[str, int]:
        names = ("token_ids", "positions", "cache_rows", "offsets", "slots", "page_table",
                 "accepted")  # fmt: skip
        return {
            **{name: at[name] for name in names},
            _output(self._code, "verify", "hidden"): at["hidden"],
        }

    def _draft_buffers(self, sizes: _Sizes, at: Mapping[str, int], place: int) -> dict[str, int]:
        """What the draft layer is given whatever it runs over, and where it leaves a draft."""
        step, sequences = 4 * pitch(sizes.sequences), sizes.sequences
        vocab = self._types["draft_logits"].bind(all_sizes(sizes.round.sizes))[1]
        phase = self._code.table.phases["draft"]
        gathered = _gathered(phase, self._code.plan)
        assert gathered is not None, "sizes are of engines that have it"
        return {
            "page_table": at["page_table"],
            **{name: at[name] for name in ("temperature", "top_k", "top_p")},
            "draws": at["draws"] + place * 6 * step,
            "tokens": at["drafts"] + place * step,
            gathered: at["chained"],
            _output(self._code, "draft", "logits"): at["draft_logits"]
            + place * sequences * vocab * 4,
        }


def _sizes(code: CudaCode, buckets: Mapping[str, Sequence[Bucket]], each: int) -> list[_Sizes]:
    """What rounds of so many tokens a sequence may run in; by sequences, then pages."""
    phases = code.table.phases
    if ROUND not in phases or _gathered(phases["draft"], code.plan) is None:
        return []
    if not any(step.op == SAMPLE for step in phases["draft"].steps):
        return []
    known = {
        (phase, one.sizes.get("T"), one.sizes["B"], one.sizes["P"]): one
        for phase in ("verify", "draft")
        for one in buckets[phase]
        if phase == "verify" or one.sizes["N"] == one.sizes["B"]
    }
    found = []
    for one in code.table.buckets:
        sequences, pages = one.sizes["B"], one.sizes["P"]
        if one.phase != ROUND or one.sizes["T"] != each * sequences:
            continue
        wanted = (
            ("verify", each * sequences, sequences, pages),
            ("draft", sequences, sequences, pages),
            ("draft", each * sequences, sequences, pages),
        )
        if all(key in known for key in wanted):
            verify, single, draft = (known[key] for key in wanted)
            found.append(_Sizes(round=one, verify=verify, single=single, draft=draft))
    return sorted(found, key=lambda one: (one.sequences, one.pages))


def _steps(table: LaunchTable, bucket: Bucket) -> Iterable[tuple[TableStep, int]]:
    """The steps of a bucket, with their tactics."""
    return zip(table.phases[bucket.phase].steps, bucket.tactics, strict=True)


def _output(code: CudaCode, phase: str, role: str) -> str:
    """The buffer of an output."""
    return code.table.phases[phase].values[code.plan.programs[phase].outputs[role]]


def _gathered(phase: TablePhase, plan: Plan) -> str | None:
    """Where the draft layer has the hidden states that its logits are made of, if it has."""
    hidden = phase.values[plan.programs["draft"].outputs["hidden"]]
    for step in phase.steps:
        if step.op == "gather_rows" and step.buffers["x"] == hidden:
            return step.buffers["y"]
    return None
