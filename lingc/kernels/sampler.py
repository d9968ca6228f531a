"""Launches of `sample.cu` and `judge.cu`: a cluster of eight blocks for a row of logits."""

from lingc.kernel import Kernel, Launch, Tactic, Tensor

BLOCKS = 8
"""Of a cluster: the most that every device with clusters has."""

SLAB = 2048
"""Logits that a block has of a slab, four a thread."""

SLABS = 24
"""As many of 8 KiB as fit in a block's shared memory."""


def refusal(width: int, rows: int = 1) -> str | None:
    """Why rows of this many logits are not run, so many at a time, or None."""
    most = BLOCKS * SLAB * (SLABS // rows)
    if width % 4:
        return f"rows of {width} logits are not a multiple of 4"
    if width > most:
        return f"{width} logits do not fit in a cluster, which holds {rows} times {most}"
    return None


def tactics(tokens: int, width: int) -> list[Tactic]:
    """Ways to run `sample` on so many rows."""
    slabs = -(-width // (BLOCKS * SLAB))
    kernel = Kernel(
        language="cuda",
        source="kernels/sample.cu",
        entry="sample",
        arguments=(
            ("logits", "*f32"),
            ("temperature", "*f32"),
            ("top_k", "*i32"),
            ("top_p", "*f32"),
            ("draws", "*i32"),
            ("tokens", "*i32"),
        ),
        constants=(("WIDTH", width), ("SLABS", slabs)),
        warps=16,
        shared_bytes=slabs * SLAB * 4,
        features=("bulk",),
    )
    names = ("logits", "temperature", "top_k", "top_p", "draws", "tokens")
    launch = Launch(
        kernel=kernel,
        grid=(tokens * BLOCKS, 1, 1),
        operands=tuple(Tensor(name) for name in names),
        cluster=(BLOCKS, 1, 1),
        dependent=True,
        moved_bytes=4.0 * tokens * width,
        flops=4.0 * tokens * width,
    )
    return [Tactic(name=f"cluster{BLOCKS}", launches=(launch,), config={"slabs": slabs})]


def judging(tokens: int, width: int, sequences: int, pitch: int) -> list[Tactic]:
    """Ways to run `judge` on so many tokens of so many sequences.

    Args:
        pitch: From one place to the next, of what lies by place.
    """
    slabs = -(-width // (BLOCKS * SLAB))
    arguments = (
        ("logits", "*f32"),
        ("drafts", "*i32"),
        ("draft_logits", "*f32"),
        ("temperature", "*f32"),
        ("top_k", "*i32"),
        ("top_p", "*f32"),
        ("draws", "*i32"),
        ("forced", "*i32"),
        ("tokens", "*i32"),
    )
    kernel = Kernel(
        language="cuda",
        source="kernels/judge.cu",
        entry="judge",
        arguments=(*arguments, ("sequences", "i32"), ("each", "i32"), ("pitch", "i32")),
        constants=(("WIDTH", width), ("SLABS", slabs)),
        warps=16,
        shared_bytes=2 * slabs * SLAB * 4,
        features=("bulk",),
    )
    launch = Launch(
        kernel=kernel,
        grid=(tokens * BLOCKS, 1, 1),
        operands=(*(Tensor(name) for name, _ in arguments), sequences, tokens // sequences, pitch),
        cluster=(BLOCKS, 1, 1),
        dependent=True,
        moved_bytes=4.0 * tokens * width,
        flops=4.0 * tokens * width,
    )
    return [Tactic(name=f"cluster{BLOCKS}", launches=(launch,), config={"slabs": slabs})]
