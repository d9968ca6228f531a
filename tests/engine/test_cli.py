"""`lingc verify` and `lingc inspect` say what they found, and exit with what it amounts to."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingc.checkpoint import SyntheticCheckpoint
from lingc.checkpoint.quantizer import quantize_checkpoint
from lingc.cli import main
from lingc.engine import Contents, write_package
from lingc.engine.machine import Machine
from lingc.quantize.recipes import load_recipe
from lingc.runtime.vectors import VectorResult
from tests import programs

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Say:
    """Run a command on a machine that has what the package needs."""
    monkeypatch.setattr("lingc.engine.examine.this_machine", lambda: machine)
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))

    def run(*words: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, words), "--progress", "none"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_verify_shows_every_check_and_says_yes(package: Path, say: Say) -> None:
    code, out, err = say("verify", package)

    assert (code, err) == (0, "")
    assert "every byte is right, and it fits here" in out
    for check in ("manifest", "bundle-id", "collision", "digest", "agreement", "library"):
        assert check in out


def test_verify_names_what_is_wrong_and_exits_with_6(package: Path, say: Say) -> None:
    (package / "plan.json").write_bytes(b"{}")
    (package / "stray").write_bytes(b"")

    code, out, err = say("verify", package)

    assert code == 6
    assert "'stray'" in out
    assert "not run, as plan.json is not what was written" in out
    assert "3 of 21 checks failed: extra, size, digest (LINGC-E0600)" in err


def test_verify_as_json_is_one_document(package: Path, say: Say) -> None:
    (package / "stray").write_bytes(b"")

    code, out, _ = say("verify", package, "--json")

    document = json.loads(out)
    assert code == document["exit_code"] == 6
    assert [c for c in document["checks"] if c["verdict"] == "failed"] == [
        {
            "id": "extra",
            "subject": "'stray'",
            "verdict": "failed",
            "expected": "nothing",
            "found": "a file",
            "fix": "remove it, if it is yours; a package holds what its manifest lists",
        }
    ]


def test_verify_exits_with_4_on_another_machine(
    package: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = Machine(os="linux", arch="x86_64", version_of=lambda _: None)
    monkeypatch.setattr("lingc.engine.examine.this_machine", lambda: bare)

    code, _, err = say("verify", package)
    assert code == 4
    assert "hint: pip install 'lingc[onnx]'" in err

    assert say("verify", package, "--level", "integrity")[0] == 0


def test_verify_of_what_is_no_package_exits_with_3(tmp_path: Path, say: Say) -> None:
    code, _, err = say("verify", tmp_path / "none")

    assert code == 3
    assert "is not a package: it does not exist" in err


def result(*problems: str) -> VectorResult:
    return VectorResult(
        case="prompt-5", logit_error=1e-5, tolerance=1e-3, compared=8, problems=problems
    )


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        ([result()], 0, ""),
        ([result(), result("token 3 is 5, it must be 7")], 5, "token 3 is 5, it must be 7"),
        ([], 10, "holds no test vectors to run"),
    ],
)
def test_verify_can_run_the_vectors(
    package: Path,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    results: list[VectorResult],
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr("lingc.runtime.load.run_vectors", lambda _: results)

    found, out, err = say("verify", package, "--run", "--json")

    assert found == code
    assert said in err
    assert [v["is_right"] for v in json.loads(out)["vectors"]] == [not r.problems for r in results]


def test_a_broken_package_is_not_run(
    package: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingc.runtime.load.run_vectors", lambda _: pytest.fail("it was run"))
    (package / "stray").write_bytes(b"")

    assert say("verify", package, "--run")[0] == 6


def test_inspect_tells_a_package_from_its_manifest_alone(package: Path, say: Say) -> None:
    for path in package.rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            path.write_bytes(b"unread")

    code, out, _ = say("inspect", package)

    assert code == 0
    for text in ("fp8_block", "linear_state.{l}", "lingc.linear", "plan.json", "256 B", "a" * 64):
        assert text in out


def test_inspect_why_tells_request_and_passes(package: Path, say: Say) -> None:
    code, out, _ = say("inspect", package, "--why")

    assert code == 0
    for text in ("widen.policy", "2.13.0", "fuse_x"):
        assert text in out


def test_inspect_as_json_holds_the_manifest(package: Path, say: Say) -> None:
    document = json.loads(say("inspect", package, "--json")[1])

    assert document["kind"] == "package"
    assert document["manifest"] == json.loads((package / "manifest.json").read_bytes())


def test_inspect_plan_shows_the_steps(package: Path, say: Say) -> None:
    code, out, _ = say("inspect", package, "--plan")

    assert code == 0
    assert "  y f32[T, 16] = lingc.linear(x, layers.0.mlp.weight)\n" in out


def test_inspect_plan_refuses_a_changed_plan(package: Path, say: Say) -> None:
    data = (package / "plan.json").read_bytes()
    (package / "plan.json").write_bytes(data.replace(b"fp8", b"fp9"))

    code, _, err = say("inspect", package, "--plan")

    assert code == 6
    assert "was changed" in err


def test_inspect_diff_names_fields_and_files(
    package: Path, contents: Contents, tmp_path: Path, say: Say
) -> None:
    other = tmp_path / "other.ling"
    changed = {"config.json": b"{}", "tokenizer.json": b"{}\n"}
    write_package(other, replace(contents, model_files=changed, producer={"torch": "2.14.0"}))

    document = json.loads(say("inspect", package, "--diff", other, "--json")[1])

    fields = {d["field"]: (d["one"], d["other"]) for d in document["differences"]}
    assert fields["producer.torch"] == ("2.13.0", "2.14.0")
    assert fields["weights.kind"] == ("embedded", "external")
    assert "files.model/config.json" in fields
    assert "files.plan.json" not in fields
    assert "no difference" in say("inspect", package, "--diff", package)[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "spark"), "--target spark says nothing to a list of contents; leave it out"),
        (("--schedule", "--layers"), "--layers says nothing to --schedule; leave it out"),
        (("--plan", "--html", "x.html"), "--html x.html says nothing to --plan; leave it out"),
        (("--layers", "--batch", "4"), "--batch 4 says nothing to --layers; leave it out"),
    ],
)
def test_inspect_refuses_what_it_would_not_look_at(
    package: Path, say: Say, words: tuple[str, ...], said: str
) -> None:
    code, out, err = say("inspect", package, *words)

    assert (code, out) == (2, "")
    assert said in err


def test_inspect_tells_a_checkpoint(say: Say) -> None:
    document = json.loads(say("inspect", CHECKPOINTS / "ling-tiny", "--json")[1])

    assert document["layout"] == "bf16"
    assert document["config"]["MLA layers"] == [3, 7]
    experts = [t for t in document["tensors"] if ".experts.{e}." in t["name"]]
    assert [t["count"] for t in experts] == [128, 128, 128]
    assert document["bytes"] == sum(t["bytes"] for t in document["tensors"])


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("int4-fp8", "fp8 and int4"), ("fp8-static", "fp8 with one scale")],
)
def test_inspect_tells_how_a_quantized_checkpoint_is_stored(
    recipe: str, layout: str, tmp_path: Path, say: Say
) -> None:
    source = SyntheticCheckpoint(programs.config("tiny"), 1)
    made = quantize_checkpoint(source, load_recipe(recipe), tmp_path / "x")

    document = json.loads(say("inspect", made.path, "--json")[1])

    assert document["layout"] == layout


def test_inspect_tells_a_config_without_weights(say: Say) -> None:
    code, out, _ = say("inspect", CHECKPOINTS / "ling-2.6-flash")

    assert code == 0
    assert "256" in out


def test_inspect_compares_like_with_like(package: Path, say: Say) -> None:
    code, _, err = say("inspect", package, "--diff", CHECKPOINTS / "ling-tiny")

    assert code == 2
    assert "compare two packages, or two checkpoints" in err
