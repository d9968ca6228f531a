"""Real packages: an engine, its plan and its checkpoint say the same, and faults are named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lingc.cli import main
from lingc.parity.run import Settings, run
from lingc.parity.side import MODES
from lingc.runtime.onnx_backend import OnnxBackend
from tests.parity.packages import ROWS, checkpoint, engine

Outputs = dict[str, NDArray[Any]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"input_ids": row}) + "\n" for row in ROWS)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def settings(a: str, b: str, data: Path, **more: Any) -> Settings:
    return Settings(a=a, b=b, data=data, cache_dir=data.parent / "cache", **more)


def spoil(monkeypatch: pytest.MonkeyPatch, phase: str, change: Any) -> None:
    """Have engines change what they return from a phase."""
    sound = OnnxBackend.run

    def spoilt(self: OnnxBackend, asked: str, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        out = sound(self, asked, inputs)
        if asked == phase:
            change(inputs, out)
        return out

    monkeypatch.setattr(OnnxBackend, "run", spoilt)


def test_an_engine_says_what_eager_says_in_every_mode(data: Path) -> None:
    result = run(settings(str(engine()), str(checkpoint()), data, modes=MODES, batch=2))

    assert result.ok
    assert result.reference.name.startswith("eager checkpoint-1 on the engine's weights (int4)")
    assert result.other.name == "engine small.ling (onnx, int4, cpu)"
    assert result.budget.name == "engine-vs-eager"
    layers = {mode.summary.mode: mode.summary.expert_layers for mode in result.modes}
    assert layers == {mode: (1, 2, 3, 4) if mode == "draft" else (1, 2, 3) for mode in MODES}
    assert {m.summary.tokens for m in result.modes} == {
        sum(map(len, ROWS)),
        sum(map(len, ROWS)) - 3,
    }


def test_an_interpreted_plan_says_what_the_engine_says(data: Path) -> None:
    result = run(settings(f"interpret:{engine()}", str(engine()), data, modes=("verify",)))

    assert result.ok
    assert result.budget.name == "engine-vs-eager"
    assert result.reference.name == "interpreted plan of small.ling (int4)"
    assert result.modes[0].summary.mean_kl < 1e-9


def test_the_loss_of_the_precision_shows_on_the_checkpoints_own_weights(data: Path) -> None:
    result = run(settings(str(checkpoint()), str(engine()), data, weights="checkpoint"))

    assert result.ok
    assert result.budget.name == "quantized"
    assert result.modes[0].summary.mean_kl > 1e-6


def test_a_logit_that_one_program_gets_wrong_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bump(inputs: Mapping[str, NDArray[Any]], out: Outputs) -> None:
        out["logits"][inputs["positions"] == 25, 40] += 9

    spoil(monkeypatch, "decode", bump)

    found = run(settings(str(checkpoint()), str(engine()), data, modes=("prefill", "decode")))

    prefill, decode = found.modes
    assert prefill.ok
    assert not decode.ok
    wrong = {(token.line, token.position) for token in decode.worst if token.max_abs > 1}
    assert wrong == {(2, 25), (3, 25)}
    assert {token.other for token in decode.worst if token.max_abs > 1} == {"#40"}


def test_an_expert_that_one_layer_gets_wrong_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(inputs: Mapping[str, NDArray[Any]], out: Outputs) -> None:
        (name,) = (n for n in out if n.startswith("layers.2.router") and out[n].dtype == np.int32)
        at = np.flatnonzero(inputs["positions"] == 9)
        ids = out[name] = out[name].copy()
        for t in at.tolist():
            ids[t, 0] = next(e for e in range(16) if e not in ids[t])

    spoil(monkeypatch, "prefill", swap)

    found = run(settings(str(checkpoint()), str(engine()), data))

    (mode,) = found.modes
    assert {(f.row, f.position, f.layer) for f in mode.summary.flips} == {
        (row, 9, 2) for row in range(3)
    }
    assert [check.name for check in mode.checks if not check.ok] == ["expert_gap"]


def test_another_checkpoint_is_not_taken_for_the_engines(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("parity", str(checkpoint(2)), str(engine()), "--data", str(data))

    code = main([*words, "--progress", "none"])
    refused = capsys.readouterr()
    compared = main([*words, "--weights", "checkpoint", "--progress", "none"])

    assert code == 6
    assert refused.out == ""
    assert "has the weights of checkpoint" in refused.err
    assert compared == 0
