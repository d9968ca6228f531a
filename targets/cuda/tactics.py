"""Which tactic to use: a model of time, overridden by measured rows.

The model is a roofline a launch with three corrections: a grid that does not fill the device's
multiprocessors draws less bandwidth; a last wave that is not full costs as much as a full one in
arithmetic; and every launch has a floor that nothing hides. `flops` of a launch count padding, so a
tactic that pads rows for the tensor cores pays for it on a device with few of them.

Measured rows stand in `targets/tactics/<target>.json`. A row names an op, the sizes of its
arguments, the tactic that was fastest there and how long it took, and where that was measured.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lingc.errors import InputError
from lingc.kernel import Launch, Tactic
from lingc.op import Op
from lingc.plan import TensorType
from lingc.targets.spec import Target

READ_SHARE = 0.96
"""Of the datasheet's bandwidth that real kernels reach at best: 4.6 of 4.8 TB/s on one H200."""

SM_BYTES_PER_S = 83e9
"""What one multiprocessor can draw: 48 of them drew 3.98 TB/s on one H200."""

MMA_SHARE = 0.75
"""Of the datasheet's tensor rate that the best kernels reach."""

FLOOR_S = {True: 3.0e-6, False: 4.5e-6}
"""What a launch costs beside its bytes, dependent or not: hand-off, first loads, reduction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        key: `key` of the arguments.
        microseconds: Of one call, hand-off included.
        device: As it names itself.
        sms: Multiprocessors that were used.
        date: ISO date.
        command: What was run.
    """

    op: str
    key: str
    tactic: str
    microseconds: float
    device: str
    sms: int
    date: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A tactic and why it was chosen.

    Attributes:
        seconds: Measured, or predicted.
        row: The measurement, or None where the model chose.
    """

    tactic: Tactic
    seconds: float
    row: Row | None = None

    @property
    def origin(self) -> str:
        """`model`, or where it was measured."""
        row = self.row
        return "model" if row is None else f"{row.device}, {row.sms} SMs, {row.date}"


def key(arguments: Sequence[Any]) -> str:
    """Sizes and literals of an op's arguments, as rows name them: `bf16[1, 4096], fp8, 1e-06`."""
    return ", ".join("-" if value is None else str(value) for value in arguments)


def predict(launch: Launch, target: Target) -> float:
    """Seconds of a launch, by the model; only to compare tactics with."""
    bandwidth = (target.hbm_bytes_per_s or 1e12) * READ_SHARE
    sms = target.sms or 1
    blocks = math.prod(launch.grid)
    busy = min(sms, blocks)
    drawn = min(bandwidth, busy * SM_BYTES_PER_S)
    slots = sms * max(launch.blocks_per_sm, 1)
    full_waves = math.ceil(blocks / slots) * slots / blocks if blocks >= sms else sms / blocks
    rate = target.dense_flops_per_s.get(launch.rate, 0.0) * MMA_SHARE
    arithmetic = launch.flops / rate * full_waves if rate else 0.0
    return FLOOR_S[launch.dependent] + max(launch.moved_bytes / drawn, arithmetic)


def predict_tactic(tactic: Tactic, target: Target) -> float:
    """Seconds of all of a tactic's launches."""
    return sum(predict(launch, target) for launch in tactic.launches)


def rank(tactics: Sequence[Tactic], target: Target) -> list[Choice]:
    """Tactics by predicted time; of equal ones the op's own order."""
    choices = [Choice(tactic=one, seconds=predict_tactic(one, target)) for one in tactics]
    return sorted(choices, key=lambda choice: choice.seconds)


def choose(op: Op, target: Target, arguments: Sequence[TensorType | Any]) -> Choice:
    """The tactic for arguments of known sizes.

    Raises:
        InputError: The op has no kernel for them, with its reason.
    """
    reason = op.refusal(target, *arguments)
    tactics = op.tactics(target, *arguments) if reason is None else ()
    if not tactics:
        raise InputError(
            f"{op.name} has no kernel for {key(arguments)}: {reason or 'none is written yet'}",
            hint="`lingc targets` lists what else can be built",
        )
    named = {tactic.name: tactic for tactic in tactics}
    row = measured(target).get((op.name, key(arguments)))
    if row is not None and row.tactic in named:
        return Choice(tactic=named[row.tactic], seconds=row.microseconds * 1e-6, row=row)
    return rank(tactics, target)[0]


def measured(target: Target) -> Mapping[tuple[str, str], Row]:
    """Rows of a target by op and key; none where nothing was measured."""
    path = resources.files("lingc.targets").joinpath("tactics", f"{target.name}.json")
    if not path.is_file():
        return {}
    rows = [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    return {(row.op, row.key): row for row in rows}
