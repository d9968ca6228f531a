"""What cannot be meant, or cannot be built here, is answered before anything is written."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.robustness.conftest import Lingc, Refuses

EXPERTS = "model.layers.*.mlp.experts.*"

REQUESTS: dict[str, tuple[int, list[str], str]] = {
    "an unknown precision": (
        2,
        ["--precision", "fp88"],
        r"no precision is called 'fp88'.*did you mean 'fp8'\? there are bf16, fp8, ",
    ),
    "an unknown target": (
        2,
        ["--target", "h2o"],
        r"no target is called 'h2o'.*did you mean 'h20'\? known: cpu, ",
    ),
    "an unknown engine": (2, ["--engine", "trt"], r"'trt' is not one of 'auto', 'onnx', 'cuda'"),
    "an engine that the target has not": (
        2,
        ["--engine", "cuda"],
        r"there is no 'cuda' engine for target 'cpu'.*it has: onnx",
    ),
    "an engine that only a host with the GPU can build": (
        4,
        ["--target", "h20", "--engine", "tensorrt"],
        r"'h20' is built by standard TensorRT.*'tensorrt' is not installed.*with --engine cuda, an",
    ),
    "widened weights on a GPU": (
        2,
        ["--target", "h20", "--widen", "load"],
        r"--widen load is for CPU engines",
    ),
    "an unknown pass": (
        2,
        ["--waive", "fuse_rmsnorm"],
        r"no pass is called 'fuse_rmsnorm'.*did you mean 'fuse_rms_norm'\? the passes are",
    ),
    "unknown passes in one word": (
        2,
        ["--waive", "fuse_router,fuse_x,y"],
        r"no pass is called 'fuse_x', 'y'",
    ),
    "a page of one token": (2, ["--page-size", "1"], r"1 is not in the range 2<=x<=1024"),
    "too many drafts": (2, ["--max-draft", "99"], r"99 is not in the range 0<=x<=15"),
    "weights nowhere": (2, ["--weights", "none"], r"'none' is not one of 'embed', 'external'"),
    "a misspelt option": (2, ["--precison", "fp8"], r"no such option '--precison'.*'--precision'"),
    "a recipe that is not there": (
        3,
        ["--precision", "nowhere/r.json"],
        r"recipe 'nowhere/r\.json' cannot be read: No such file.*or one of bf16, ",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_cannot_be_met_is_refused(
    name: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    code, words, message = REQUESTS[name]

    said = refuses(code, "build", small, "-o", tmp_path / "x.ling", *words)

    assert re.search(message, said, re.DOTALL)


@pytest.mark.parametrize("target", ["spark", "rtx-89", "rtx-120"])
def test_a_model_that_no_plugin_takes_is_refused_by_op_and_sizes(
    target: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    if find_spec("tensorrt_rtx") is None:
        said = refuses(4, "build", small, "--target", target, "-o", tmp_path / "x.ling")
        assert re.search(
            r"package 'tensorrt_rtx' is not installed.*it needs no GPU", said, re.DOTALL
        )
        return
    said = refuses(3, "build", small, "--target", target, "-o", tmp_path / "x.ling")

    assert re.search(r"prefill with T \d+, .* has no kernel for ", said)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_kernel_takes_is_refused_by_op_and_sizes(
    small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    said = refuses(3, "build", small, "--target", "h20", "-o", tmp_path / "x.ling")

    assert re.search(
        r"prefill with T 16, .* has no kernel for .*hint: another --page-size", said, re.DOTALL
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_is_answered_with_the_nearest(lingc: "Lingc") -> None:
    answer = lingc("bulid", "x")

    assert answer.code == 2
    assert re.search(r"no such command 'bulid'.*'build'", answer.err)


# ---------------------------------------------------------------------------------------- recipes


def recipe(**changes: object) -> str:
    rules = [{"modules": [EXPERTS], "format": "int4_group", "group": 32}]
    return json.dumps({"name": "mine", "rules": rules, **changes})


def rule(**changes: Any) -> str:
    return recipe(rules=[{"modules": [EXPERTS], "format": "fp8_block", **changes}])


RECIPES: dict[str, tuple[str, str]] = {
    "not JSON": ("{", r"is not JSON: Expecting property name"),
    "too deep": ("[" * 100_000, r"is not JSON: maximum recursion"),
    "a list": ("[]", r"it is a list, not an object"),
    "an unknown key": (recipe(weights=1), r"the key 'weights' is unknown; there are activations,"),
    "a name that is a path": (recipe(name="../x"), r"name is '\.\./x', not a text of letters"),
    "a name of two lines": (recipe(name="x\ny"), r"name is 'x\\ny', not a text of letters"),
    "no rules": (recipe(rules=None), r"rules is None, not a list"),
    "a rule that is a word": (recipe(rules=["x"]), r"rule 1 is 'x', not an object"),
    "an unknown format": (rule(format="int3"), r"rule 1: format is 'int3', not one of plain, fp8_"),
    "a format that is a list": (rule(format=[]), r"rule 1: format is \[\], not one of plain"),
    "an odd group": (rule(format="int4_group", group=12), r"group is 12, not a positive multiple"),
    "a vast group": (rule(format="int4_group", group=8 * 10**30), r"group is 80+, more than"),
    "a group where none is": (rule(group=32), r"group is 32, but fp8_block has no groups"),
    "unknown activations": (recipe(activations="int8"), r"activations is 'int8', not one of plain"),
    "several faults at once": (
        json.dumps({"name": "", "rules": [{"modules": [], "format": "x"}]}),
        r"has 3 problem.*name is ''.*modules is \[\].*format is 'x'",
    ),
    "a pattern that matches nothing": (
        rule(modules=["model.layers.*.mlp.expert.*"]),
        r"'model\.layers\.\*\.mlp\.expert\.\*' matches no module; the nearest is 'model\.layers\.",
    ),
    "a rule behind another": (
        recipe(rules=[{"modules": ["*"], "format": "plain"}] * 2),
        r"'\*' matches only modules that an earlier rule takes",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_cannot_be_meant_is_refused(
    name: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    text, message = RECIPES[name]
    path = tmp_path / "mine.json"
    path.write_text(text)

    said = refuses(3, "build", small, "--precision", path, "-o", tmp_path / "x.ling")

    assert re.search(message, said, re.DOTALL)


@pytest.mark.usefixtures("captured")
def test_a_recipe_that_no_kernel_serves_is_refused_with_the_reason_and_the_line(
    small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(rule(modules=["model.layers.*.mlp.gate"]))
    words = ("build", small, "--precision", path, "-o", tmp_path / "x.ling", "-q")

    missed = refuses(8, *words)
    waived = refuses(8, *words, "--waive", "fuse_router,merge_projections,fuse_silu_mul")

    assert re.search(r"fuse_router: expected 4, found 0; refused at .*moe\.py:\d+", missed)
    assert re.search(r"the recipe 'mine' stores model\.layers\.0\.mlp\.gate as fp8_block", missed)
    assert re.search(r"(?s)nothing lowers what these leave.*fuse_router: .*is left over", waived)


# ---------------------------------------------------------------------------------------- outputs


def test_an_output_that_exists_is_left_alone(
    small: Path, package: Path, refuses: "Refuses"
) -> None:
    said = refuses(2, "build", small, "-o", package)

    assert re.search(r"package\.ling' exists already.*\nhint: .*--overwrite", said)


@pytest.mark.usefixtures("captured")
def test_an_output_that_exists_is_replaced_when_that_is_said(
    small: Path, package: Path, lingc: "Lingc"
) -> None:
    (package / "plan.json").write_text("{}")

    assert lingc("build", small, "-o", package, "--overwrite", "-q").code == 0
    assert lingc("verify", package, "-q").code == 0


OUTPUTS: dict[str, tuple[int, str, str]] = {
    "a file": (2, "file", r"is not a directory, so it is not replaced"),
    "a full directory": (2, "full", r"holds other things than what would replace it"),
    "below a file": (7, "file/x.ling", r"cannot be written: .*a part of that path is a file"),
    "no name": (2, "full/..", r"names no new directory"),
    "a name too long": (7, "x" * 300, r"cannot be written: File name too long.*shorter name"),
    "a link": (2, "link", r"is not a directory, so it is not replaced"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_is_refused(
    name: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    code, place, message = OUTPUTS[name]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")

    said = refuses(code, "build", small, "-o", f"{tmp_path}/{place}", "--overwrite", "-q")

    assert re.search(message, said, re.DOTALL)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("place", ["file/ir", "file"])
def test_a_dump_that_cannot_be_written_stops_the_build(
    place: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    code = 2 if place == "file" else 7

    said = refuses(
        code, "build", small, "-o", tmp_path / "x.ling", "--dump-ir", tmp_path / place, "-q"
    )

    assert re.search(r"is a file", said)


def test_passes_of_nothing_are_refused(refuses: "Refuses", tmp_path: Path) -> None:
    said = refuses(3, "passes", tmp_path / "nowhere")

    assert re.search(r"nowhere' cannot be read: No such file", said)
