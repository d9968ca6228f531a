"""The command line of `lingc bench`, where the engine is a CUDA engine or should be one."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lingc.bench import engine, engine_checks, speculation
from lingc.bench.engine import Report, Settings
from lingc.bench.engine_times import Profiled
from lingc.bench.record import Spread
from lingc.cli import bench as cli
from lingc.cli import lingc
from lingc.errors import GateError, ResourceError, UsageError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--synthetic-weights", "0"], "--synthetic-weights is for a CUDA engine"),
        (["--profile"], "--profile is for a CUDA engine"),
        (["--sms", "78"], "--sms is for a CUDA engine"),
        (["--target", "h20"], "--target is for a CUDA engine"),
        (["--context", "1,2"], "only a CUDA engine is timed at several contexts"),
        (["--mtp", "1,3"], "only a CUDA engine is timed at several contexts, prompts or drafts"),
        (["--mtp", "few"], "--mtp 'few' is not a list of sizes"),
        (["--acceptance", "0.5"], "--acceptance is for a CUDA engine"),
        (["--acceptance", "1.5"], "--acceptance '1.5' is not a list of shares from 0 to 1"),
        (["--acceptance", "half"], "--acceptance 'half' is not a list of shares from 0 to 1"),
        (["--prefill", "0"], "--prefill '0' is not a list of sizes"),
        (["--batch", "1,x"], "--batch '1,x' is not a list of sizes"),
    ],
)
def test_what_another_engine_has_not_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_kind", lambda _: "onnx")

    done = CliRunner().invoke(lingc, ["bench", "x.ling", "--checkpoint", "x", *words])

    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)


def test_a_cuda_engine_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def run(_opened: Any, settings: Settings, *_: Any) -> Report:
        asked.append(settings)
        return Report(device={"name": "a GPU", "sms": 132}, loaded=1.0)

    monkeypatch.setattr(cli, "_kind", lambda _: "cuda")
    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(engine, "document", lambda *_: {})
    opened: list[Any] = []
    monkeypatch.setattr(
        "lingc.runtime.load.open_engine", lambda path, **more: opened.append((path.name, more))
    )
    words = ["x.ling", "--target", "h20-3e", "--synthetic-weights", "7", "--routing", "zipf",
             "--batch", "1,16", "--context", "400,4096", "--profile", "--sms", "78",
             "--mtp", "0,1,3", "--acceptance", "0.5,1"]  # fmt: skip

    done = CliRunner().invoke(lingc, ["bench", *words], catch_exceptions=False)

    assert done.exit_code == 0
    (one,) = asked
    assert (one.seed, one.routing, one.batches, one.contexts) == (7, "zipf", (1, 16), (400, 4096))
    assert (one.profile, one.sms) == (True, 78)
    assert (one.drafts, one.acceptances) == ((1, 3), (0.5, 1.0))
    assert "a GPU, 132 SMs" in done.output
    assert opened == [("x.ling", {"checkpoint": None, "cache_dir": None, "target": "h20-3e"})]


def test_weights_come_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_kind", lambda _: "cuda")
    words = ["bench", "x.ling", "--synthetic-weights", "7", "--checkpoint", "x"]

    done = CliRunner().invoke(lingc, words)

    assert isinstance(done.exception, UsageError)
    assert "--checkpoint and --synthetic-weights contradict each other" in str(done.exception)


def test_rounds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    took = Spread(p10=0.002, p50=0.003, p90=0.004, samples=9)
    kind = Profiled(
        op="expert_up", tactic="up.x1", steps=3, launches=1, measured=5.0, predicted=6.0,
        moved_bytes=1e6, origin="model",
    )  # fmt: skip
    made = speculation.Speculation(
        batch=2, context=400, drafts=3, acceptance=0.75, kept=1.25, rounds=9, round=took, run=took,
        tokens_per_s=1234.5, predicted=0.0025, launches=77,
    )  # fmt: skip
    part = speculation.Part(phase="verify", batch=2, context=400, tokens=8, step=took,
                            predicted=0.0025, launches=55, profile=(kind,))  # fmt: skip
    report = Report(
        device={"name": "a GPU", "sms": 132}, loaded=1.0, speculations=[made], parts=[part]
    )
    monkeypatch.setattr(cli, "_kind", lambda _: "cuda")
    monkeypatch.setattr(engine, "run", lambda *_: report)
    monkeypatch.setattr(engine, "document", lambda *_: {})
    monkeypatch.setattr("lingc.runtime.load.open_engine", lambda *_args, **_more: None)

    done = CliRunner().invoke(
        lingc, ["bench", "x.ling", "--synthetic-weights", "7"], catch_exceptions=False
    )

    for words in ("75 %", "1.25", "1234.5", "3.000 ms", "77", "verify of 8 tokens", "expert_up"):
        assert words in done.output


def test_a_red_gate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = engine_checks.Check(name="decode, expert_up", detail="up.x1", problem="a differs")
    report = Report(device={"name": "a GPU", "sms": 132}, loaded=1.0, gate=[wrong])
    monkeypatch.setattr(cli, "_kind", lambda _: "cuda")
    monkeypatch.setattr(engine, "run", lambda *_: report)
    monkeypatch.setattr(engine, "document", lambda *_: {})
    monkeypatch.setattr("lingc.runtime.load.open_engine", lambda *_args, **_more: None)

    done = CliRunner().invoke(lingc, ["bench", "x.ling", "--synthetic-weights", "7"])

    assert isinstance(done.exception, GateError)
    assert "1 of 1 checks fail" in str(done.exception)
    assert "expert_up, up.x1: a differs" in str(done.exception.hint)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A benchmark of two parts; what is put into the list is raised between them."""
    faults: list[BaseException] = []

    def run(_opened: Any, _settings: Settings, _tell: Any, measured: Any) -> Report:
        report = Report(device={"name": "a GPU", "sms": 132}, loaded=1.0)
        measured(report)
        for fault in faults:
            raise fault
        report.loaded = 2.0
        measured(report)
        return report

    monkeypatch.setattr(cli, "_kind", lambda _: "cuda")
    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(engine, "document", lambda report, *_: {"loaded_s": report.loaded})
    monkeypatch.setattr("lingc.runtime.load.open_engine", lambda *_args, **_more: None)
    return faults


def test_a_record_has_its_name_once_it_is_whole(timed: list[Any], tmp_path: Path) -> None:
    assert not timed
    words = ["x.ling", "--synthetic-weights", "7", "-o", str(tmp_path / "record.json")]

    CliRunner().invoke(lingc, ["bench", *words], catch_exceptions=False)

    (only,) = tmp_path.iterdir()
    assert only.name == "record.json"
    assert json.loads(only.read_text()) == {"loaded_s": 2.0}


@pytest.mark.parametrize("fault", [GateError("no"), KeyboardInterrupt()], ids=["fails", "stops"])
def test_what_was_measured_before_an_end_is_kept_as_a_part(
    timed: list[Any], fault: BaseException, tmp_path: Path
) -> None:
    timed.append(fault)
    words = ["x.ling", "--synthetic-weights", "7", "-o", str(tmp_path / "record.json")]

    done = CliRunner().invoke(lingc, ["bench", *words])

    assert done.exit_code != 0
    (only,) = tmp_path.iterdir()
    assert only.name == "record.json.partial"
    assert json.loads(only.read_text()) == {"partial": True, "loaded_s": 1.0}
    assert f"what was measured before is in {only}" in " ".join(done.output.split())


def test_a_record_that_could_not_be_written_is_refused_before(
    timed: list[Any], tmp_path: Path
) -> None:
    timed.append(AssertionError("measured in vain"))
    words = ["x.ling", "--synthetic-weights", "7", "-o", str(tmp_path / "none" / "record.json")]

    done = CliRunner().invoke(lingc, ["bench", *words])

    assert isinstance(done.exception, ResourceError)
    assert "record.json" in str(done.exception)
