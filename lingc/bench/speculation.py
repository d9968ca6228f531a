"""How fast a CUDA engine drafts and verifies: rounds without their host, and the steps in them.

How many drafts are kept decides how many tokens a round gives. Drawn weights guess nothing right,
so that a share of the drafts can be kept by force, whatever they are worth: a round takes as long
as with weights that guess so, but for the experts that its tokens are sent to.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lingc.bench.engine_checks import own_steps, token
from lingc.bench.engine_times import Profiled, profile, warm
from lingc.bench.record import Spread, spread
from lingc.errors import UsageError
from lingc.quantize.formats import round_bf16
from lingc.runtime.backend import Array
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.rounds import Rounds
from lingc.runtime.sequence import Lead, Request
from lingc.runtime.sequence import Sequence as Running
from lingc.runtime.slots import Piece, SlotTable

WARM = 3
"""Rounds before those that count."""

SPARE = 3
"""Rounds that a sequence has room for beyond those that are run: two are on their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Rounds of so many sequences.

    Attributes:
        context: Tokens in the cache before the first round.
        acceptance: Share of the drafts that is kept by force, each in its turn; None where the
            model judges them.
        kept: Drafts kept of a round and a sequence, on average.
        rounds: That were timed.
        round: Seconds of a round's graph.
        run: Seconds from one round's tokens to the next's, as a caller gets them.
        tokens_per_s: Of all sequences, as a caller gets them.
        predicted: Seconds of a round's steps, as the engine was built to expect.
        launches: Of a round.
    """

    batch: int
    context: int
    drafts: int
    acceptance: float | None
    kept: float
    rounds: int
    round: Spread
    run: Spread
    tokens_per_s: float
    predicted: float
    launches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A step that rounds are made of.

    Attributes:
        phase: `verify`, or `draft`: over one token of each sequence, or over what a verify leaves.
        tokens: Of the step.
        step: Seconds of its graph, the drawing of tokens left out.
    """

    phase: str
    batch: int
    context: int
    tokens: int
    step: Spread
    predicted: float
    launches: int
    profile: tuple[Profiled, ...] = ()


def room(context: int, drafts: int, rounds: int) -> int:
    """Tokens that a sequence may grow to."""
    return context + 1 + (WARM + rounds + SPARE) * (drafts + 1)


def speculate(
    backend: CudaBackend, batch: int, context: int, drafts: int, *, rounds: int,
    acceptance: float | None = None,
) -> Speculation:  # fmt: skip
    """Rounds of a batch.

    Raises:
        UsageError: The engine has no code for rounds of such a batch.
    """
    plan, device = backend.plan, backend.rounds(drafts)
    table = SlotTable(backend.limits, plan.page_size)
    limit = room(context, drafts, rounds)
    sequences = [_sequence(backend, table, i, context, limit, drafts) for i in range(batch)]
    keeps = None if acceptance is None else _kept(batch, limit + 2 * drafts, acceptance)
    forced: dict[str, Any] = {}
    if keeps is not None:
        forced["force_keep"] = lambda index, position: bool(keeps[index, position])
        forced["force_reject"] = lambda index, position: not keeps[index, position]
    running = Rounds(table, device, drafts, **forced)
    if not running.fits(sequences):
        raise UsageError(
            f"the engine has no code for rounds of {batch} sequences with {drafts} drafts",
            hint="leave --mtp out for so many, or build the engine again with this version",
        )
    counts: list[int] = []
    waits: list[float] = []
    for number in range(WARM + rounds):
        started = time.perf_counter()
        found = running.step(sequences, follow=number + 1 < WARM + rounds)
        for s, tokens in found:
            s.tokens += tokens
        waits.append(time.perf_counter() - started)
        counts.append(sum(len(tokens) for _, tokens in found))
    running.drop()
    backend.device.synchronize()
    made, took = sum(counts[WARM:]), sum(waits[WARM:])
    tactics = device.tactics()
    return Speculation(
        batch=batch,
        context=context,
        drafts=drafts,
        acceptance=acceptance,
        kept=made / (rounds * batch) - 1,
        rounds=rounds,
        round=spread(device.seconds(rounds)),
        run=spread(waits[WARM:]),
        tokens_per_s=made / took,
        predicted=1e-6 * sum(one.microseconds for one in tactics),
        launches=sum(len(one.launches) for one in tactics),
    )


def parts(
    backend: CudaBackend, batch: int, context: int, drafts: int, *, tokens: int, profiled: bool
) -> list[Part]:
    """The steps of a round, one by one.

    Args:
        tokens: Replays to time.
    """
    made = []
    for phase, each in part_sizes(drafts):
        bound = backend.prepare(phase, part_inputs(backend, phase, batch, context, each))
        steps = own_steps(backend, bound)
        graph = bound.record({step.name for step, _ in steps})
        warm(graph)
        times = spread(graph.seconds(tokens))
        graph.close()
        made.append(
            Part(
                phase=phase,
                batch=batch,
                context=context,
                tokens=batch * each,
                step=times,
                predicted=1e-6 * sum(tactic.microseconds for _, tactic in steps),
                launches=sum(len(tactic.launches) for _, tactic in steps),
                profile=tuple(profile(backend, bound, times.p50)) if profiled else (),
            )
        )
    return made


def part_sizes(drafts: int) -> list[tuple[str, int]]:
    """The steps that rounds are made of, and how many tokens of a sequence each takes."""
    return [("verify", drafts + 1), ("draft", drafts + 1), *([("draft", 1)] if drafts > 1 else [])]


def part_inputs(
    backend: CudaBackend, phase: str, batch: int, context: int, each: int
) -> Mapping[str, Array]:
    """A step of sequences with so many tokens in the cache."""
    plan = backend.plan
    table = SlotTable(backend.limits, plan.page_size)
    pieces = [
        Piece(
            lease=table.admit(context + each),
            position=context,
            tokens=[token(plan, i, place) for place in range(each)],
        )
        for i in range(batch)
    ]
    given = table.pack(pieces) | {"accepted": np.zeros(batch, np.int32)}
    given["logit_rows"] = (given["offsets"][1:] - 1).astype(np.int32)
    given["hidden"] = _hidden(backend, batch * each)
    return {name: given[name] for name in plan.programs[phase].inputs}


def _sequence(
    backend: CudaBackend, table: SlotTable, index: int, context: int, limit: int, drafts: int
) -> Running:
    """A request whose prompt is done, and whose next draft is drawn from anything."""
    plan = backend.plan
    prompt = tuple(token(plan, index, place) for place in range(context + 1))
    made = Running(
        index=index,
        request=Request(tokens=prompt, stop_ids=frozenset()),
        lease=table.admit(limit),
        limit=limit,
        text=None,
        stop_ids=frozenset(),
        histogram=[0] * (drafts + 1),
    )
    made.fed = context
    logits = np.random.default_rng(index).standard_normal(int(plan.config["vocab_size"]))
    made.lead = Lead(logits=logits.astype(np.float32), hidden=_hidden(backend, 1)[0])
    return made


def _hidden(backend: CudaBackend, rows: int) -> Array:
    width = int(backend.plan.config["hidden_size"])
    return round_bf16(np.random.default_rng(rows).standard_normal((rows, width), np.float32))


def _kept(batch: int, positions: int, acceptance: float) -> Array:
    """Whether the draft at each position is kept."""
    drawn: Array = np.random.default_rng(0).random((batch, positions)) < acceptance
    return drawn
