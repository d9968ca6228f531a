"""`lingc parity` from its arguments to its exit code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lingc.checkpoint import open_checkpoint, write_checkpoint
from lingc.cli import main
from lingc.errors import ResourceError
from tests.parity.packages import checkpoint

ROWS = [{"input_ids": [(11 * t + 5 * i) % 96 for t in range(12 + i)]} for i in range(3)]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with its experts in INT4."""
    path = tmp_path_factory.mktemp("twin") / "small-int4"
    return write_checkpoint(open_checkpoint(checkpoint()), path, layout="int4")


def parity(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["parity", *map(str, words), "--progress", "none"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_checkpoint_against_itself_is_within_the_strictest_budget(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = parity(
        capsys, checkpoint(), checkpoint(), "--data", "rows.jsonl", "--budget", "engine-vs-eager",
        "--mode", "prefill", "--mode", "draft",
    )  # fmt: skip

    assert code == 0
    assert "within budget 'engine-vs-eager'" in out
    assert "prefill" in out
    assert "draft" in out


def test_the_loss_of_a_precision_is_reported_and_not_judged(
    capsys: pytest.CaptureFixture[str], twin: Path
) -> None:
    code, out, err = parity(
        capsys, checkpoint(), twin, "--data", "rows.jsonl", "--json", "--report", "report.html"
    )

    value = json.loads(out)
    assert code == 0
    assert value["ok"] is True
    assert value["budget"]["name"] == "quantized"
    (mode,) = value["modes"]
    assert (mode["tokens"], mode["rows"]) == (39, 3)
    assert 1e-6 < mode["mean_kl"] < 1
    assert mode["flips"], "INT4 experts move some tokens"
    assert {flip["is_root"] for flip in mode["flips"]} == {True, False}
    assert "report: report.html" in err
    assert "small-int4" in Path("report.html").read_text(encoding="utf-8")


def test_over_budget_exits_with_5_after_the_whole_result(
    capsys: pytest.CaptureFixture[str], twin: Path
) -> None:
    words = (checkpoint(), twin, "--data", "rows.jsonl", "--budget", "engine-vs-eager")

    code, out, err = parity(capsys, *words)
    as_json, document, _ = parity(capsys, *words, "--json")

    assert (code, as_json) == (5, 5)
    assert "Tokens with other experts" in out
    assert "over budget 'engine-vs-eager'; prefill: mean_kl is" in err
    value: dict[str, Any] = json.loads(document)
    assert value["ok"] is False
    broken = [check["name"] for check in value["modes"][0]["checks"] if not check["ok"]]
    assert {"mean_kl", "expert_gap"} <= set(broken)


def test_what_was_found_is_told_where_its_report_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ResourceError("'report.html' cannot be written: No space left on device")

    monkeypatch.setattr("lingc.parity.page.write", fail)
    monkeypatch.setattr("lingc.staging.write_whole", fail)
    words = (checkpoint(), "--data", "rows.jsonl", "--report", "report.html")

    compared, said, err = parity(capsys, checkpoint(), *words)
    drifted, told, _ = parity(capsys, *words, "--drift", "64")

    assert (compared, drifted) == (7, 7)
    assert "top-1 agrees" in said
    assert "No space left" in err
    assert "remembers" in told


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ("none", "SMALL"),
            3,
            "'none' is neither a package nor a checkpoint: it is not a directory",
        ),
        (("x" * 300, "SMALL"), 3, "it is not a directory"),
        ((".", "SMALL"), 3, "it has neither manifest.json nor config.json"),
        (("interpret:SMALL", "SMALL"), 3, "it looks like a checkpoint"),
        (("SMALL", "SMALL", "--budget", "strict"), 3, "no budget is called 'strict'"),
        (("SMALL", "SMALL", "--data", "none.jsonl"), 3, "'none.jsonl' cannot be read"),
        (("SMALL", "SMALL", "--data", "bad.jsonl"), 3, "line 2: it is not JSON"),
        (("SMALL", "SMALL", "--mode", "sideways"), 2, "'sideways' is not one of"),
        (("SMALL", "SMALL", "--samples", "0"), 2, "0 is not in the range"),
        (
            ("SMALL", "SMALL", "--threads", "99999999999999"),
            2,
            "99999999999999 threads are more than 4 for each",
        ),
        (("SMALL", "SMALL", "--report", "."), 7, "'.' cannot be written: Is a directory"),
        (
            ("SMALL", "SMALL", "--data", "long.jsonl", "--max-tokens", "9000"),
            3,
            "line 1 of 'long.jsonl' has 4097 tokens, the model was made for 4096",
        ),
    ],
)
def test_what_cannot_be_compared_is_answered(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, message: str
) -> None:
    Path("bad.jsonl").write_text('{"input_ids": [1]}\n{\n', encoding="utf-8")
    Path("long.jsonl").write_text(json.dumps({"input_ids": [1] * 4097}), encoding="utf-8")

    given = [word.replace("SMALL", str(checkpoint())) for word in words]

    found, out, err = parity(capsys, *given)

    assert (found, out) == (code, "")
    assert message in err
