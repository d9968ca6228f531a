"""Ops run by their own kernels on a device: held to their references, then timed.

The binaries are compiled ahead of time and loaded through the driver, as an engine's will be.
Every tactic of every case passes the gate before anything is timed: close to the reference in FP64
on the same rounded inputs, nothing left of the NaN that results and workspaces were filled with,
the same bits twice, counters back at zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from lingc.bench.sampled import arguments_at, rows_of
from lingc.compare import close
from lingc.device import Binary, Device, launch_all
from lingc.kernel import Kernel, Tactic, Tensor
from lingc.op import DTYPE_NAME, TORCH_DTYPE, Benchmark, Op, type_of
from lingc.plan import TensorType
from lingc.quantize.layouts import PLAIN, TILE_ROWS, arrange

_POISON = {torch.int32: -77_777_777, torch.int64: -77_777_777, torch.uint8: 0xAB, torch.bool: True}

SIMILAR = 1e-4
"""Similarity error up to which results on a model's own values are right: rounding to bf16 alone is
about 3e-6, codes and keys that round the other way up to 3e-5, a row of 42 that is wrong 1e-2."""
SIMILAR_ROW = 2e-3
"""The same of any one row, where few codes weigh more: right ones have up to 4e-4, a row with 8 of
1024 channels wrong 8e-3."""

REPLAYS = 11
_SERIES_BYTES = 24 << 30
"""Memory that the copies of one series may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What a gate found."""

    op: str
    case: str
    tactic: str
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One tactic at one shape.

    Attributes:
        microseconds: Of one call, hand-off to the next included: 10th, 50th and 90th percentile.
        moved_bytes: What one call must read and write, by the op's cost.
        flops: By the op's cost.
        gated: Whether this shape itself went through the gate, a large one by some of its rows;
            one whose reference in FP64 does not fit is timed on the word of the smaller ones.
        facts: Registers, local memory and blocks a multiprocessor of each launch.
    """

    op: str
    benchmark: str
    tokens: int
    tactic: str
    gated: bool
    microseconds: tuple[float, float, float]
    moved_bytes: float
    flops: float
    launches: int
    config: Mapping[str, int | str] = field(default_factory=dict)
    facts: tuple[Mapping[str, int], ...] = ()

    @property
    def bytes_per_s(self) -> float:
        return self.moved_bytes / (self.microseconds[1] * 1e-6)

    @property
    def flops_per_s(self) -> float:
        return self.flops / (self.microseconds[1] * 1e-6)


class Bound:
    """An op's arguments on the device as its kernels take them, results and workspaces.

    Args:
        arguments: As the op's schema has them, weights plain, on the device.
        arranged: Weights in their layouts already, by name, to share them between calls.
    """

    def __init__(
        self,
        op: Op,
        arguments: Sequence[Any],
        tactic: Tactic,
        *,
        arranged: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.op, self.tactic = op, tactic
        layouts = layouts_of(op, arguments)
        given = dict(zip(op.arguments, arguments, strict=True))
        self.tensors: dict[str, torch.Tensor] = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                ready = (arranged or {}).get(name)
                layout = layouts.get(name, PLAIN)
                self.tensors[name] = arranged_tensor(layout, value) if ready is None else ready
        made = op.types(*(type_of(value) for value in arguments))
        types = (made,) if isinstance(made, TensorType) else made
        for name, kind in zip(op.results, types, strict=True):
            if name in given:
                self.tensors[name] = self.tensors[name].clone()  # updated in place
            else:
                self.tensors[name] = poisoned(kind.bind({}), TORCH_DTYPE[kind.dtype])
        for space in tactic.workspaces:
            whole = torch.zeros(space.bytes, dtype=torch.uint8, device="cuda")
            if not space.zeroed:
                whole.fill_(0xFF)  # NaN in every floating type
            self.tensors[space.name] = whole
        self.addresses = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        for launch in tactic.launches:  # absent optional arguments are null
            for operand in launch.operands:
                if isinstance(operand, Tensor):
                    self.addresses.setdefault(operand.name, 0)

    def results(self) -> list[torch.Tensor]:
        return [self.tensors[name] for name in self.op.results]

    def dirty_counters(self) -> list[str]:
        """Zeroed workspaces that are not zero."""
        return [
            space.name
            for space in self.tactic.workspaces
            if space.zeroed and bool(self.tensors[space.name].any())
        ]


def layouts_of(op: Op, arguments: Sequence[Any]) -> Mapping[str, str]:
    """The layout of every weight that is not plain."""
    return op.layouts(*(type_of(value) for value in arguments))


def arrange_all(op: Op, arguments: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The tensors among an op's arguments, weights in their layouts, by name."""
    layouts = layouts_of(op, arguments)
    return {
        name: arranged_tensor(layouts.get(name, PLAIN), value)
        for name, value in zip(op.arguments, arguments, strict=True)
        if isinstance(value, torch.Tensor)
    }


def poisoned(shape: Sequence[int], dtype: torch.dtype, memory: str = Device.memory) -> torch.Tensor:
    """A tensor that no kernel wrote: NaN, or a number that stands out."""
    size = tuple(shape)
    if dtype == torch.float8_e4m3fn:
        return torch.full(size, 0x7F, dtype=torch.uint8, device=memory).view(dtype)
    return torch.full(size, _POISON.get(dtype, math.nan), dtype=dtype, device=memory)


# ---------------------------------------------------------------------------------------- layouts


def arranged_tensor(layout: str, values: torch.Tensor) -> torch.Tensor:
    """`lingc.quantize.layouts.arrange` on the device.

    The order of bytes is not written a second time here: it is read off what `arrange` does to
    one small matrix of row, piece and nibble numbers.
    """
    if layout == PLAIN:
        return values
    *outer, rows, width = values.shape
    if layout.endswith("scales"):
        order = _row_order(layout, rows)
        ordered = values.index_select(-2, order)
        tiles = ordered.reshape(*outer, rows // TILE_ROWS, TILE_ROWS, width)
        return tiles.transpose(-1, -2).contiguous().reshape(values.shape)
    ordered = values.contiguous()
    if values.dtype == torch.int32:
        ordered = _nibbles(ordered)
    raw = ordered.view(torch.uint8).reshape(*outer, rows, -1)
    if layout != "tiled":
        raw = raw.index_select(-2, _row_order(layout, rows))
    pieces = raw.reshape(*outer, rows // TILE_ROWS, TILE_ROWS, -1, 64).transpose(-2, -3)
    shuffled = pieces.reshape(*outer, -1, 1024).index_select(-1, _piece_order())
    return shuffled.contiguous().reshape(-1).view(values.dtype).reshape(values.shape)


def plain_tensor(layout: str, values: torch.Tensor) -> torch.Tensor:
    """What `arranged_tensor` gives back in the plan's own order."""
    if layout == PLAIN:
        return values.clone()
    *outer, rows, width = values.shape
    back = torch.argsort(_row_order(layout, rows))
    if layout.endswith("scales"):
        tiles = values.reshape(*outer, rows // TILE_ROWS, width, TILE_ROWS)
        ordered = tiles.transpose(-1, -2).reshape(values.shape)
        return ordered.index_select(-2, back)
    raw = values.contiguous().view(torch.uint8).reshape(*outer, rows // TILE_ROWS, -1, 1024)
    pieces = raw.index_select(-1, torch.argsort(_piece_order()))
    pieces = pieces.reshape(*outer, rows // TILE_ROWS, -1, TILE_ROWS, 64).transpose(-2, -3)
    flat = pieces.reshape(*outer, rows, -1)
    if layout != "tiled":
        flat = flat.index_select(-2, back)
    made = flat.contiguous().reshape(-1).view(values.dtype).reshape(values.shape)
    return _nibbles(made, back=True) if values.dtype == torch.int32 else made


@cache
def _row_order(layout: str, rows: int) -> torch.Tensor:
    """Which row of the plan stands at each row of the layout."""
    if layout in {"tiled", "tiled_scales"}:
        return torch.arange(rows, device="cuda")
    numbers = np.arange(rows, dtype=np.int32)[:, None]
    tiled = arrange("tiled_gated_scales", numbers)
    return torch.from_numpy(tiled[:, 0].astype(np.int64)).cuda()


@cache
def _piece_order() -> torch.Tensor:
    """Which of 16 x 64 bytes stands at each byte of a piece."""
    numbers = np.arange(TILE_ROWS * 64, dtype=np.int64).reshape(TILE_ROWS, 64)
    low, high = (arrange("tiled", (numbers >> s & 255).astype(np.uint8)) for s in (0, 8))
    return torch.from_numpy((low.astype(np.int64) | high.astype(np.int64) << 8).reshape(-1)).cuda()


@cache
def _nibble_places() -> tuple[int, ...]:
    """Where each nibble of a word goes."""
    places = []
    for nibble in range(8):
        word = np.full((TILE_ROWS, 16), np.uint32(15 << 4 * nibble)).view(np.int32)
        made = int(arrange("tiled", word).view(np.uint32)[0, 0])
        places.append((made.bit_length() - 1) // 4)
    return tuple(places)


def _nibbles(words: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    made = torch.zeros_like(words)
    for nibble, place in enumerate(_nibble_places()):
        source, to = (place, nibble) if back else (nibble, place)
        made |= (words >> 4 * source & 15) << 4 * to
    return made


# ------------------------------------------------------------------------------------------- gate


def wide_arguments(op: Op, arguments: Sequence[Any]) -> list[Any]:
    """Arguments whose activations are FP64, so that the reference rounds nothing."""
    weights = layouts_of(op, arguments)
    made: list[Any] = []
    for name, value in zip(op.arguments, arguments, strict=True):
        if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            made.append(value if name in weights else value.double())
        elif name == "dtype" and isinstance(value, str):
            made.append("f64")
        else:
            made.append(value)
    return made


def check(
    device: Device, op: Op, arguments: Sequence[Any], tactics: Sequence[Tactic],
    binaries: Mapping[Kernel, Binary], label: str, *, similar: float = 0.0,
) -> Iterator[Fault]:  # fmt: skip
    """Run tactics on arguments and compare with the reference in FP64.

    Large results are compared at some rows, those of `lingc.bench.sampled`; that they are written
    everywhere, and the same twice, is looked at in all of them.

    Args:
        similar: Similarity error up to which results are right though single elements are not.

    Raises:
        torch.OutOfMemoryError: The reference does not fit.
    """
    want = Wanted(op, arguments, similar=similar)
    arranged = arrange_all(op, arguments)
    for tactic in tactics:
        problem = _problem(device, op, arguments, tactic, binaries, want, arranged)
        if problem is not None:
            yield Fault(op=op.name, case=label, tactic=tactic.name, problem=problem)


def faults_of(
    device: Device, op: Op, arguments: Sequence[Any], tactics: Sequence[Tactic],
    binaries: Mapping[Kernel, Binary], label: str, *, similar: float = 0.0,
) -> list[Fault] | None:  # fmt: skip
    """What `check` finds, or None where the device has no room for the reference."""
    try:
        return [*check(device, op, arguments, tactics, binaries, label, similar=similar)]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _problem(
    device: Device, op: Op, arguments: Sequence[Any], tactic: Tactic,
    binaries: Mapping[Kernel, Binary], want: "Wanted", arranged: Mapping[str, torch.Tensor],
) -> str | None:  # fmt: skip
    runs = []
    for _ in range(2):
        bound = Bound(op, arguments, tactic, arranged=arranged)
        torch.cuda.synchronize()
        launch_all(device, tactic.launches, binaries, bound.addresses, first=True)
        device.synchronize()
        runs.append(bound)
    got, again = runs[0].results(), runs[1].results()
    for name, one, other in zip(op.results, got, again, strict=True):
        if not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            return f"{name} differs from run to run"
    if dirty := runs[0].dirty_counters():
        return f"left counters {', '.join(dirty)} at other than zero"
    if strange := _disturbed(device, op, arguments, tactic, binaries, arranged, got):
        return f"row 0 of {strange} depends on what the other rows hold"
    return want.problem(got)


class Wanted:
    """What an op's reference makes of arguments in FP64, whole or at some rows.

    Args:
        similar: Similarity error up to which results are right though single elements are not.
    """

    def __init__(self, op: Op, arguments: Sequence[Any], *, similar: float) -> None:
        self._op, self._similar = op, similar
        self._rows = rows = rows_of(op, arguments)
        self._given = arguments if rows is None else arguments_at(op, arguments, rows)
        made = op.reference(*wide_arguments(op, self._given))
        self._results = [made] if isinstance(made, torch.Tensor) else list(made)

    def problem(self, got: Sequence[torch.Tensor]) -> str | None:
        """Why results are not that, or None."""
        if self._rows is None:
            return _judged(self._op, self._given, got, self._results, similar=self._similar)
        for name, one in zip(self._op.results, got, strict=True):
            if one.is_floating_point() and bool(one.isnan().any()):
                return f"{name}: {int(one.isnan().sum())} of {one.numel()} elements are NaN"
        some = [one[self._rows] for one in got]
        found = _judged(self._op, self._given, some, self._results, similar=self._similar)
        return found and f"of rows {', '.join(map(str, self._rows[:3].tolist()))}, …: {found}"


def problem_of(
    op: Op, arguments: Sequence[Any], got: Sequence[torch.Tensor], *, similar: float = SIMILAR
) -> str | None:
    """Why results on a model's own values are not what the reference makes of them, or None.

    Weights of a trained model have outliers, and an FP8 code that falls the other way beside one
    moves a single result by more than a tolerance for random values allows, as does a key that
    rounds the other way. So results are compared as a whole, but for integers and codes, which have
    a judge; the gate over cases goes element by element, as this does where `similar` is 0.
    """
    return Wanted(op, arguments, similar=similar).problem(got)


def _judged(
    op: Op, arguments: Sequence[Any], got: Sequence[torch.Tensor], want: Sequence[torch.Tensor],
    *, similar: float = 0.0,
) -> str | None:  # fmt: skip
    """Why results are wrong, or None; up to a similarity error of `similar` they are not."""
    if op.judge is not None:
        problem = op.judge(arguments, got, want)
        rounded = all(one.dtype in (torch.bfloat16, torch.float32) for one in got)
        if problem is None or not similar or not rounded:
            return problem
    for name, one, other in zip(op.results, got, want, strict=True):
        found = close(one, other, dtype=DTYPE_NAME[one.dtype], mechanism=op.mechanism)
        alike = found.problem is None and 0 < found.similarity_error <= similar
        if not found.ok and not (alike and _worst_row(one, other) <= SIMILAR_ROW):
            return f"{name}: {found}"
    return None


def _worst_row(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest similarity error of a row."""
    a, b = (x.double().reshape(len(x), -1) for x in (got, want))
    size = a.square().sum(1) + b.square().sum(1)
    return float(((a - b).square().sum(1) / size.clamp(min=1e-30)).max())


_BY_HEAD = frozenset({"w_k", "w_v", "kv_b"})
"""Weights whose first axis is heads, of which there may be as many as rows."""


def row_arguments(op: Op, arguments: Sequence[Any], rows: int) -> list[str]:
    """Names of the activations that have a row for each of the first result's `rows`."""
    weights = layouts_of(op, arguments).keys() | _BY_HEAD | set(op.results)
    return [
        name
        for name, value in zip(op.arguments, arguments, strict=True)
        if isinstance(value, torch.Tensor)
        and value.shape[:1] == (rows,)
        and value.dtype == torch.bfloat16
        and name not in weights
        and "weight" not in name
    ]


def _disturbed(
    device: Device, op: Op, arguments: Sequence[Any], tactic: Tactic,
    binaries: Mapping[Kernel, Binary], arranged: Mapping[str, torch.Tensor],
    got: Sequence[torch.Tensor],
) -> str | None:  # fmt: skip
    """A result whose first row changes when every other row of the activations does."""
    rows = got[0].shape[0]
    changed = dict(arranged)
    for name in row_arguments(op, arguments, rows):
        value = arranged[name]
        other = (value.float() * -0.75 + 0.1).to(value.dtype)
        changed[name] = torch.cat((value[:1], other[1:].flip(0)))
    if rows < 2 or all(changed[name] is arranged[name] for name in arranged):
        return None
    bound = Bound(op, arguments, tactic, arranged=changed)
    torch.cuda.synchronize()
    launch_all(device, tactic.launches, binaries, bound.addresses, first=True)
    device.synchronize()
    for name, one, other in zip(op.results, got, bound.results(), strict=True):
        mine = name not in arranged and one.shape[:1] == (rows,)
        if mine and not torch.equal(one[:1].view(torch.uint8), other[:1].view(torch.uint8)):
            return name
    return None


# ------------------------------------------------------------------------------------------- time


def time_tactic(  # noqa: PLR0913 (what is timed, on what, by what)
    device: Device, op: Op, benchmark: Benchmark, tokens: int, arguments: Sequence[Any],
    tactic: Tactic, binaries: Mapping[Kernel, Binary], arranged: Mapping[str, torch.Tensor],
    *, gated: bool,
) -> Timing:  # fmt: skip
    """Median time of one call in a recorded series over cold data."""
    types = [type_of(value) for value in arguments]
    cost = op.cost(*types)
    calls = list(_series(device, op, benchmark, arguments, tactic, arranged, cost.moved_bytes))
    count = max(len(calls), 24 if cost.moved_bytes < 1 << 30 else 6)
    torch.cuda.synchronize()
    with device.recording() as graph:
        for i in range(count):
            one = calls[i % len(calls)]
            launch_all(device, tactic.launches, binaries, one.addresses, first=i == 0)
    graph.seconds(3)
    times = [1e6 * s / count for s in graph.seconds(REPLAYS)]
    graph.close()
    low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
    return Timing(
        op=op.name,
        benchmark=benchmark.name,
        tokens=tokens,
        tactic=tactic.name,
        gated=gated,
        microseconds=(low, middle, high),
        moved_bytes=cost.moved_bytes,
        flops=cost.flops,
        launches=len(tactic.launches),
        config=dict(tactic.config),
        facts=tuple(device.facts(binaries[one.kernel]) for one in tactic.launches),
    )


def _series(
    device: Device, op: Op, benchmark: Benchmark, arguments: Sequence[Any], tactic: Tactic,
    arranged: Mapping[str, torch.Tensor], moved_bytes: float,
) -> Iterator[Bound]:  # fmt: skip
    """Calls whose data together passes the L2 cache three times."""
    copies = max(2, math.ceil(3 * device.l2_bytes / max(moved_bytes, 1.0)))
    if benchmark.vary is not None:
        for i in range(max(copies, 12)):
            varied = benchmark.vary(tuple(arguments), i)
            same = {
                name: arranged[name]
                for name, old, new in zip(op.arguments, arguments, varied, strict=True)
                if old is new and name in arranged
            }
            yield Bound(op, varied, tactic, arranged=same)
        return
    each = sum(t.numel() * t.element_size() for t in arranged.values())
    copies = max(1, min(copies, 96, int(_SERIES_BYTES // max(each, 1))))
    for i in range(copies):
        mine = arranged if i == 0 else {name: t.clone() for name, t in arranged.items()}
        yield Bound(op, arguments, tactic, arranged=mine)
