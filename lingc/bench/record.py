"""What a run leaves behind: plain data, with what is needed to read it later."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lingc import __version__
from lingc.device import Device
from lingc.parity.budget import Check
from lingc.parity.compare import Summary
from lingc.parity.side import Mode

FORMAT = 1
"""Version of a record."""

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        engine: A package.
        against: Another package in eager's place.
        checkpoint: Eager's weights, and an engine's that has none; may be missing with `against`.
        batches: Sequences at once, for decoding.
        context: Tokens in the cache before decoding.
        prefill: Tokens of a prompt, for prefill and the time to the first token.
        tokens: Decode steps to time on each side, for each batch size.
        drafts: Tokens that the MTP layer drafts a round; 0 leaves that out.
        threads: Of both sides; every core that this process may use where None.
        starts: Processes to start on each side.
    """

    engine: Path
    cache_dir: Path
    against: Path | None = None
    checkpoint: Path | None = None
    batches: tuple[int, ...] = (1, 4)
    context: int = 128
    prefill: int = 512
    tokens: int = 64
    drafts: int = 0
    threads: int | None = None
    starts: int = 3

    @property
    def cores(self) -> int:
        """Threads of both sides."""
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Values of one side."""

    p10: float
    p50: float
    p90: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One thing measured on both sides.

    Attributes:
        name: `decode`, `prefill`, `first token`, `start`, `memory`, `mapped files`, `speculative`.
        detail: `batch 4 after 128 tokens`.
        unit: Of the spreads: `tokens/s`, `s` or `B`.
        ratio: How many times better the engine is: faster, or smaller; None where one side is 0.
    """

    name: str
    detail: str
    unit: str
    engine: Spread
    baseline: Spread
    ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """One mode of the gate: a side against its reference."""

    side: str
    reference: str
    mode: Mode
    summary: Summary
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A whole run.

    Attributes:
        engine: Name, bundle id, precision, target, checkpoint identity.
        baseline: The same of the other side.
        measures: None where the gate is red.
        acceptance: Accepted share of the drafts, by place in the round.
        other_cores: Cores that other processes kept busy meanwhile; None where nobody tells.
    """

    engine: Mapping[str, Any]
    baseline: Mapping[str, Any]
    settings: Settings
    date: str
    gate: tuple[GateRow, ...]
    measures: tuple[Measure, ...]
    acceptance: tuple[float | None, ...] = ()
    other_cores: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the gate is green."""
        return all(row.ok for row in self.gate)


def spread(values: Sequence[float]) -> Spread:
    """Percentiles of what was measured."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90)).tolist()
    return Spread(p10=p10, p50=p50, p90=p90, samples=len(values))


def measure(
    name: str, detail: str, unit: str, engine: Sequence[float], baseline: Sequence[float]
) -> Measure:
    """Medians and their ratio; of rates more is better, of seconds and bytes less."""
    a, b = spread(engine), spread(baseline)
    better, worse = (a.p50, b.p50) if unit == "tokens/s" else (b.p50, a.p50)
    ratio = better / worse if better > 0 and worse > 0 else None
    return Measure(name=name, detail=detail, unit=unit, engine=a, baseline=b, ratio=ratio)


def document(record: Record, versions: Mapping[str, str | None]) -> dict[str, Any]:
    """The record in JSON's types. Nothing in it names a place on this machine."""
    settings = record.settings
    return {
        "kind": "bench",
        "format": FORMAT,
        **about(versions, record.date),
        "machine": {
            **machine(),
            "threads": settings.cores,
            "other_cores": record.other_cores,
        },
        "engine": dict(record.engine),
        "baseline": dict(record.baseline),
        "settings": {
            "batches": list(settings.batches),
            "context": settings.context,
            "prefill": settings.prefill,
            "tokens": settings.tokens,
            "drafts": settings.drafts,
            "starts": settings.starts,
        },
        "gate": {"ok": record.is_right, "modes": [_gate_row(row) for row in record.gate]},
        "measures": [_measure(one) for one in record.measures],
        "acceptance": list(record.acceptance),
    }


def device_facts(device: Device) -> dict[str, Any]:
    """A GPU in words and numbers."""
    return {
        "name": device.name,
        "sms": device.sms,
        "l2_bytes": device.l2_bytes,
        "driver": device.driver_version,
    }


def about(versions: Mapping[str, str | None], date: str) -> dict[str, Any]:
    """When and by what a record was made."""
    return {"date": date, "lingc": __version__, "commit": commit(), "versions": dict(versions)}


class OtherLoad:
    """Counts, from its making on, what other processes do with the machine's cores."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float | None:
        """How many cores they kept busy on average."""
        now = self._now()
        if now is None or self._start is None:
            return None
        wall, others = (b - a for a, b in zip(self._start, now, strict=True))
        return max(others, 0.0) / max(wall, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds passed, and seconds that cores worked for others."""
        try:
            line = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, *_ = map(int, line.split()[1:])
        busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        used = own.user + own.system + own.children_user + own.children_system
        return own.elapsed, busy - used


def machine() -> dict[str, Any]:
    """The processor, as it names itself."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of a checkout, with a plus where files differ from it."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None
    answers = []
    for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno")):
        asked = (git, "-C", str(_ROOT), *words)
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
        if answer.returncode != 0:
            return None
        answers.append(answer.stdout.strip())
    head, changes = answers
    return head + ("+" if changes else "")


def _gate_row(row: GateRow) -> dict[str, Any]:
    found = row.summary
    return {
        "side": row.side,
        "reference": row.reference,
        "mode": row.mode,
        "tokens": found.tokens,
        "mean_kl": _finite(found.mean_kl),
        "max_kl": _finite(found.max_kl),
        "max_abs": _finite(found.max_abs),
        "top1_above_margin": found.top1_above_margin,
        "ok": row.ok,
        "broken": [f"{c.name} is {c.found}, {c.limit} is due" for c in row.checks if not c.ok],
    }


def _measure(one: Measure) -> dict[str, Any]:
    return {
        "name": one.name,
        "detail": one.detail,
        "unit": one.unit,
        "ratio": one.ratio,
        **{
            side: {"p10": s.p10, "p50": s.p50, "p90": s.p90, "samples": s.samples}
            for side, s in (("engine", one.engine), ("baseline", one.baseline))
        },
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
