"""The bench: right first, then fast; no test here says how fast."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc.bench import run as bench_run
from lingc.bench.contenders import Eager, Engine
from lingc.bench.record import Settings, document, measure
from lingc.bench.run import run
from lingc.bench.starting import start_eager
from lingc.checkpoint import SyntheticCheckpoint
from lingc.cli import main
from lingc.errors import StageError, UsageError
from lingc.model.loading import from_source
from lingc.parity.budget import Budget
from lingc.runtime import Limits
from tests.parity.packages import checkpoint, engine
from tests.programs import config
from tests.runtime.toy import ToyBackend, expected_logits


def settings(tmp_path: Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "engine": engine(), "checkpoint": checkpoint(), "cache_dir": tmp_path, "batches": (1, 2),
        "context": 6, "prefill": 12, "tokens": 4, "threads": 1, "starts": 1,
    }  # fmt: skip
    return Settings(**{**given, **changes})


# ----------------------------------------------------------------------------------------- sides


def test_an_engine_is_fed_as_the_definition_has_it() -> None:
    side = Engine(ToyBackend(Limits.from_tokens(slots=3, tokens_per_sequence=20, page_size=4)))
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]

    after = side.prefill(rows[0])
    side.begin(rows)
    steps = [side.step([11, 12]), side.step([13, 14])]

    np.testing.assert_array_equal(after, expected_logits(rows[0]))
    for index, row in enumerate(rows):
        fed = [*row, 11 + index, 13 + index]
        np.testing.assert_array_equal(steps[0][index], expected_logits(fed[:-1]))
        np.testing.assert_array_equal(steps[1][index], expected_logits(fed))


def test_eager_steps_from_its_own_cache() -> None:
    side = Eager(from_source(SyntheticCheckpoint(config("tiny"), 1)))
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]

    side.begin(rows)
    side.step([11, 12])
    stepped = side.step([13, 14])

    for index, row in enumerate(rows):
        whole = side.prefill([*row, 11 + index, 13 + index])
        np.testing.assert_allclose(stepped[index], whole, atol=1e-4)


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("unit", "ratio"), [("tokens/s", 4.0), ("s", 0.25), ("B", 0.25)], ids=["rate", "time", "size"]
)
def test_a_ratio_says_how_many_times_better_the_engine_is(unit: str, ratio: float) -> None:
    found = measure("one", "", unit, [30, 40, 50], [9, 10, 11])

    assert found.ratio == ratio
    assert (found.engine.p50, found.engine.samples) == (40, 3)
    assert found.baseline.p10 < found.baseline.p50 < found.baseline.p90


def test_nothing_is_no_ratio() -> None:
    assert measure("memory", "", "B", [0], [5]).ratio is None


# ------------------------------------------------------------------------------------------ runs


def test_a_run_measures_everything_on_both_sides_and_records_it(tmp_path: Path) -> None:
    told: list[str] = []

    record = run(settings(tmp_path, drafts=2), told.append)

    value = json.loads(json.dumps(document(record, {"numpy": "2"}), allow_nan=False))
    assert record.is_right
    assert [row["mode"] for row in value["gate"]["modes"]] == [
        "prefill", "decode", "verify", "draft",
    ]  # fmt: skip
    names = [one["name"] for one in value["measures"]]
    assert names == [
        "start", "memory", "mapped files", "prefill", "first token", "decode", "decode",
        "speculative",
    ]  # fmt: skip
    for one in value["measures"]:
        assert one["ratio"] > 0
        for side in ("engine", "baseline"):
            assert 0 < one[side]["p10"] <= one[side]["p50"] <= one[side]["p90"]
    assert [one["engine"]["samples"] for one in value["measures"]][5:7] == [4, 4]
    assert len(value["acceptance"]) == 2
    assert len(value["engine"]["bundle_id"]) == 64
    assert value["engine"]["checkpoint"] == value["baseline"]["checkpoint"]
    assert value["machine"]["cpu"]
    assert value["machine"]["other_cores"] >= 0
    assert value["machine"]["threads"] == 1
    assert str(engine().parent) not in json.dumps(value)
    assert told[0] == "check that it is right"


def test_two_engines_are_compared_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingc.bench.run._Timing._starts", lambda _self: iter(()))

    record = run(settings(tmp_path, against=engine(), checkpoint=None, batches=(1,)))

    assert record.is_right
    assert {row.reference for row in record.gate} == {"interpreted plan of small.ling (int4)"}
    assert [one.name for one in record.measures] == ["prefill", "first token", "decode"]


def test_an_engine_that_is_wrong_has_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = Budget(name="nothing passes", max_abs=0.0)
    monkeypatch.setattr(bench_run, "load_budget", lambda _name: strict)
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path))
    record = tmp_path / "record.json"

    words = ("--json", "-q", "--prefill", "12", "--context", "6", "-o", str(record))
    code = main(["bench", str(engine()), "--checkpoint", str(checkpoint()), *words])

    said = capsys.readouterr()
    value: Mapping[str, Any] = json.loads(said.out)
    assert code == 5
    assert value["measures"] == []
    assert value["gate"]["ok"] is False
    assert "so there are no numbers: prefill: max_abs is" in said.err
    assert not record.exists()


def test_a_side_that_does_not_start_is_named() -> None:
    with pytest.raises(StageError, match=r"'none' does not start .* there is no directory 'none'"):
        start_eager(Path("none"), threads=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": None}, "there is nothing to compare with"),
        ({"tokens": 0}, "tokens is 0, at least 1 is needed"),
        ({"batches": ()}, "batch is 0, at least 1 is needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = Settings(**{
        "engine": Path("none"), "cache_dir": tmp_path, "checkpoint": Path("none"), **changes
    })  # fmt: skip

    with pytest.raises(UsageError, match=message):
        run(given)


@pytest.mark.parametrize("text", ["0", "1,x", "", "-1"])
def test_batch_sizes_that_are_none_are_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "none", "--checkpoint", "none", f"--batch={text}"]) == 2
    assert "is not a list of sizes" in capsys.readouterr().err


def test_a_checkpoint_is_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(checkpoint()), "--checkpoint", str(checkpoint())]

    assert main(words) == 2
    assert "is not an engine" in capsys.readouterr().err
