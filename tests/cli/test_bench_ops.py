"""`lingc bench-ops` without a GPU: what it compiles, and how it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lingc.cli import main
from lingc.errors import IncompatibleError
from lingc.op import OPS
from lingc.targets.cuda import binaries

OP = ("--op", "rms_norm")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is one."""

    def absent(_device: object, _index: int = 0) -> None:
        raise IncompatibleError("no CUDA device 0 can be used: no driver", hint="find one")

    monkeypatch.setattr("lingc.device.Device.__init__", absent)


def failure(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    code = main(["bench-ops", *map(str, words), "--progress", "none"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return code, captured.err


def test_help_says_how_to_compile_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-ops", "--help"]) == 0

    said = capsys.readouterr().out
    assert "lingc bench-ops --compile kernels/ && lingc bench-ops --binaries kernels/" in said


@pytest.mark.parametrize("tokens", ["", "0", "1,", "-1", "1.5", "one", "1 2"])
def test_sizes_that_are_none(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = failure(capsys, *OP, "--tokens", tokens)

    assert code == 2
    assert f"--tokens {tokens!r} is not a list of sizes" in said
    assert "hint: for example: 1,8,32" in said


@pytest.mark.usefixtures("no_driver")
def test_sizes_that_are_some_get_as_far_as_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, *OP, "--tokens", " 1, 8,8 ")[0] == 4


def test_an_unknown_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = failure(capsys, "--op", "rms_nrom", "--compile", tmp_path / "made")

    assert code == 2
    assert "no op is called 'rms_nrom'" in said
    assert "rms_norm_fp8" in said, "those that there are"
    assert not (tmp_path / "made").exists()


def test_an_unknown_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, *OP, "--target", "h201", "--compile", tmp_path)[0] == 2


def test_a_shape_that_no_op_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = failure(capsys, *OP, "--match", "no such shape", "--compile", tmp_path / "made")

    assert code == 2
    assert "nothing matches what was asked for" in said


def test_compiling_and_taking_what_was_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--compile", str(tmp_path), "--binaries", str(tmp_path))
    code, said = failure(capsys, *OP, *words)

    assert code == 2
    assert "--compile and --binaries contradict each other" in said


def test_binaries_of_a_directory_that_holds_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = failure(capsys, *OP, "--binaries", tmp_path)

    assert code == 3
    assert f"{str(tmp_path)!r} holds no compiled kernels" in said
    assert "hint: make it with `lingc bench-ops --compile DIR`" in said


@pytest.mark.usefixtures("no_driver")
def test_no_driver(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = failure(capsys, *OP, "--no-time")

    assert code == 4
    assert "lingc bench-ops: no CUDA device 0 can be used: no driver (LINGC-E0400)" in said


def test_compiles_an_op_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the same bytes again, under the same names."""
    made = []
    for name in ("one", "other"):
        into = tmp_path / name
        words = ["--no-cases", "--tokens", "8192", "--jobs", "1", "--progress", "none"]
        assert main(["bench-ops", *OP, *words, "--compile", str(into)]) == 0
        files = {path.name: path.read_bytes() for path in (into / "kernels").glob("*/*")}
        said = capsys.readouterr().out
        assert said == f"{len(files)} kernels for sm_90a are in {into}\n"
        made.append(files)

    assert made[0] == made[1]
    assert json.loads((tmp_path / "one" / "compilers.json").read_text()) == {
        "nvrtc": binaries.nvrtc_version(),
        "triton": binaries.triton_version(),
    }


@pytest.mark.usefixtures("no_driver")
def test_takes_binaries_of_the_directory_they_were_made_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as the device, which is asked for after the directory."""
    binaries.write_compilers(tmp_path)

    assert failure(capsys, *OP, "--binaries", tmp_path)[0] == 4


def test_a_shape_that_has_no_room_for_its_reference_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lingc.bench.ops.Device", lambda: SimpleNamespace(capability=(9, 0)))
    monkeypatch.setattr("lingc.bench.ops.device_facts", lambda _: {"name": "a GPU", "sms": 132})
    monkeypatch.setattr("lingc.bench.ops.compile_tactics", lambda *_: {})
    monkeypatch.setattr("lingc.bench.kernels.faults_of", lambda *_: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    made = OPS["rms_norm"].inputs
    on_cpu = replace(OPS["rms_norm"], inputs=lambda *a, dtype, device: made(
        *a, dtype=dtype, device="cpu" if device == "cuda" else device))  # fmt: skip
    monkeypatch.setitem(OPS, "rms_norm", on_cpu)
    words = [*OP, "--no-cases", "--tokens", "8192", "--no-time", "-o", str(tmp_path / "r.json")]

    assert main(["bench-ops", *words, "--progress", "none"]) == 0

    said = " ".join(capsys.readouterr().out.split())
    assert "gate: 0 runs, 0 wrong" in said
    assert "no room: rms_norm, hidden 4096, 8192 tokens" in said
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["crowded"] == [["rms_norm", "hidden 4096, 8192 tokens"]]
