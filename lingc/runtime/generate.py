"""The generation loop: several requests at once over the slots of one backend.

A step admits what has room, takes one chunk of prompts through prefill, and takes every sequence
whose prompt is done one token further, or one speculative round. Sequences leave when they stop;
requests without a slot wait in order and join between steps.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

from lingc.errors import UsageError
from lingc.plan import dumps
from lingc.runtime import prefixes, sampling
from lingc.runtime.ahead import Ahead, checked, wanted
from lingc.runtime.backend import Array, Backend, Bounded, Drawing, Speculating
from lingc.runtime.rounds import Rounds
from lingc.runtime.saved import Prefix, restore, save
from lingc.runtime.sequence import (
    Completion,
    Parked,
    Request,
    Token,
    check_requests,
    longest_sequence,
    never_started,
)
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import Lease, Piece, SlotTable
from lingc.runtime.speculative import Forced, Speculator
from lingc.runtime.stats import Stats
from lingc.runtime.steps import Steps
from lingc.runtime.tokenizer import Tokenizer

Event = Token | Completion
PREFILL_TOKENS = 512
"""Most tokens of a prefill step, for a backend that does not say what is best."""
BESIDE_TOKENS = 8192
"""Most of them while other sequences wait for their next token."""


class Generator:
    """Continues prompts with one loaded engine.

    Args:
        tokenizer: Without one, completions have no text and stop strings are refused.
        stop_ids: The checkpoint's end-of-turn tokens, for requests that name none.
        prefill_tokens: Most tokens of a prefill step, over all its sequences; what the backend
            does best where None.
        drafts: Tokens drafted a round by the draft layer; 0 decodes plainly.
        force_reject, force_keep: As for `lingc.runtime.speculative.Speculator`.

    Raises:
        UsageError: The engine cannot make that many drafts.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None = None,
        *,
        stop_ids: frozenset[int] = frozenset(),
        prefill_tokens: int | None = None,
        drafts: int = 0,
        force_reject: Forced | None = None,
        force_keep: Forced | None = None,
    ) -> None:
        if prefill_tokens is not None and prefill_tokens < 1:
            raise UsageError(f"prefill_tokens is {prefill_tokens}, at least 1 is needed")
        plan = backend.plan
        self.steps = Steps(backend, SlotTable(backend.limits, plan.page_size))
        forced = {"force_reject": force_reject, "force_keep": force_keep}
        self.speculator = Speculator(self.steps, drafts=drafts, **forced) if drafts else None
        self.forced = forced
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.prefill_tokens = _prefill_tokens(backend, prefill_tokens)
        self.is_batch_invariant = isinstance(backend, Bounded) and backend.batch_invariant
        self.drafts = drafts

    @cached_property
    def plan_digest(self) -> str:
        """SHA-256 of the plan: by which a parked request knows its engine."""
        return hashlib.sha256(dumps(self.steps.backend.plan).encode()).hexdigest()

    def limit(self, request: Request) -> int:
        """Length at which a request's sequence must end.

        The last token is never fed, so it needs no room. A request that names no end gets its
        share of the cache, or all of it where the prompt alone is longer than the share.
        """
        backend = self.steps.backend
        longest, _ = longest_sequence(backend.plan, backend.limits)
        prompt = len(request.tokens)
        if request.max_tokens is not None:
            return min(prompt + request.max_tokens, longest + 1)
        table = self.steps.table
        share = max(table.limits.pages // table.limits.slots, 1) * table.page_size
        return min(share if prompt <= share else longest, longest) + 1

    def start(self, requests: Sequence[Request]) -> "Run":
        """Check the requests and set up a run; nothing is computed yet.

        Raises:
            PromptError: A prompt is empty, too long or out of range.
            UsageError: A request has stop strings and there is no tokenizer.
        """
        self.check(requests)
        return Run(self, requests)

    def check(self, requests: Sequence[Request], first: int = 0) -> None:
        """Refuse requests that cannot be run; they are numbered from `first` on.

        Raises:
            PromptError: A prompt is empty, too long or out of range.
            UsageError: A request has stop strings and there is no tokenizer, or a prefix that is
                not its own.
        """
        backend = self.steps.backend
        has_text = self.tokenizer is not None
        check_requests(requests, backend.plan, backend.limits, has_tokenizer=has_text, first=first)
        for index, request in enumerate(requests, first):
            if request.prefix is not None:
                has_drafts = self.speculator is not None
                request.prefix.check(request.tokens, index=index, has_drafts=has_drafts)

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Compute what several prompts begin with, once; not while a run is under way.

        Raises:
            PromptError: It is empty, too long or out of range.
            UsageError: This kind of engine cannot keep it.
        """
        request = Request(tokens=tuple(tokens), max_tokens=1)
        self.check([request])
        return prefixes.compute(
            self.steps, self.speculator, request, prefill_tokens=self.prefill_tokens
        )

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Tokens as they come, and each request's completion when it ends."""
        with self.start(requests) as run:
            while not run.is_done:
                yield from run.step()

    def generate(
        self, requests: Sequence[Request], *, on_token: Callable[[Token], None] | None = None
    ) -> list[Completion]:
        """All completions, in the order of the requests."""
        found: dict[int, Completion] = {}
        for event in self.stream(requests):
            if isinstance(event, Completion):
                found[event.request] = event
            elif on_token is not None:
                on_token(event)
        return [found[index] for index in range(len(requests))]


class Run:
    """A set of requests under way. Close it, or use it as a context, to free their slots.

    Between steps requests may be added, and such that run be parked and go on later.
    """

    def __init__(self, generator: Generator, requests: Sequence[Request]) -> None:
        self._generator = generator
        self._steps = generator.steps
        self._waiting: deque[tuple[int, Request | Parked]] = deque(enumerate(requests))
        self._count = len(requests)
        self._self = object()  # which another process does not have
        self._running: list[Running] = []
        self._owed: list[Event] = []
        self._ahead = _ahead(generator)
        self._rounds = _rounds(generator)
        self._start = time.perf_counter()
        self.stats = Stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._running or self._owed)

    def add(self, request: Request) -> int:
        """Have one more request wait for its turn; returns its index.

        Raises:
            PromptError, UsageError: As `Generator.start`.
        """
        self._generator.check([request], self._count)
        self._waiting.append((self._count, request))
        self._count += 1
        return self._count - 1

    def park(self, index: int) -> Parked:
        """Take a running request out, with all that it needs to go on; its room is free then.

        What was under way for it is told by the next step.

        Raises:
            UsageError: It does not run, or this kind of engine cannot save what it holds.
        """
        self._owed += self._settle()
        found = [s for s in self._running if s.index == index and s.finish is None]
        if not found:
            raise UsageError(f"request {index} does not run", hint="park one that has begun")
        (s,) = found
        table = self._steps.table
        saved = save(self._steps.backend, table, s.lease, s.fed)
        self._running.remove(s)
        table.release(s.lease)
        return Parked(sequence=s, saved=saved, run=self._self, plan=self._generator.plan_digest)

    def resume(self, parked: Parked) -> int:
        """Have a request that was parked wait for its turn to go on; returns its index here.

        In another run than its own it gets the next index, as if it were added; its tokens are
        drawn as they would have been.

        Raises:
            UsageError: It goes on already, its engine has another plan or number of drafts, or it
                may become longer than the cache.
        """
        s, generator = parked.sequence, self._generator
        if parked.is_resumed:
            raise UsageError(f"request {s.index} was resumed before")
        if parked.plan != generator.plan_digest:
            raise UsageError(
                f"request {s.index} was parked by another engine",
                hint="go on with the engine that it began with",
            )
        if len(s.histogram) != generator.drafts + 1:
            raise UsageError(
                f"request {s.index} was parked with {len(s.histogram) - 1} drafts, this run makes "
                f"{generator.drafts}",
                hint="go on with as many drafts",
            )
        if s.limit - 1 > self._steps.table.capacity:
            raise UsageError(
                f"request {s.index} may come to {s.limit - 1} tokens, the cache holds "
                f"{self._steps.table.capacity}",
                hint="load the engine with as many tokens as where it was parked",
            )
        parked.is_resumed = True
        if parked.run is not self._self:
            parked.run, s.index = self._self, self._count
            self._count += 1
        self._waiting.append((s.index, parked))
        return s.index

    def step(self) -> list[Event]:
        """Take every sequence as far as one step takes it."""
        owed, self._owed = self._owed, []
        return [*owed, *self._step()]

    def _step(self) -> list[Event]:
        self._admit()
        prompt_tokens = self.stats.prompt_tokens
        events = self._prefill()
        fed = self.stats.prompt_tokens > prompt_tokens
        ready = [s for s in self._running if not s.is_prefilling and s.finish is None]
        if ready:
            started = time.perf_counter()
            speculator = self._generator.speculator
            if self._rounds is not None and (
                self._rounds.is_under_way or (self._draws(ready) and self._rounds.fits(ready))
            ):
                events += self._device_round(self._rounds, ready, follow=self._draws(ready))
            elif speculator is not None:
                if self._rounds is not None:
                    self._rounds.hand_back()
                events += self._round(speculator, ready)
            elif self._ahead is not None and (self._ahead.is_under_way or self._draws(ready)):
                chosen = self._ahead.step(ready, follow=self._draws(ready), disturbed=fed)
                events += [self._emit(s, token) for s, token in chosen]
                self.stats.decoded_tokens += len(chosen)
            else:
                events += self._decode(ready)
            self.stats.decode_s += time.perf_counter() - started
            self.stats.steps += 1
        return [*events, *self._leave()]

    def interrupt(self) -> list[Completion]:
        """End every request now, and say how far each came that has not ended yet."""
        now = self._elapsed()
        partial = [s.complete(total_s=now) for s in self._running]
        for index, one in self._waiting:
            partial.append(
                one.sequence.complete(total_s=now)
                if isinstance(one, Parked)
                else never_started(one, index, total_s=now)
            )
        self.close()
        return partial

    def close(self) -> None:
        """Give up what is unfinished."""
        for queued in (self._ahead, self._rounds):
            if queued is not None:
                queued.drop()
        for s in self._running:
            self._steps.table.release(s.lease)
        self._running.clear()
        self._waiting.clear()
        self._owed.clear()

    def _admit(self) -> None:
        table = self._steps.table
        while self._waiting:
            index, one = self._waiting[0]
            limit = one.sequence.limit if isinstance(one, Parked) else self._generator.limit(one)
            if self._running and not table.has_room(limit - 1):
                return
            lease = table.admit(limit - 1)
            self._waiting.popleft()
            if isinstance(one, Parked):
                s = one.sequence
                s.lease = lease
                restore(self._steps.backend, table, lease, one.saved)
            else:
                s = self._admitted(index, one, lease, limit)
            self._running.append(s)

    def _admitted(self, index: int, request: Request, lease: Lease, limit: int) -> Running:
        generator, own, prefix = self._generator, request.stop_ids, request.prefix
        tokenizer = generator.tokenizer
        s = Running(
            index=index,
            request=request,
            lease=lease,
            limit=limit,
            text=None if tokenizer is None else tokenizer.stream(),
            stop_ids=generator.stop_ids if own is None else own,
            histogram=[0] * (generator.drafts + 1),
        )
        if prefix is not None:
            restore(self._steps.backend, self._steps.table, lease, prefix.saved)
            s.fed = prefix.saved.count
            if generator.speculator is not None and prefix.hidden is not None:
                generator.speculator.feed([s], [prefix.hidden[None]])
        return s

    def _prefill(self) -> list[Event]:
        """One chunk of prompts, in the order in which they came."""
        started = time.perf_counter()
        most = self._generator.prefill_tokens
        is_whole = self._generator.is_batch_invariant
        if not is_whole and not all(s.is_prefilling for s in self._running):
            most = min(most, BESIDE_TOKENS)
        room = most
        chunk: list[Running] = []
        pieces: list[Piece] = []
        for s in self._running:
            if s.is_prefilling and room:
                tokens = s.request.tokens[s.fed : s.fed + (most if is_whole else room)]
                if len(tokens) > room:
                    break  # where a prompt is cut must not depend on the others
                chunk.append(s)
                pieces.append(Piece(lease=s.lease, position=s.fed, tokens=tokens))
                room -= len(tokens)
        if not chunk:
            return []
        rows: Array
        hidden: Array | None = None
        if self._ahead is not None and self._draws(chunk):
            rows = self._steps.draw_prefill(pieces, wanted(chunk))
        else:
            rows, hidden = self._steps.prefill(pieces)
        events: list[Event] = []
        states: list[Array] = []
        first = 0
        for s, piece, row in zip(chunk, pieces, rows, strict=True):
            count = len(piece.tokens)
            s.fed += count
            if hidden is not None:
                states.append(hidden[first : first + count])
            first += count
            if not s.is_prefilling:
                chosen = self._choose(s, row) if row.ndim else self._emit(s, checked(int(row)))
                events.append(chosen)
        self._feed(chunk, states)
        self.stats.prompt_tokens += first
        self.stats.prefill_s += time.perf_counter() - started
        return events

    def _decode(self, ready: list[Running]) -> list[Event]:
        pieces = [Piece(lease=s.lease, position=s.fed, tokens=s.tokens[s.fed :]) for s in ready]
        # Nothing is ever pending here: a run either decodes or verifies.
        logits = self._steps.decode(pieces, [0] * len(ready))
        events: list[Event] = []
        for s, row in zip(ready, logits, strict=True):
            s.fed += 1
            events.append(self._choose(s, row))
        self.stats.decoded_tokens += len(ready)
        return events

    def _draws(self, sequences: list[Running]) -> bool:
        """Whether tokens alone are wanted, and no logits."""
        return all(s.request.logprobs is None for s in sequences)

    def _round(self, speculator: Speculator, ready: list[Running]) -> list[Event]:
        events: list[Event] = []
        verified = speculator.run(ready)
        for s, result in zip(ready, verified, strict=True):
            for token, row in zip(result.tokens, result.logits, strict=True):
                events.append(s.emit(token, row))
                if s.finish is not None:
                    break
        self.stats.decoded_tokens += len(events)
        self._feed(ready, [result.hidden for result in verified])
        return events

    def _settle(self) -> list[Event]:
        """Read what is under way, and begin nothing: the state is then that of the tokens."""
        ready = [s for s in self._running if not s.is_prefilling and s.finish is None]
        events: list[Event] = []
        if self._ahead is not None and self._ahead.is_under_way:
            chosen = self._ahead.step(ready, follow=False, disturbed=False)
            events += [self._emit(s, token) for s, token in chosen]
            self.stats.decoded_tokens += len(chosen)
        if self._rounds is not None:
            if self._rounds.is_under_way:
                events += self._device_round(self._rounds, ready, follow=False)
            self._rounds.hand_back()
        return events

    def _device_round(self, rounds: Rounds, ready: list[Running], *, follow: bool) -> list[Event]:
        events: list[Event] = []
        for s, tokens in rounds.step(ready, follow=follow):
            for token in tokens:
                events.append(self._emit(s, token))
                if s.finish is not None:
                    break
        self.stats.decoded_tokens += len(events)
        return events

    def _feed(self, sequences: list[Running], hidden: list[Array]) -> None:
        speculator = self._generator.speculator
        if speculator is None:
            return
        pairs = zip(sequences, hidden, strict=True)
        alive = [(s, rows) for s, rows in pairs if s.finish is None]
        if alive:
            speculator.feed([s for s, _ in alive], [rows for _, rows in alive])

    def _choose(self, s: Running, logits: sampling.Row) -> Token:
        token = sampling.choose(logits, s.request.sampling, request=s.draws, position=len(s.tokens))
        return self._emit(s, token, logits)

    def _emit(self, s: Running, token: int, logits: sampling.Row | None = None) -> Token:
        if s.first_token_s is None:
            s.first_token_s = self._elapsed()
        return s.emit(token, logits)

    def _leave(self) -> list[Event]:
        done = [s for s in self._running if s.finish is not None]
        self._running = [s for s in self._running if s.finish is None]
        for s in done:
            self._steps.table.release(s.lease)
        return [s.complete(total_s=self._elapsed()) for s in done]

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start


def _prefill_tokens(backend: Backend, asked: int | None) -> int:
    if not isinstance(backend, Bounded):
        return PREFILL_TOKENS if asked is None else asked
    most = backend.prefill_tokens
    return most if asked is None else min(asked, most)


def _ahead(generator: Generator) -> Ahead | None:
    """For a backend that draws tokens itself, unless drafts are verified on the host."""
    backend = generator.steps.backend
    if generator.speculator is not None or not isinstance(backend, Drawing):
        return None
    both = backend.can_draw("prefill") and backend.can_draw("decode")
    return Ahead(generator.steps, backend) if both else None


def _rounds(generator: Generator) -> Rounds | None:
    """For a backend that drafts and verifies by itself."""
    steps, drafts = generator.steps, generator.drafts
    if not drafts or not isinstance(steps.backend, Speculating):
        return None
    return Rounds(steps.table, steps.backend.rounds(drafts), drafts, **generator.forced)
