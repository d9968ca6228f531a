"""Which tactic to use: a model of time, overridden by measured rows.

The model is a roofline a launch with corrections: a grid that does not fill the device's
multiprocessors draws less bandwidth, and so does a kernel that has little on its way; a last wave
that is not full costs as much as a full one; products whose operands go through registers are
issued at a rate of their own, which no datasheet has; every launch has a floor that nothing hides,
and a longer one where every block prepares several tokens for itself. `flops` of a launch count
padding, so a tactic that pads rows for the tensor cores pays for it on a device with few of them.
What a kernel reaches of each limit was fitted to measurements, and stands in
`targets/tactics/model.json` with where they were made.

Measured rows stand in `targets/tactics/<target>.json`; `lingc tune` writes them. A row names an op,
the sizes of its arguments, the tactic that was fastest there and how long it took, and where that
was measured. A shape without a row may use a neighbour's tactic, where the model has little against
it: `near` says when.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lingc import targets
from lingc.errors import InputError
from lingc.kernel import Launch, Tactic
from lingc.op import Op
from lingc.plan import TensorType
from lingc.targets.spec import Target

READ_SHARE = 0.96
"""Of the datasheet's bandwidth that a kernel with nothing to compute reads at: 4.6 of 4.8 TB/s on
one H200."""

SM_BYTES_PER_S = 83e9
"""What one multiprocessor can draw: 48 of them drew 3.98 TB/s on one H200."""

BLEND = 4
"""Two limits that are met at once cost more than each: the norm in which they add up."""

HANDOFF_S = 1.5e-6
"""What a launch that waits for the end of the one before costs more than a dependent one."""

FINE = 0.03
"""Tactics that the model finds so close are alike to it: the op's own order decides."""

ALLOWED = 0.1
"""How much slower than its own choice the model may find a neighbour's measured tactic."""

WITHIN = 2.0
"""A neighbour has no size more than so many times larger or smaller."""

_SIZES = re.compile(r"\b(?:f64|f32|bf16|f8e4m3|i64|i32|u8|bool)\[([^\]]*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What a kernel reaches.

    Attributes:
        floor_s: What a dependent launch costs beside its bytes and products, in seconds.
        read: Of what a kernel with nothing to compute reads at, by this one's stream.
        issue: Flops a second that one multiprocessor issues, whatever its tensor cores could do.
        mma: Of the datasheet's tensor rate.
        token_s: What each token beyond the first costs beside these, where every block prepares
            all tokens for itself; in seconds.
        draw: Bytes a second that one multiprocessor draws, by what this kernel has on its way.
    """

    floor_s: float
    read: float
    issue: float
    mma: float
    token_s: float = 0.0
    draw: float = SM_BYTES_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        key: `key` of the arguments.
        microseconds: Of one call, hand-off included.
        model: What the model would have taken, when it was measured.
        model_microseconds: Of that one; None where it is wrong there, or was not measured.
        device: As it names itself.
        sms: Multiprocessors that were used.
        date: ISO date.
        command: What was run.
    """

    op: str
    key: str
    tactic: str
    microseconds: float
    model: str = ""
    model_microseconds: float | None = None
    device: str
    sms: int
    date: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A tactic and why it was chosen.

    Attributes:
        seconds: Measured, or predicted.
        row: The measurement that it follows from, or None where the model chose.
        is_near: Whether that is of a neighbour, not of this very shape.
    """

    tactic: Tactic
    seconds: float
    row: Row | None = None
    is_near: bool = False

    @property
    def origin(self) -> str:
        """`model`, or where it was measured, `near` before it where that was a neighbour."""
        row = self.row
        if row is None:
            return "model"
        return f"{'near ' if self.is_near else ''}{row.device}, {row.sms} SMs, {row.date}"


def key(arguments: Sequence[Any]) -> str:
    """Sizes and literals of an op's arguments, as rows name them: `bf16[1, 4096], fp8, 1e-06`."""
    return ", ".join("-" if value is None else str(value) for value in arguments)


def kind(launch: Launch) -> str:
    """What the model tells kernels apart by: function, and format of the weights."""
    kernel = launch.kernel
    stem = kernel.source.rpartition("/")[2].partition(":")[0].rpartition(".")
    place = stem[0] if kernel.language == "cuda" else stem[2]
    form = dict(kernel.constants).get("FORMAT")
    name = f"{place}.{kernel.entry}"
    return name if form is None else f"{name}.{FORMATS[int(form)]}"


FORMATS = ("bf16", "fp8", "int4")
"""Of weights, as the constant FORMAT of kernels counts them."""


def features(launch: Launch) -> Mapping[str, Any]:
    """All that the model knows of a launch, in JSON's types."""
    return {
        "kind": kind(launch),
        "blocks": math.prod(launch.grid),
        "blocks_per_sm": launch.blocks_per_sm,
        "moved_bytes": launch.moved_bytes,
        "flops": launch.flops,
        "rate": launch.rate,
        "dependent": launch.dependent,
        "tokens": launch.tokens or int(dict(launch.kernel.constants).get("TOKENS", 1)),
    }


def predict(launch: Launch, target: Target) -> float:
    """Seconds of a launch, by the model."""
    known = features(launch)
    return predict_features(known, target, reach(known["kind"]))


def predict_features(launch: Mapping[str, Any], target: Target, known: Reach) -> float:
    """Seconds of what `features` gives, by a kernel that reaches so much."""
    sms = target.sms or 1
    blocks = int(launch["blocks"])
    bandwidth = (target.hbm_bytes_per_s or 1e12) * READ_SHARE * known.read
    slots = sms * max(int(launch["blocks_per_sm"]), 1)
    whole = math.ceil(blocks / slots) * slots / blocks
    rate = target.dense_flops_per_s.get(launch["rate"], 0.0) * known.mma
    moved_bytes, flops = float(launch["moved_bytes"]), float(launch["flops"])
    filled = whole if blocks >= sms else sms / blocks
    seconds = (
        moved_bytes / bandwidth * (whole if blocks > slots else 1.0),
        moved_bytes / (min(sms, blocks) * known.draw) * (whole if blocks > slots else 1.0),
        flops / rate * filled if rate else 0.0,
        flops / (sms * known.issue) * filled,
    )
    more = 0.0 if launch["dependent"] else HANDOFF_S
    more += known.token_s * (int(launch.get("tokens", 1)) - 1)
    return known.floor_s + more + float(sum(one**BLEND for one in seconds) ** (1 / BLEND))


def arithmetic(launch: Launch, target: Target) -> float:
    """Seconds that a launch's products take at the target's tensor rate, and at the least."""
    rate = target.dense_flops_per_s.get(launch.rate, 0.0) * reach(kind(launch)).mma
    return launch.flops / rate if rate else 0.0


def predict_tactic(tactic: Tactic, target: Target) -> float:
    """Seconds of all of a tactic's launches."""
    return sum(predict(launch, target) for launch in tactic.launches)


def reach(name: str) -> Reach:
    """What the kernels of a kind reach; of one that was not measured, what kernels do as a rule."""
    known = _reaches()
    return known.get(name) or known[""]


@cache
def _reaches() -> Mapping[str, Reach]:
    kinds = json.loads(model_file().read_text(encoding="utf-8"))["kinds"]
    return {
        name: Reach(
            floor_s=1e-6 * one["floor_us"], read=one["read"], issue=1e9 * one["issue_gflops"],
            mma=one["mma"], token_s=1e-6 * one.get("token_us", 0.0),
            draw=1e9 * one.get("draw_gb_s", 1e-9 * SM_BYTES_PER_S),
        )
        for name, one in kinds.items()
    }  # fmt: skip


def rank(tactics: Sequence[Tactic], target: Target) -> list[Choice]:
    """Tactics by predicted time; of those that are alike to the model in the op's own order."""
    choices = [Choice(tactic=one, seconds=predict_tactic(one, target)) for one in tactics]
    least = min((choice.seconds for choice in choices), default=0.0) * (1 + FINE)
    return sorted(choices, key=lambda choice: max(choice.seconds, least))


def choose(
    op: Op,
    target: Target,
    arguments: Sequence[TensorType | Any],
    *,
    known_as: Sequence[TensorType | Any] | None = None,
) -> Choice:
    """The tactic for arguments of known sizes.

    Args:
        op: Of plugins/.
        target: What it runs on.
        arguments: As `op.tactics` takes them.
        known_as: The same as rows name them, sizes of the runtime's state by their letters.

    Raises:
        InputError: The op has no kernel for them, with its reason.
    """
    tactics = offered(op, target, arguments)
    named = {tactic.name: tactic for tactic in tactics}
    name = key(arguments if known_as is None else known_as)
    rows = measured(target)
    row = rows.get((op.name, name))
    if row is not None and row.tactic in named:
        return Choice(tactic=named[row.tactic], seconds=row.microseconds * 1e-6, row=row)
    ranked = rank(tactics, target)
    return (
        near(rows, op.name, name, ranked) or near(kin(target), op.name, name, ranked) or ranked[0]
    )


def offered(
    op: Op, target: Target, arguments: Sequence[TensorType | Any], *, invariant: bool = False
) -> Sequence[Tactic]:
    """Tactics for arguments of known sizes; at least one.

    Args:
        invariant: Whether for an engine whose bits do not depend on the batch.

    Raises:
        InputError: The op has no kernel for them, with its reason.
    """
    reason = op.refusal(target, *arguments)
    made = op.pinned if invariant else op.tactics
    tactics = made(target, *arguments) if reason is None else ()
    if not tactics:
        raise InputError(
            f"{op.name} has no kernel for {key(arguments)}: {reason or 'none is written yet'}",
            hint="`lingc targets` lists what else can be built",
        )
    return tactics


def near(
    rows: Mapping[tuple[str, str], Row], op: str, name: str, ranked: Sequence[Choice]
) -> Choice | None:
    """The tactic of a measured neighbour, or None where the model decides.

    A neighbour is a row of the same op with the same literals and kinds of arguments. One counts
    where no size is more than `WITHIN` times larger or smaller; farther rows count as a pair, one
    with no size larger and one with none smaller, that had the same winner. The tactic must run
    this shape, and the model may find it at most `ALLOWED` slower than its own choice: so a shape
    without a row is never worse off by more than that, if the model is right.

    Args:
        rows: By op and key.
        op: Its name.
        name: Key of the arguments.
        ranked: The shape's tactics, the model's choice first.
    """
    form, sizes = _form(name)
    family = [(_form(each)[1], rows[o, each]) for o, each in sorted(rows)
              if o == op and _form(each)[0] == form]  # fmt: skip
    row = _nearest(family, sizes)
    if row is None:
        return None
    most = ranked[0].seconds * (1 + ALLOWED)
    for choice in ranked:
        if choice.tactic.name == row.tactic and choice.seconds <= most:
            return replace(choice, row=row, is_near=True)
    return None


def _nearest(family: Sequence[tuple[tuple[int, ...], Row]], sizes: tuple[int, ...]) -> Row | None:
    def distance(other: tuple[int, ...]) -> float:
        return sum(_apart(a, b) for a, b in zip(other, sizes, strict=True))

    def those(fits: Callable[[int, int], bool]) -> list[tuple[tuple[int, ...], Row]]:
        return [one for one in family if all(map(fits, one[0], sizes))]

    below, above = those(operator.le), those(operator.ge)
    close = those(lambda a, b: max(a, b) <= WITHIN * min(a, b))
    if close:
        return min(close, key=lambda one: distance(one[0]))[1]
    if below and above:
        pair = [min(some, key=lambda one: distance(one[0])) for some in (below, above)]
        if pair[0][1].tactic == pair[1][1].tactic:
            return min(pair, key=lambda one: distance(one[0]))[1]
    return None


def _apart(a: int, b: int) -> float:
    return abs(math.log(max(a, 1) / max(b, 1)))


@cache
def _form(name: str) -> tuple[str, tuple[int, ...]]:
    """A key without the sizes of its tensors, and these sizes."""
    sizes: list[int] = []

    def take(found: re.Match[str]) -> str:
        dims = [part.strip() for part in found[1].split(",")]
        sizes.extend(int(dim) for dim in dims if dim.isdecimal())
        kept = ["#" if dim.isdecimal() else dim for dim in dims]
        return found[0].replace(found[1], ", ".join(kept)) if found[1] else found[0]

    return _SIZES.sub(take, name), tuple(sizes)


@cache
def measured(target: Target) -> Mapping[tuple[str, str], Row]:
    """Rows of a target by op and key; none where nothing was measured."""
    return read_rows(rows_file(target))


@cache
def kin(target: Target) -> Mapping[tuple[str, str], Row]:
    """Rows of other targets with the same architecture and as many multiprocessors.

    They are neighbours and no more: their bandwidth or tensor rate is another.
    """
    others = [one for one in targets.ALL.values() if one.name != target.name]
    found: dict[tuple[str, str], Row] = {}
    for one in others:
        if (one.arch, one.sms) == (target.arch, target.sms):
            found = {**measured(one), **found}
    return found


def rows_file(target: Target) -> Path:
    """Where the rows of a target stand."""
    return _tables() / f"{target.name}.json"


def model_file() -> Path:
    """Where it stands what kernels reach."""
    return _tables() / "model.json"


def _tables() -> Path:
    return Path(str(resources.files("lingc.targets"))) / "tactics"


def read_rows(file: Path) -> dict[tuple[str, str], Row]:
    """Rows of a file by op and key; none where there is no file.

    Raises:
        InputError: It does not hold rows.
    """
    if not file.is_file():
        return {}
    try:
        rows = [Row(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{str(file)!r} holds no rows of tactics: {error}",
            hint="`lingc tune` writes such a file; remove this one to begin anew",
        ) from error
    return {(row.op, row.key): row for row in rows}
