"""What a kernel is, how it is launched, and what a tactic of an op is: plain data.

A `Kernel` names a device function and everything that its binary depends on, so that equal kernels
are one binary. A `Tactic` is one way to run an op on arguments of known sizes: a short list of
launches over the op's arguments, its results and a private workspace. Nothing here compiles or
runs: `lingc.targets.cuda.binaries` compiles, `lingc.targets.cuda.tactics` ranks, and
`lingc.device` loads and launches.

Rules that every kernel keeps:

- Sums are added up in an order that depends on nothing but the sizes, so that a row's result is
  the same bits in every run and whatever the other rows hold.
- A workspace declared `zeroed` (counters) is zero before the launch and zero again after it. Any
  other workspace and every result may hold NaN before.
- A kernel launched with `dependent` runs `griddepcontrol.wait` in every thread before it reads what
  an earlier launch wrote and before it writes anything. Before that it may read weights, and what
  only the steps before wrote, such as a layer's linear state: a step begins with a launch that is
  not dependent.
- An index tensor may name row or slot -1, which is padding: nothing of it is read or written in the
  state; its result rows are finite.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

POINTERS = ("*bf16", "*f32", "*f8e4m3", "*i32", "*u8")
SCALARS = ("i32", "i64", "f32")

Rate = Literal["fp8", "bf16", "f32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One device function.

    Attributes:
        language: `cuda` (C++, compiled by NVRTC) or `triton`.
        source: For CUDA a file below the package, `kernels/gemv.cu`; for Triton the function,
            `lingc.plugins.rms_norm:kernel`.
        entry: Name of the function.
        arguments: (name, type) in order, without constants. A type is a pointer (`*bf16`, `*f32`,
            `*f8e4m3`, `*i32`, `*u8`) or a scalar (`i32`, `i64`, `f32`). Every pointer is aligned
            to 16 bytes. A scalar written `i32:16` is a multiple of 16, which Triton is told.
        constants: What is fixed at compile time: macros for CUDA, `tl.constexpr` for Triton.
        warps: Warps a block.
        stages: Pipeline depth that Triton is given; nothing to CUDA sources.
        shared_bytes: Dynamic shared memory of a block; Triton works out its own.
        features: What an architecture must have: any of `bulk` (bulk copies, mbarrier, dependent
            launch; sm_90 and later), `wgmma` (sm_90a alone), `fp8` (sm_89 and later). Compiled
            only for architectures that have them.
    """

    language: Literal["cuda", "triton"]
    source: str
    entry: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | str], ...] = ()
    warps: int
    stages: int = 3
    shared_bytes: int = 0
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in self.arguments:
            if kind.partition(":")[0] not in (*POINTERS, *SCALARS):
                raise ValueError(f"{self.entry}: argument {name!r} has no type {kind!r}")
        if not 1 <= self.warps <= 32:
            raise ValueError(f"{self.entry}: {self.warps} warps do not make a block")


@dataclass(frozen=True, slots=True)
class Tensor:
    """An operand in device memory: an argument or a result of the op, or a workspace, by name."""

    name: str
    offset: int = 0
    """Bytes from its beginning; a multiple of 16."""


Operand = Tensor | int | float | None
"""A launch argument; None is a null pointer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel over one grid.

    Attributes:
        operands: One for each of the kernel's arguments.
        dependent: Whether the launch may begin before the one before it ended (programmatic
            dependent launch); only for kernels that wait by themselves.
        moved_bytes: Bytes that this launch reads and writes once each, for the cost model.
        flops: Multiplications and additions that the units really do, padding included.
        rate: Whose rate that is.
        blocks_per_sm: How many blocks fit on a multiprocessor, by shared memory and registers.
        tokens: How many there are, where the kernel is compiled for more; for the cost model.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    operands: tuple[Operand, ...]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dependent: bool = False
    moved_bytes: float = 0.0
    flops: float = 0.0
    rate: Rate = "f32"
    blocks_per_sm: int = 1
    tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.operands) != len(self.kernel.arguments):
            raise ValueError(
                f"{self.kernel.entry} takes {len(self.kernel.arguments)} arguments, "
                f"{len(self.operands)} are given"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Device memory of one tactic.

    Attributes:
        zeroed: Whether it must be zero before the first launch ever; every launch leaves it so.
    """

    name: str
    bytes: int
    zeroed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tactic:
    """One way to run an op on arguments of known sizes.

    Attributes:
        name: Unique among the tactics for the same arguments, the same for every size that it
            serves, e.g. `gemv.ks8.tiles1.ring32`.
        config: The same in numbers, for records.
        sums: What the bits of a row follow from, beside its data: its kernels alone where empty,
            whatever the grid and the other sizes are, or this and no more where a text. None where
            sizes decide too, such as into how many parts a sum is split.
    """

    name: str
    launches: tuple[Launch, ...]
    workspaces: tuple[Workspace, ...] = ()
    config: Mapping[str, int | str] = field(default_factory=dict)
    sums: str | None = ""

    @property
    def arithmetic(self) -> tuple[object, ...] | None:
        """Equal for two tactics that give a row the same bits, in whatever sizes; else None."""
        if self.sums is None:
            return None
        return (self.sums,) if self.sums else (*dict.fromkeys(one.kernel for one in self.launches),)


def align(size: int, to: int = 256) -> int:
    """The next multiple."""
    return -(-size // to) * to
