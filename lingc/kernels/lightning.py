"""Launches of Lightning attention over whole sequences.

Two programs do the same: `lightning_prefill.cu`, for sm_90a, and `triton_lightning`, for the other
architectures. Both cut sequences into segments of `span` tokens, so that few heads fill a device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from lingc.kernel import Kernel, Launch, Operand, Tactic, Tensor, Workspace
from lingc.kernels.rows import power
from lingc.plan import TensorType
from lingc.targets.spec import Target

WIDTH = 128
"""Of a head's keys and values: what the state's registers and the tiles are laid out for."""

CHUNK = 64
SHORTEST = 512
"""Tokens of a segment: below, finding its start would cost more than it gives."""

WHOLE = 1 << 30
"""A span that no sequence reaches."""

_STATE_BYTES = 4 * WIDTH * WIDTH
_SHARED_BYTES = {"segment_ends": 4 * 2 * 16384, "outputs": 3 * 3 * 16384 + 3 * 16384}
"""Of blocks in CUDA: stages of tiles, then two pairs of score tiles and one of outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """What is attended to, and where it lies.

    Attributes:
        tokens: Of all sequences.
        sequences: How many.
        q: [T, >= HK] bf16 in rows of `pitch` numbers; k likewise.
        v: [T, >= HV] bf16 in rows of `v_pitch` numbers.
        o: Result [T, HV].
    """

    tokens: int
    sequences: int
    heads: int
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    pitch: int
    v_pitch: int


def refusal(state: TensorType, **activations: TensorType) -> str | None:
    """Why the kernels cannot run heads of this shape."""
    if tuple(state.shape[2:]) != (WIDTH, WIDTH):
        return f"states of {state.shape[2]}x{state.shape[3]} are not {WIDTH}x{WIDTH}"
    if state.dtype != "f32":
        return f"state is {state.dtype}, not f32"
    for name, kind in activations.items():
        if kind.dtype != "bf16":
            return f"{name} is {kind.dtype}, not bf16"
    return None


def spans(target: Target, tokens: int, heads: int) -> list[int]:
    """Tokens of a segment worth trying: one sequence fills the device, or nearly, some times."""
    sms = target.sms or 1
    found = []
    for waves in (1, 3):
        segments = max(waves * sms // heads, 1)
        span = max(-(-tokens // segments), SHORTEST)
        span = -(-span // CHUNK) * CHUNK
        if span < tokens and span not in found:
            found.append(span)
    return [*found, WHOLE]


def tactics(target: Target, given: Sequences) -> list[Tactic]:
    """Ways to attend, best guess first."""
    programs = ("wgmma", "turns") if target.arch == "sm_90a" else ("triton",)
    return [
        _tactic(program, span, given, target)
        for span in spans(target, given.tokens, given.heads)
        for program in programs
    ]


def _padded(launch: Launch, target: Target, given: Sequences, span: int) -> Launch:
    """With what idle multiprocessors could have multiplied: most blocks of a grid have no tokens.

    One sequence is padding, and the others are as long as each other; the model of time knows the
    grid alone.
    """
    slots = (target.sms or 1) * launch.blocks_per_sm

    def waves(blocks: int) -> float:
        return -(-blocks // slots) * slots / blocks

    meant = max(given.sequences - 1, 1)
    segments = meant * max(-(-given.tokens // (meant * span)), 1)
    every = math.prod(launch.grid)
    working = min(every // max(launch.grid[1:]) * segments, every)
    return replace(launch, flops=launch.flops * waves(working) / waves(every))


def _tactic(program: str, span: int, given: Sequences, target: Target) -> Tactic:
    """One way.

    Args:
        program: `triton`, or `wgmma`, or `turns` for that with warpgroups that take turns.
    """
    split = span < WHOLE
    segments = (given.tokens // span if split else 0) + given.sequences
    make = partial(_triton, given) if program == "triton" else partial(_cuda, given, program)
    launches, spaces = [make("outputs", span, segments + 1)], []
    if split:
        launches.insert(0, make("segment_ends", span, segments))
        # A sequence of n > 1 segments is longer than (n - 1) spans, so there are fewer than
        # 2 tokens / span of them.
        states = 2 * given.tokens // span
        spaces.append(Workspace(name="starts", bytes=states * given.heads * _STATE_BYTES))
    return Tactic(
        name=f"{program}.segments{-(-given.tokens // span)}" if split else f"{program}.whole",
        launches=tuple(_padded(one, target, given, span) for one in launches),
        workspaces=tuple(spaces),
        config={"span": span if split else 0, "chunk": CHUNK},
        sums=f"{program}, segments of {span}" if split else "",
    )


Argument = tuple[str, str, Operand]


def _arguments(entry: str, span: int, given: Sequences) -> list[Argument]:
    """Pointers and what says where segments lie, as both programs take them."""
    outputs, split = entry == "outputs", span < WHOLE
    index = [(name, "*i32", Tensor(name)) for name in ("slots", "offsets", "positions")]
    return [
        *([("q", "*bf16", given.q)] if outputs else []),
        ("k", "*bf16", given.k),
        ("v", "*bf16", given.v),
        ("decay", "*f32", Tensor("decay")),
        ("state", "*f32", Tensor("state")),
        *index,
        ("starts", "*f32", Tensor("starts") if split else None),
        *([("o", "*bf16", given.o)] if outputs else []),
        ("tokens", "i32", given.tokens),
        ("sequences", "i32", given.sequences),
        ("span", "i32:16", span),
        ("pitch", "i32:16", given.pitch),
        ("v_pitch", "i32:16", given.v_pitch),
        *([("scale", "f32", WIDTH**-0.5)] if outputs else []),
    ]


def _work(entry: str, span: int, given: Sequences) -> tuple[float, float]:
    """Bytes and flops: of each product of a chunk, with two parts for what is not exact."""
    rows = float(given.tokens * given.heads * WIDTH)
    states = 2.0 * given.tokens / span * given.heads * _STATE_BYTES
    update = 2 * 2 * WIDTH
    if entry == "segment_ends":
        return 4 * rows + states, rows * update
    return 8 * rows + states, rows * (2 * CHUNK + 2 * 2 * CHUNK + 2 * update)


def _cuda(given: Sequences, program: str, entry: str, span: int, segments: int) -> Launch:
    arguments = _arguments(entry, span, given)
    macros = {"ENDS": entry == "segment_ends", "TURNS": program == "turns"}
    kernel = Kernel(
        language="cuda",
        source="kernels/lightning_prefill.cu",
        entry=entry,
        arguments=_typed(arguments),
        constants=tuple((name, 1) for name, wanted in macros.items() if wanted),
        warps=12,
        shared_bytes=_SHARED_BYTES[entry],
        features=("bulk", "wgmma"),
    )
    moved, flops = _work(entry, span, given)
    return Launch(
        kernel=kernel,
        grid=(given.heads, segments, 1),
        operands=_values(arguments),
        dependent=True,
        moved_bytes=moved,
        flops=flops,
        rate="bf16",
    )


def _triton(given: Sequences, entry: str, span: int, segments: int) -> Launch:
    arguments = _arguments(entry, span, given)
    columns = 64
    constants = [
        ("HEADS", given.heads), ("K", WIDTH), ("V", WIDTH), ("CHUNK", CHUNK), ("BV", columns),
        ("COUNT", max(16, power(given.sequences + 1))),
    ]  # fmt: skip
    if entry == "outputs":
        constants.append(("SPLIT", int(span < WHOLE)))
    kernel = Kernel(
        language="triton",
        source=f"lingc.kernels.triton_lightning:{entry}",
        entry=entry,
        arguments=_typed(arguments),
        constants=(*constants, ("WIDE", 0)),
        warps=4,
        stages=3 if entry == "segment_ends" else 2,
    )
    moved, flops = _work(entry, span, given)
    return Launch(
        kernel=kernel,
        grid=(WIDTH // columns, given.heads, segments),
        operands=_values(arguments),
        moved_bytes=moved,
        # Scores are made for each block of value channels.
        flops=flops,
        rate="bf16",
        blocks_per_sm=2,
    )


def _typed(arguments: Sequence[Argument]) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, kind, _ in arguments)


def _values(arguments: Sequence[Argument]) -> tuple[Operand, ...]:
    return tuple(value for _, _, value in arguments)
