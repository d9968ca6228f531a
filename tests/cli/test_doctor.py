"""`lingc doctor` and `lingc targets` tell what is, and exit with 0."""

import json
import re
from dataclasses import replace
from importlib import metadata

import pytest

import lingc
from lingc import targets
from lingc.cli import doctor, main
from lingc.cli.targets import is_buildable
from lingc.engine import machine
from lingc.engine.machine import Gpu


def test_doctor_tells_what_this_machine_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["lingc"]["version"] == lingc.__version__
    assert found["libraries"]["numpy"] == metadata.version("numpy")
    assert found["cpu"]["cores"] >= 1
    assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0
    assert found["cache"]["free_bytes"] > 0
    assert found["targets"].keys() == targets.ALL.keys()


def test_doctor_says_the_same_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    said = capsys.readouterr().out
    assert lingc.__version__ in said
    assert all(name in said for name in targets.ALL)


def test_doctor_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = targets.get("cpu")
    monkeypatch.setattr(doctor, "is_buildable", lambda _kind: True)

    assert doctor._no_build(cpu, {"build": [], "onnx": []}) is None
    assert doctor._no_build(cpu, {"build": [], "onnx": ["onnx"]}) == "pip install 'lingc[onnx]'"
    assert doctor._no_build(cpu, {}) == "pip install 'lingc[build,onnx]'"


H200 = Gpu(name="NVIDIA H200", capability="9.0", driver="13.0", memory_bytes=141 << 30)


@pytest.mark.parametrize(
    ("target", "gpu", "told"),
    [
        ("cpu", "no GPU was found", None),
        ("h20", H200, None),
        ("h20", "no GPU was found", "it needs a GPU of compute capability 9.0: no GPU was found"),
        ("spark", H200, "it needs a GPU of compute capability 12.1: NVIDIA H200 has 9.0"),
        ("spark", replace(H200, capability="12.1"), None),
    ],
)
def test_doctor_says_what_is_in_the_way_of_running(
    target: str, gpu: Gpu | str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_first_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "_version", lambda _package: "1.0")

    assert doctor._no_run(targets.get(target)) == told


def test_doctor_names_what_would_run_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _package: None)

    assert [doctor._no_run(targets.get(name)) for name in ("cpu", "h20", "spark")] == [
        "pip install onnxruntime",
        "pip install cuda-bindings",
        "pip install cuda-bindings tensorrt-rtx-cu13",
    ]


def test_a_target_says_what_is_built_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_buildable("tensorrt")

    assert main(["targets", "spark"]) == 0

    said = capsys.readouterr().out
    assert re.search(r"built by this version +tensorrt\b", said)
    assert "sm_121a" in said


def test_targets_are_listed_whole_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "--json"]) == 0

    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed.keys() == targets.ALL.keys()
    assert listed["h20"]["sms"] == 78
    assert listed["h20"]["compute_capability"] == [9, 0]
    assert listed["cpu"]["hbm_bytes_per_s"] is None


def test_one_target_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "h200-sxm"]) == 0

    said = capsys.readouterr().out
    assert "4.80 TB/s" in said
    assert "cuda, tensorrt (auto: cuda)" in said
