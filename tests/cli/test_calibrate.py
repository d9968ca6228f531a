"""calibrate, quantize, recipes and mix from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingc.calibrate.layer import Layer
from lingc.calibrate.page import heat_map
from lingc.checkpoint import (
    SyntheticCheckpoint,
    open_checkpoint,
    write_checkpoint,
)
from lingc.cli import main
from lingc.model.config import ModelConfig
from tests.calibrate.conftest import LING_TINY, SMALL, write_rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig.from_dict({**ModelConfig.from_file(LING_TINY).raw, **SMALL})
    path = tmp_path_factory.mktemp("cli") / "small"
    return write_checkpoint(SyntheticCheckpoint(config, 1), path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", count=12)


def _run(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_whole_way_from_a_checkpoint_to_a_calibrated_one(
    small: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert _run("calibrate", small, "--data", rows, "--recipe", "int4-fp8", "-o", tmp_path / "c",
                "--report", page, "--min-tokens-per-expert", 0, "--fallback-below", 0,
                "-q") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "Tokens of an expert" in said
    assert "matrices: error of outputs on the samples 0." in said

    assert _run("quantize", small, "--recipe", "int4-fp8", "--calibration", tmp_path / "c",
                "-o", tmp_path / "q", "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    hows = {one["how"] for one in told["tensors"]}

    assert hows == {"calibrated", "plain"}
    assert told["bytes"] < told["input_bytes"] / 2
    assert open_checkpoint(tmp_path / "q").kind("model.layers.1.mlp.experts.0.up_proj.weight") == (
        "int4_group"
    )
    text = page.read_text()
    assert "Calibration for int4-fp8" in text
    assert text.count("<svg") == 3
    assert "http" not in text.replace("http-equiv", "")


def test_coverage_below_the_floor_is_exit_code_5_and_loses_nothing(
    small: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _run("calibrate", small, "--data", rows, "--recipe", "int4", "-o", tmp_path / "c",
                "--min-tokens-per-expert", 100_000, "-q")  # fmt: skip

    said = capsys.readouterr().err
    assert code == 5
    assert "24 experts saw fewer than 100000 tokens: (LINGC-E0500)\n  - layer" in said
    assert "and 16 more" in said
    assert (tmp_path / "c" / "calibration.json").exists()


def test_json_is_the_whole_document(
    small: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("calibrate", small, "--data", f"{rows}:2", "--recipe", "fp8-static", "-o",
                tmp_path / "c", "--observer", "mse", "--samples", 5, "--json",
                "--min-tokens-per-expert", 0) == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)

    assert told["data"]["samples"] == 5
    assert told["data"]["files"][0]["weight"] == 2.0
    assert told["settings"]["observer"] == "mse"
    assert told["input_bounds"].keys() == {m for o in told["observed"] for m in o["modules"]}
    assert not told["resumed"]


def test_an_interrupted_run_says_how_to_go_on(
    small: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ("calibrate", small, "--data", rows, "--recipe", "fp8", "-o", tmp_path / "c",
             "--min-tokens-per-expert", 0, "--samples", 50)  # fmt: skip
    run = Layer.run

    def interrupted(layer: Layer, *given: Any) -> None:
        if layer._number == 1:
            raise KeyboardInterrupt
        run(layer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "run", interrupted)
        assert _run(*words, "-q") == 75
    assert "to go on: lingc calibrate" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

    assert _run(*words, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["resumed"]
    assert "the files give 12 of the 50 rows of --samples" in said.err


def test_a_silent_expert_is_crossed_on_the_page() -> None:
    drawn = heat_map([10, 0, 3, 0])

    assert drawn.count('class="silent"') == 2
    assert drawn.count('class="cell"') == 2
    assert "expert 1: 0 tokens" in drawn


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b'{"input_ids": [99]}\n', "line 1: token 99 at position 0 is out of range"),
        (b'{"input_ids": [1]}\n\xff\xfe\n', "line 2: it is not UTF-8"),
        (b'{"text": "hello"}\n', "line 1: it has 'text', but there is no tokenizer"),
        (b"[" * (17 << 20), "line 1: it is longer than 16 MiB"),
        (
            json.dumps({"input_ids": [1] * 8193}).encode(),
            "line 1 of 'bad.jsonl' has 8193 tokens, the model was made for 8192",
        ),
    ],
)
def test_bad_data_is_told_and_leaves_nothing(
    content: bytes, said: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_bytes(content)

    assert _run("calibrate", small, "--data", data, "--recipe", "int4", "-o", tmp_path / "c",
                "--max-tokens", 9000) == 3  # fmt: skip

    answer = capsys.readouterr().err
    assert said in answer
    assert "Traceback" not in answer
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["calibrate", "SMALL", "--data", "gone.jsonl", "--recipe", "int4"], 3, "cannot be read"),
        (["calibrate", "SMALL", "--data", "ROWS:0", "--recipe", "int4"], 2, "not a positive"),
        (["calibrate", "SMALL", "--data", "ROWS", "--recipe", "int5"], 2, "did you mean 'int4'?"),
        (
            ["calibrate", "SMALL", "--data", "ROWS", "--recipe", "int4", "--percentile", "nan"],
            2,
            "nan is no percentile",
        ),
        (["calibrate", "gone", "--data", "ROWS", "--recipe", "int4"], 3, "no directory 'gone'"),
        (
            ["calibrate", "SMALL", "--data", "ROWS", "--recipe", "int4", "--report", "."],
            7,
            "'.' cannot be written: Is a directory",
        ),
        (
            ["quantize", "SMALL", "--recipe", "RECIPE"],
            3,
            "'model.layers.*.mixer' matches no module",
        ),
        (["quantize", "SMALL", "--recipe", "fp8", "--calibration", "gone"], 3, "is no calibration"),
        (["recipes", "RECIPE", "--checkpoint", "SMALL"], 3, "matches no module; the nearest is"),
        (["mix", "SMALL", "--data", "ROWS", "--bytes-per-token", "1kB"], 2, "raise --bytes"),
        (["mix", "SMALL", "--data", "ROWS", "--bytes-per-token", "much"], 2, "is no size"),
        (["mix", "SMALL", "--data", "ROWS", "--bytes-per-token", "1000"], 2, "raise --bytes"),
        (
            ["mix", "SMALL", "--data", "ROWS", "--bytes-per-token", "2TB", "--report", "OUT"],
            2,
            "is given for two outputs",
        ),
        (
            ["calibrate", "SMALL", "--data", "ROWS", "--recipe", "int4", "--report", "OUT"],
            2,
            "is given for two outputs",
        ),
        (
            ["calibrate", "SMALL", "--data", "englsh:2", "--recipe", "int4"],
            3,
            "there is no file 'englsh' (LINGC-E0304)\nhint: did you mean 'english'?",
        ),
        (["mix", "gone", "--data", "ROWS", "--bytes-per-token", "2TB"], 3, "no directory 'gone'"),
    ],
)
def test_what_cannot_be_is_answered_in_words(
    words: list[str], code: int, said: str, small: Path, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rule = {"modules": ["model.layers.*.mixer"], "format": "fp8_block"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"name": "other", "rules": [rule]}))
    names = {"SMALL": small, "ROWS": rows, "RECIPE": recipe, "ROWS:0": f"{rows}:0"}
    names["OUT"] = tmp_path / "out"
    given: list[Any] = [names.get(word, word) for word in words]
    if words[0] != "recipes":
        given += ["-o", tmp_path / "out"]

    assert _run(*given) == code

    answer = capsys.readouterr().err
    assert said in answer
    assert "Traceback" not in answer
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("recipe", "options", "refused"),
    [
        ("fp8", "--int4 search", "recipe 'fp8', which has no INT4 matrix"),
        ("int4", "--fp8 gptq", "recipe 'int4', which has no FP8 matrix"),
        (
            "int4",
            "--int4 search --loss matrix",
            "recipe 'int4' where gptq has no use for gradients",
        ),
        ("fp8", "--fp8 nearest --loss model", "recipe 'fp8' where gptq has no use for gradients"),
        ("fp8", "--observer mse", "recipe 'fp8', which has no static scales of inputs"),
        ("int4", "--percentile 99.0", "recipe 'int4', which has no static scales of inputs"),
        ("fp8-static", "--percentile 99.0", "--observer absmax"),
        (
            "int4",
            "--int4 nearest --fallback-below 9",
            "recipe 'int4' where no expert is rounded by data",
        ),
    ],
)
def test_an_option_that_decides_nothing_is_refused(
    recipe: str, options: str, refused: str, small: Path, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = options.split()
    given = ("calibrate", small, "--data", rows, "--recipe", recipe, *words, "-o", tmp_path / "c")

    assert _run(*given) == 2

    idle = " ".join(words[-2:])
    assert f"{idle} says nothing to {refused}; leave it out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    full = LING_TINY.parent / "ling-2.6-flash"
    assert _run("recipes", "--checkpoint", full) == 0
    assert "int4-fp8" in (said := capsys.readouterr().out)
    assert "58.8 GB" in said

    assert _run("recipes", "fp8", "--checkpoint", LING_TINY) == 0
    assert "model.layers.*.mlp.experts.*.gate_proj" in capsys.readouterr().out

    assert _run("recipes", "int4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["group"] == 32


def test_mix_writes_a_recipe_that_quantize_takes(
    small: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, page = tmp_path / "mixed.json", tmp_path / "mixed.html"
    assert _run("mix", small, "--data", rows, "--bytes-per-token", "0.12MB", "--samples", 2,
                "-o", recipe, "--report", page, "--json") == 0  # fmt: skip
    told = json.loads(capsys.readouterr().out)

    assert _run("quantize", small, "--recipe", recipe, "-o", tmp_path / "q", "-q") == 0
    assert told["chosen"]["bytes"] <= told["budget"] == 120_000
    assert json.loads(recipe.read_text()) == told["recipe"]
    assert "<polyline" in page.read_text()
