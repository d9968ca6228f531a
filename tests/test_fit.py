"""The model of time is found again from what it predicts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lingc import targets
from lingc.bench import fit
from lingc.bench.fit import RULE, Measured, error, predicted, read_record
from lingc.cli import lingc
from lingc.errors import InputError
from lingc.op import type_of
from lingc.plugins.table import OPS
from lingc.targets.cuda import tactics
from lingc.targets.cuda.tactics import Reach

H200 = targets.get("h200-sxm")
TRUE = {
    "gemv.gemv.fp8": Reach(floor_s=1.5e-6, read=0.99, issue=1.2e12, mma=0.5),
    "gemm.gemm.fp8": Reach(floor_s=4e-6, read=0.8, issue=5e12, mma=0.85),
}


def a_launch(kind: str, moved_bytes: float, flops: float = 0.0) -> dict[str, object]:
    return {"kind": kind, "blocks": 132, "blocks_per_sm": 1, "moved_bytes": moved_bytes,
            "flops": flops, "rate": "fp8", "dependent": True}  # fmt: skip


def some(noise: float) -> list[Measured]:
    random = np.random.default_rng(0)
    made = []
    for moved in (1e6, 4e6, 17e6, 67e6, 300e6, 1e9):
        for flops in (1e9, 1e12):
            for kinds in (("gemv.gemv.fp8",), ("gemm.gemm.fp8",), tuple(TRUE)):
                launches = tuple(
                    a_launch(kind, moved, 0.0 if kind.startswith("gemv") else flops)
                    for kind in kinds
                )
                one = Measured(label="", target=H200, launches=launches, seconds=1.0)
                factor = 1 + noise * random.standard_normal()
                made.append(replace(one, seconds=predicted(one, TRUE) * factor))
    return made


def test_constants_are_found_again() -> None:
    found = fit.fit(some(0.0))

    assert error(some(0.0), found).median < 0.01
    assert found["gemv.gemv.fp8"].floor_s == pytest.approx(1.5e-6, rel=0.1)
    assert found["gemv.gemv.fp8"].read == pytest.approx(0.99, rel=0.02)
    assert found["gemm.gemm.fp8"].issue == pytest.approx(5e12, rel=0.05)


def test_noise_moves_them_little_and_is_told() -> None:
    found = fit.fit(some(0.05))

    assert found["gemv.gemv.fp8"].read == pytest.approx(0.99, rel=0.1)
    assert 0.01 < error(some(0.05), found).median < 0.06


def test_what_was_not_measured_keeps_the_rule() -> None:
    only = [one for one in some(0.0) if len(one.launches) == 1]
    found = fit.fit([one for one in only if one.launches[0]["kind"] == "gemv.gemv.fp8"])

    assert set(found) == {"gemv.gemv.fp8"}
    assert predicted(only[-1], found) == predicted(only[-1], {"gemm.gemm.fp8": RULE})


def test_a_record_is_read_without_what_was_wrong() -> None:
    launches = [a_launch("gemv.gemv.fp8", 1e6)]
    right = {"tactic": "a", "microseconds": [1.0, 2.0, 3.0], "launches": launches}
    wrong = {"tactic": "b", "microseconds": None, "launches": launches}
    entry = {"op": "fused_linear", "work": "decode", "candidates": [right, wrong]}

    device = {"name": "NVIDIA H200 (78 multiprocessors)", "sms": 78}

    (one,) = read_record({"kind": "tune", "device": device, "shapes": [entry]})

    assert one.seconds == 2e-6
    assert one.target == replace(H200, sms=78)
    assert one.label == "fused_linear, decode, a"


def test_a_record_of_ops_is_read_by_the_tactics_as_they_are() -> None:
    row = {"op": "fused_linear", "benchmark": "qkv + gate, FP8", "tokens": 1,
           "microseconds": [1.0, 16.0, 17.0]}  # fmt: skip
    op = OPS["fused_linear"]
    benchmark = next(one for one in op.benchmarks if one.name == row["benchmark"])
    types = [type_of(x) for x in op.inputs(*benchmark.case(1), dtype="bf16", device="meta")]
    tactic = op.tactics(H200, *types)[0]
    timings = [{**row, "tactic": tactic.name}, {**row, "tactic": "gone"}]
    device = {"name": "NVIDIA H200", "sms": 132}

    (one,) = read_record({"kind": "bench-ops", "device": device, "timings": timings})

    assert one.seconds == 16e-6
    assert one.launches == tuple(map(tactics.features, tactic.launches))
    assert 0.5 < predicted(one, {}) / one.seconds < 2


@pytest.mark.parametrize(
    ("name", "target"),
    [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H200", "h200-sxm"), ("NVIDIA H20", "h20"),
     ("NVIDIA H20-3e", "h20-3e")],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name: str, target: str) -> None:
    assert fit.target_of({"name": name, "sms": 11}) == replace(targets.get(target), sms=11)


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(InputError, match="no record"):
        read_record({"kind": "bench"})
    with pytest.raises(InputError, match="no target is a 'NVIDIA A100'"):
        read_record({"kind": "tune", "device": {"name": "NVIDIA A100", "sms": 1}, "shapes": []})


def test_the_shipped_model_is_within_its_bar_where_it_was_fitted() -> None:
    path = Path(tactics.__file__).parents[1] / "tactics" / "model.json"
    told = json.loads(path.read_text(encoding="utf-8"))

    assert told["error"]["median"] < 0.2
    assert told["device"]
    assert told["date"]


def a_profile(**changes: object) -> dict[str, object]:
    one = {"op": "fused_linear", "tactic": "a", "steps": 28, "measured": 5.0,
           "parts": [a_launch("gemv.gemv.fp8", 1e6)], **changes}  # fmt: skip
    other = {"op": "rms_norm", "tactic": "b", "steps": 1, "measured": -0.1,
             "parts": [a_launch("rms_norm.rms_norm", 1e3)] * 2}  # fmt: skip
    step = {"batch": 1, "context": 4096, "step": {"p50": 150e-6}, "profile": [one, other]}
    bare = {"batch": 2, "context": 4096, "step": {"p50": 150e-6}, "profile": []}
    device = {"name": "NVIDIA H200", "sms": 132}
    return {"kind": "bench-engine", "device": device, "decode": [step, bare]}


def test_a_profile_tells_of_its_ops_and_of_the_whole_step() -> None:
    record = a_profile()

    (op,) = read_record(record)
    assert op.seconds == pytest.approx(5e-6)
    assert len(op.launches) == 1
    (step,) = fit.read_steps(record)
    assert (step.seconds, len(step.launches)) == (150e-6, 28 + 2)
    assert step.launches[-1]["kind"] == "rms_norm.rms_norm"


def test_a_step_with_a_launch_that_nothing_is_known_of_is_no_measurement() -> None:
    record = a_profile(parts=[])

    assert fit.read_steps(record) == []
    assert read_record(record) == []
    assert fit.read_steps({"kind": "tune"}) == []


def test_a_model_is_written_told_of_and_keeps_what_was_not_measured(tmp_path: Path) -> None:
    launches = [a_launch("gemv.gemv.fp8", 1e6)]
    entry = {"op": "fused_linear", "work": "decode", "candidates": [
        {"tactic": "a", "microseconds": [4.0, 4.1, 4.2], "launches": launches}]}  # fmt: skip
    device = {"name": "NVIDIA H200", "sms": 132}
    record = {"kind": "tune", "device": device, "shapes": [entry], "date": "2026-11-22",
              "target": "h200-sxm", "precision": "fp8"}  # fmt: skip
    (tmp_path / "tune.json").write_text(json.dumps(record))
    profile = a_profile() | {"engine": {"target": "h200-sxm", "precision": "fp8"}}
    (tmp_path / "bench.json").write_text(json.dumps(profile))
    former = {"kinds": {"gemv.gemv.fp8": {"floor_us": 9.0}, "other.kernel": {"floor_us": 7.0}}}
    model = tmp_path / "model.json"
    model.write_text(json.dumps(former))
    words = ["--fit", tmp_path / "tune.json", "--test", tmp_path / "bench.json", "-o", model]

    done = CliRunner().invoke(lingc, ["tune", *map(str, words)], catch_exceptions=False)

    kinds = json.loads(model.read_text())["kinds"]
    assert kinds["gemv.gemv.fp8"]["measured"] == 1
    assert kinds["other.kernel"] == {"floor_us": 7.0}
    lines = [line.split()[:3] for line in done.output.splitlines()]
    assert ["fitted", "ops", "NVIDIA"] in lines
    assert ["tested", "steps", "NVIDIA"] in lines
