"""`lingc plan` answers whether a model fits, from a config alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingc.checkpoint import open_checkpoint, write_checkpoint
from lingc.cli import main

ROOT = Path(__file__).parents[2]
FULL = ROOT / "artifacts" / "checkpoints" / "ling-2.6-flash"
TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"


def plan(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    code = main(["plan", *map(str, words)])
    captured = capsys.readouterr()
    assert captured.out == ""
    return code, captured.err


def test_the_document_has_a_row_for_each_choice(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(
        capsys, FULL, "--precision", "fp8", "--target", "h20-3e",
        "--batch", "1,16", "--context", "4096", "--tp", "1,2,4",
    )  # fmt: skip

    assert [each["ranks"] for each in found["tp"]] == [1, 2, 4]
    assert [row["batch"] for row in found["tp"][0]["rows"]] == [1, 16]
    row = found["tp"][0]["rows"][0]
    assert row["verdict"] == "fits"
    assert row["headroom_bytes"] == found["memory_bytes"] - row["memory_bytes"]["total"]
    assert sum(row["step_bytes"][k] for k in ("weights", "state", "cache")) == pytest.approx(
        row["step_bytes"]["total"], abs=2
    )
    assert row["step_bytes"]["weights"] == pytest.approx(7.573e9, rel=1e-4)
    assert row["tokens_per_s_bound"] == pytest.approx(4.8e12 / row["step_bytes"]["total"], rel=1e-6)


def test_parts_add_up_to_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = plan(capsys, FULL, "--precision", "int4", "--target", "h20")["tp"]

    held = sum(part["held_bytes"] for part in found["parts"].values())
    read = sum(part["read_bytes"] for part in found["parts"].values())
    assert held == found["rows"][0]["memory_bytes"]["weights"]
    assert read == pytest.approx(found["rows"][0]["step_bytes"]["weights"], abs=10)


def test_the_tables_give_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(FULL), "--precision", "fp8", "--target", "h20", "--tp", "1,2"]
    assert main(words) == 0

    said = capsys.readouterr()
    assert "does not fit" in said.out
    assert "routed experts" in said.out
    assert "this version builds no split engine" in said.err


def test_a_cpu_says_what_is_mapped_and_what_is_widened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", str(TINY), "--widen", "step"]) == 0

    said = capsys.readouterr().out
    assert "widened to FP32 in every step" in said
    assert "stay in the file, mapped" in said
    assert "not known" in said


def test_memory_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, TINY, "--memory", "1GiB", "--batch", "1", "--context", "4096")

    assert found["memory_bytes"] == 2**30
    assert found["tp"][0]["rows"][0]["verdict"] == "fits"
    assert found["tp"][0]["largest_batch"]["4096"] >= 1


def test_without_mtp_there_are_no_drafts_and_less_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_mtp, without = plan(capsys, TINY, "--mtp"), plan(capsys, TINY, "--no-mtp")

    assert with_mtp["stored_weight_bytes"] > without["stored_weight_bytes"]
    assert "break_even_tokens_a_round" in with_mtp["tp"][0]["rows"][0]
    assert "break_even_tokens_a_round" not in without["tp"][0]["rows"][0]


def test_a_checkpoint_without_the_mtp_layer_is_planned_without(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_checkpoint(open_checkpoint(TINY), tmp_path / "checkpoint", keep_mtp=False)

    assert plan(capsys, tmp_path / "checkpoint")["mtp"] is False


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--batch", "0"], 2, "'0' is not a list of positive numbers"),
        (["--context", "4096,"], 2, "'4096,' is not a list of positive numbers"),
        (["--memory", "64"], 2, "'64' is not a size like 64GB"),
        (["--target", "h21"], 2, "no target is called 'h21'"),
        (["--precision", "fp9"], 2, "no precision is called 'fp9'"),
        (["--target", "h20", "--tp", "5"], 2, "tp 5 does not divide the 2 attention heads"),
        (["--tp", "2"], 2, "tp 2 is for several GPUs"),
    ],
)
def test_a_wrong_option_is_answered(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = failure(capsys, TINY, *words)

    assert found == code
    assert message in said


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found, said = failure(capsys, tmp_path)

    assert found == 3
    assert "config.json" in said


def test_planning_needs_the_base_install_alone() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "from lingc.cli import main\n"
        "sys.exit(main(['plan', sys.argv[1], '--precision', 'fp8', '--target', 'h20', '--json']))"
    )

    done = subprocess.run(
        (sys.executable, "-c", code, str(FULL)), capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tp"][0]["rows"][0]["verdict"] == "no"


def test_a_dgx_spark_holds_the_whole_model_and_is_told_what_its_engines_repeat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--precision", "int4-all", "--context", "4096,65536")
    found = plan(capsys, FULL, "--target", "spark", *words)
    rows = found["tp"][0]["rows"]
    note = "a TensorRT engine of each phase holds its own INT4 constants"

    assert {row["verdict"] for row in rows} == {"fits"}
    assert rows[0]["tokens_per_s_bound"] > 70
    assert min(row["headroom_bytes"] for row in rows) > 4e9
    for target, precision, told in (
        ("spark", "int4-all", True),
        ("spark", "bf16", False),
        ("spark", "int4", False),  # of experts alone, which are bound
        ("h20", "int4-all", False),
    ):
        assert main(["plan", str(FULL), "--target", target, "--precision", precision]) == 0
        captured = capsys.readouterr()
        assert (note in captured.out + captured.err) is told
