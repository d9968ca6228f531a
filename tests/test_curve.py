"""Which kernels are timed on which part of a device, and what is made of the times."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.overrides import TorchFunctionMode

from lingc import targets
from lingc.bench import curve, kernels
from lingc.bench.curve import Curve
from lingc.bench.kernels import Fault, Timing
from lingc.bench.ops import Settings
from lingc.compile import silent
from lingc.errors import IncompatibleError

COUNTS = (48, 132, 78)


class Here(TorchFunctionMode):
    """Makes on the host what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple("cpu" if isinstance(one, str) and one == "cuda" else one for one in args)
        kwargs = {name: "cpu" if one == "cuda" else one for name, one in (kwargs or {}).items()}
        return func(*args, **kwargs)


def part(sms: int | None) -> Any:
    facts = {"name": "a GPU", "sms": sms or 132, "l2_bytes": 1, "driver_version": 13000}
    made = SimpleNamespace(capability=(9, 0), is_closed=False, **facts)
    made.close = lambda: setattr(made, "is_closed", True)
    return made


def settings(folder: Path, **changes: Any) -> Settings:
    asked = {"target": targets.get("h200-sxm"), "cache_dir": folder, "ops": ("fused_linear",),
             "tokens": (1,), "match": ("MLA output",), **changes}  # fmt: skip
    return Settings(**asked)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str, tuple[int, ...]]]]:
    """What was timed: multiprocessors, tactic, grid.

    A call takes a microsecond for each letter of its tactic's name, more on a smaller part.
    """
    seen = []

    def time_tactic(
        device: Any, op: Any, benchmark: Any, tokens: int, *given: Any, **_: Any
    ) -> Timing:
        tactic = given[1]
        seen.append((device.sms, tactic.name, tactic.launches[0].grid))
        us = len(tactic.name) * 132 / device.sms
        return Timing(op=op.name, benchmark=benchmark.name, tokens=tokens, tactic=tactic.name,
                      gated=True, microseconds=(us, us, us), moved_bytes=1e6 * us, flops=1.0,
                      launches=1)  # fmt: skip

    monkeypatch.setattr(kernels, "time_tactic", time_tactic)
    monkeypatch.setattr(kernels, "arrange_all", lambda *_: {})
    monkeypatch.setattr(kernels, "check", lambda *_: iter(()))
    monkeypatch.setattr(curve, "compile_kernels", lambda *_: {})
    monkeypatch.setattr(curve, "ceilings_of", lambda device, *_: {"read": device.sms * 1e10})
    monkeypatch.setattr(curve, "device_facts", lambda device: {"name": device.name})
    with Here():
        yield seen


def run(folder: Path, **changes: Any) -> Curve:
    return curve.run(settings(folder, **changes), COUNTS, silent, part)


def test_each_part_gets_the_tactics_of_a_target_of_its_size(
    timed: list[tuple[int, str, tuple[int, ...]]], tmp_path: Path
) -> None:
    found = run(tmp_path)

    wanted = curve.all_tactics(settings(tmp_path), COUNTS)
    assert [work.label for work, _ in wanted] == ["MLA output, BF16, 1 tokens"]
    (by_count,) = [tactics for _, tactics in wanted]
    assert [*by_count] == [132, 78, 48]
    assert timed == [
        (sms, one.name, one.launches[0].grid) for sms, some in by_count.items() for one in some
    ]
    assert len({grid for _, _, grid in timed}) > 1
    assert [(one.sms, len(one.tactic)) for one in found.points] == [
        (sms, min(len(one.name) for one in some)) for sms, some in by_count.items()
    ]
    assert found.gated == len(timed)


@pytest.mark.usefixtures("timed")
def test_a_tactic_that_is_wrong_for_one_count_is_not_timed_there(
    timed: list[tuple[int, str, tuple[int, ...]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_device: Any, op: Any, _arguments: Any, tactics: Any, *_: Any) -> Iterator[Fault]:
        bad = next(one.name for one in tactics if one.name.endswith(" for 78"))
        yield Fault(op=op.name, case="a case", tactic=bad, problem="wrong")

    monkeypatch.setattr(kernels, "check", check)

    found = run(tmp_path)

    names = {sms: [name for count, name, _ in timed if count == sms] for sms in COUNTS}
    assert len(names[78]) == len(names[132]) - 1
    assert [fault.problem for fault in found.faults] == ["wrong"]


@pytest.mark.usefixtures("timed")
def test_a_record_and_a_table_have_a_row_for_each_count(tmp_path: Path) -> None:
    found = run(tmp_path)

    head, rows = curve.table(found)
    assert head == ["SMs", "reading", "MLA output, BF16, 1"]
    assert [row[:2] for row in rows] == [["48", "0.48"], ["78", "0.78"], ["132", "1.32"]]
    assert all(row[2] == "1.00" for row in rows)  # a megabyte in a microsecond
    record = curve.document(found, settings(tmp_path), {"date": "2026-11-22"})
    assert json.loads(json.dumps(record)) == record
    assert [one["sms"] for one in record["points"]] == [132, 78, 48]
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.usefixtures("timed")
def test_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"sm_89, this device is sm_90"):
        run(tmp_path, target=targets.get("rtx-89"))


@pytest.mark.usefixtures("timed")
@pytest.mark.parametrize("refused", [None, 48])
def test_every_part_is_closed(tmp_path: Path, refused: int | None) -> None:
    opened: list[Any] = []

    def opening(sms: int | None) -> Any:
        if sms is not None and sms == refused:
            raise IncompatibleError("no such part")
        opened.append(part(sms))
        return opened[-1]

    with suppress(IncompatibleError):
        curve.run(settings(tmp_path), COUNTS, silent, opening)

    assert [one.sms for one in opened] == [132, 78, *([] if refused else [48])]
    assert all(one.is_closed for one in opened)


def test_only_counts_and_shapes_decide_what_is_compiled(tmp_path: Path) -> None:
    some = curve.all_tactics(settings(tmp_path, tokens=(1, 4)), (132, 132, 48))

    assert [[*by_count] for _, by_count in some] == [[132, 48], [132, 48]]
