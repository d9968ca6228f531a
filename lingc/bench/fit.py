"""What kernels reach, fitted to measurements, and how well the model of time then tells others.

A measurement is a tactic's launches as the model sees them and how long they took together.
What a few measurements cannot tell stays near what kernels reach as a rule.
"""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lingc import targets
from lingc.errors import InputError
from lingc.targets.cuda.tactics import Reach, features, predict_features
from lingc.targets.spec import Target

Array = NDArray[np.float64]

RULE = Reach(floor_s=2e-6, read=0.93, issue=6e12, mma=0.85, token_s=0.1e-6, draw=60e9)
"""What a kernel reaches as a rule; where no measurement says otherwise.

The tensor rate is one that kernels do reach where it is low: 125 to 130 of 148 TFLOP/s on an H20.
Where it is high, they are held back by what a multiprocessor brings to its tensor cores.
"""

RULES: Mapping[str, Reach] = {
    "gemv.": replace(RULE, issue=1.2e12),
    "experts.": replace(RULE, issue=1.2e12),
    ".int4": replace(RULE, issue=0.75e12),
    "router.": replace(RULE, issue=0.25e12),
}
"""The same of kinds by how they begin or end: products whose operands go through registers, INT4
codes that are taken apart before them, products without tensor cores."""

_CHIP = re.compile(r"\bH\d+(-3e)?\b", re.IGNORECASE)

_LEAST = (0.2e-6, 0.05, 1e9, 0.02, 0.001e-6, 2e9)
_MOST = (60e-6, 1.04, 1e14, 1.0, 5e-6, 90e9)
_PULL = (0.05, 0.15, 0.02, 0.5, 0.02, 0.05)
"""How strongly each is held at the rule, against a measurement's deviation of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A tactic on arguments of known sizes.

    Attributes:
        label: For a reader.
        launches: As `tactics.features` gives them.
        seconds: Of all launches together.
    """

    label: str
    target: Target
    launches: tuple[Mapping[str, Any], ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """How far predictions are off, as shares of what was measured.

    Attributes:
        median: Of the absolute deviations.
        p90: Nine of ten are no farther off.
        bias: Median with its sign; above 0 the model predicts too much.
    """

    count: int
    median: float
    p90: float
    bias: float


def target_of(device: Mapping[str, Any]) -> Target:
    """The target whose datasheet a device of a record has, with as many multiprocessors as it used.

    Raises:
        InputError: No target has such a device.
    """
    chip = _CHIP.search(str(device["name"]))
    wanted = "" if chip is None else chip[0].lower()
    for name, one in targets.ALL.items():
        if wanted and name.removesuffix("-sxm") == wanted:
            return replace(one, sms=int(device["sms"]))
    raise InputError(
        f"no target is a {device['name']!r}, so nothing can be predicted for it",
        hint=f"known: {', '.join(targets.ALL)}",
    )


def read_record(record: Mapping[str, Any]) -> list[Measured]:
    """The measurements of a record of `lingc tune` or `lingc bench-ops`, or of an engine's profile.

    Raises:
        InputError: It is no such record, or of an unknown device.
    """
    readers = {"tune": _of_tune, "bench-ops": _of_bench_ops, "bench-engine": _of_profile}
    reader = readers.get(str(record.get("kind")))
    if reader is None or "device" not in record:
        raise InputError(
            "this is no record of `lingc tune`, of `lingc bench-ops` or of an engine",
            hint="write one with --record, or with -o",
        )
    return list(reader(record, target_of(record["device"])))


def read_steps(record: Mapping[str, Any]) -> list[Measured]:
    """Whole steps of an engine that was profiled; none of any other record."""
    if record.get("kind") != "bench-engine":
        return []
    target = target_of(record["device"])
    return [
        Measured(
            label=f"decode, batch {step['batch']}, context {step['context']}",
            target=target,
            launches=tuple(part for one in step["profile"] for part in one["parts"] * one["steps"]),
            seconds=step["step"]["p50"],
        )
        for step in _profiled(record)
    ]


def _profiled(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Decode steps of which every launch is known."""
    return [
        step
        for step in record["decode"]
        if step["profile"] and all(one.get("parts") for one in step["profile"])
    ]


def _of_profile(record: Mapping[str, Any], target: Target) -> Iterator[Measured]:
    for step in _profiled(record):
        for one in step["profile"]:
            if one["measured"] > 0:  # a difference of two programs may be less than its noise
                yield Measured(
                    label=f"{one['op']}, batch {step['batch']}, {one['tactic']}",
                    target=target,
                    launches=tuple(one["parts"]),
                    seconds=1e-6 * one["measured"],
                )


def _of_tune(record: Mapping[str, Any], target: Target) -> Iterator[Measured]:
    for entry in record["shapes"]:
        for one in entry["candidates"]:
            if one["microseconds"] is not None:
                yield Measured(
                    label=f"{entry['op']}, {entry['work']}, {one['tactic']}",
                    target=target,
                    launches=tuple(one["launches"]),
                    seconds=1e-6 * one["microseconds"][1],
                )


def _of_bench_ops(record: Mapping[str, Any], target: Target) -> Iterator[Measured]:
    """Launches are those of the tactic as it is now; one that is gone is left out."""
    from lingc.op import type_of  # noqa: PLC0415 (imports torch)
    from lingc.plugins.table import OPS  # noqa: PLC0415

    for row in record["timings"]:
        op = OPS[row["op"]]
        for benchmark in op.benchmarks:
            if benchmark.name != row["benchmark"]:
                continue
            arguments = op.inputs(*benchmark.case(row["tokens"]), dtype="bf16", device="meta")
            types = [type_of(value) for value in arguments]
            for tactic in op.tactics(target, *types):
                if tactic.name == row["tactic"]:
                    yield Measured(
                        label=f"{op.name}, {benchmark.name}, {row['tokens']}, {tactic.name}",
                        target=target,
                        launches=tuple(map(features, tactic.launches)),
                        seconds=1e-6 * row["microseconds"][1],
                    )


def predicted(one: Measured, reaches: Mapping[str, Reach]) -> float:
    """Seconds by the model."""
    return sum(
        predict_features(launch, one.target, _known(launch["kind"], reaches))
        for launch in one.launches
    )


def rule_of(kind: str) -> Reach:
    """What kernels of a kind reach where nothing was measured."""
    through_registers = kind.startswith(("gemv.", "experts."))
    if kind.endswith(".int4") and through_registers:
        return RULES[".int4"]
    return next((one for name, one in RULES.items() if kind.startswith(name)), RULE)


def _known(kind: str, reaches: Mapping[str, Reach]) -> Reach:
    return reaches.get(kind) or rule_of(kind)


def error(some: Iterable[Measured], reaches: Mapping[str, Reach]) -> Error:
    """Predictions against measurements."""
    shares = [predicted(one, reaches) / one.seconds - 1 for one in some]
    if not shares:
        return Error(count=0, median=0.0, p90=0.0, bias=0.0)
    away = [abs(share) for share in shares]
    return Error(
        count=len(shares),
        median=statistics.median(away),
        p90=float(np.quantile(away, 0.9)),
        bias=statistics.median(shares),
    )


def fit(some: Sequence[Measured], rounds: int = 60) -> dict[str, Reach]:
    """What each kind of kernel reaches: least squares of logarithms, damped.

    Large deviations count linearly, so that one tactic that does badly for a reason of its own
    does not spoil its kind.
    """
    kinds = sorted({launch["kind"] for one in some for launch in one.launches})
    rule = np.log(np.array([_values(rule_of(name)) for name in kinds]))
    low, high = np.log(np.array(_LEAST)), np.log(np.array(_MOST))
    pull = np.array([_PULL] * len(kinds))
    now, damp = rule.copy(), 1e-2
    loss, slope, rest = _linear(some, kinds, now, rule, pull)
    for _ in range(rounds):
        square = slope.T @ slope
        step = np.linalg.solve(square + damp * np.eye(len(square)), -slope.T @ rest)
        tried = np.clip(now + step.reshape(now.shape), low, high)
        found = _linear(some, kinds, tried, rule, pull)
        if found[0] < loss:
            now, damp = tried, damp / 3
            loss, slope, rest = found
        else:
            damp *= 4
    return {name: _reach(row) for name, row in zip(kinds, np.exp(now), strict=True)}


def _linear(
    some: Sequence[Measured], kinds: Sequence[str], at: Array, rule: Array, pull: Array
) -> tuple[float, Array, Array]:
    """Loss, slopes and remainders, each measurement weighted down where it is far off."""
    small = 1e-4
    index = {name: i for i, name in enumerate(kinds)}
    reaches = {name: _reach(row) for name, row in zip(kinds, np.exp(at), strict=True)}
    rest = np.array([np.log(predicted(one, reaches) / one.seconds) for one in some])
    slope = np.zeros((len(some), at.size))
    for i, one in enumerate(some):
        for name in {launch["kind"] for launch in one.launches}:
            for j in range(at.shape[1]):
                moved = np.exp(at[index[name]])
                moved[j] *= 1 + small
                other = predicted(one, {**reaches, name: _reach(moved)})
                value = (np.log(other / one.seconds) - rest[i]) / small
                slope[i, index[name] * at.shape[1] + j] = value
    weight = 1 / np.sqrt(1 + (rest / 0.2) ** 2)
    held = (pull * (at - rule)).reshape(-1)
    loss = float((np.sqrt(1 + (rest / 0.2) ** 2) * 0.08).sum() + (held**2).sum())
    weight = np.sqrt(weight)
    slopes = np.concatenate((slope * weight[:, None], np.diag(pull.reshape(-1))))
    return loss, slopes, np.concatenate((rest * weight, held))


def _values(one: Reach) -> tuple[float, ...]:
    return one.floor_s, one.read, one.issue, one.mma, one.token_s, one.draw


def _reach(values: Array) -> Reach:
    floor_s, read, issue, mma, token_s, draw = map(float, values)
    return Reach(floor_s=floor_s, read=read, issue=issue, mma=mma, token_s=token_s, draw=draw)


def document(
    some: Sequence[Measured], reaches: Mapping[str, Reach], about: Mapping[str, Any]
) -> dict[str, Any]:
    """The file of the model, in JSON's types."""

    def plain(one: Reach) -> dict[str, float]:
        return {
            "floor_us": float(f"{1e6 * one.floor_s:.4g}"),
            "read": float(f"{one.read:.4g}"),
            "issue_gflops": float(f"{1e-9 * one.issue:.4g}"),
            "mma": float(f"{one.mma:.4g}"),
            "token_us": float(f"{1e6 * one.token_s:.4g}"),
            "draw_gb_s": float(f"{1e-9 * one.draw:.4g}"),
        }

    kinds: dict[str, Any] = {"": plain(RULE)}
    for name, one in sorted(reaches.items()):
        mine = [m for m in some if any(launch["kind"] == name for launch in m.launches)]
        found = error(mine, reaches)
        kinds[name] = {
            **plain(one),
            "measured": found.count,
            "median_error": round(found.median, 4),
        }
    whole = {name: round(value, 4) for name, value in asdict(error(some, reaches)).items()}
    return {**about, "error": whole, "kinds": kinds}
