"""`lingc parity --bisect` and `lingc parity repro` on packages and checkpoints in files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lingc.cli import main
from lingc.parity.bisect.checkpoints import LIMITS
from lingc.parity.bisect.traced import TracedOnnx
from lingc.quantize.recipes import KINDS
from lingc.runtime.backend import Array
from tests.parity.packages import ROWS, checkpoint, engine
from tests.parity.test_page import outline

EXPERT, OTHER = (f"model.layers.2.mlp.experts.{e}.down_proj.weight" for e in (3, 9))


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in ROWS)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the weights of one expert in the place of another's."""
    path = tmp_path_factory.mktemp("swapped") / "checkpoint"
    path.mkdir()
    for file in checkpoint().iterdir():
        (path / file.name).write_bytes(file.read_bytes())
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            if EXPERT in tensors:
                tensors[EXPERT] = tensors[OTHER].clone()
                save_file(tensors, path / file.name)
    return path


def parity(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["parity", *map(str, words), "--progress", "none"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_sound_engine_passes_in_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = parity(
        capsys, checkpoint(), engine(), "--bisect", "--data", "rows.jsonl", "--json"
    )

    told = json.loads(out)
    assert code == 0
    assert told["finding"] is None
    assert told["modes"] == ["prefill", "decode", "verify", "rollback", "draft"]
    assert [walk["compared"] for walk in told["walked"]] == [
        "plan against eager",
        "engine against its plan",
    ]
    assert all(walk["judged"] > 500 and not walk["skipped"] for walk in told["walked"])
    assert not Path("parity-fault.safetensors").exists()


def test_an_expert_of_another_checkpoint_is_found_and_shown_again(
    capsys: pytest.CaptureFixture[str], swapped: Path
) -> None:
    words = (checkpoint(), swapped, "--bisect", "--data", "rows.jsonl", "--repro", "fault",
             "--report", "fault.html")  # fmt: skip

    code, out, err = parity(capsys, *words)
    page = outline(Path("fault.html").read_text(encoding="utf-8"))
    again, said, _ = parity(capsys, "repro", "fault")
    for file in checkpoint().iterdir():  # mended
        (swapped / file.name).write_bytes(file.read_bytes())
    mended, fine, _ = parity(capsys, "repro", "fault", "--json")

    assert (code, again, mended) == (5, 5, 0)
    assert "first fault: model.layers.2.mlp.experts" in out
    assert f"weight {EXPERT}" in out
    assert "moe.py:" in out
    assert "lingc parity repro fault runs that step again" in err
    assert "model.layers.2.mlp.experts is still wrong" in said
    assert json.loads(fine)["ok"] is True
    assert page.links == []
    assert "script" not in page.tags
    for told in ("model.layers.2.mlp.experts, made by Experts of layer 2", EXPERT,
                 "Run it by itself as often as it takes: lingc parity repro fault"):  # fmt: skip
        assert told in " ".join(page.text.split())


def test_an_engine_of_other_weights_is_found_by_its_packed_weight(
    capsys: pytest.CaptureFixture[str], swapped: Path
) -> None:
    tensors = [file for file in swapped.iterdir() if file.suffix == ".safetensors"]
    for file in tensors:
        held = load_file(file)
        if EXPERT in held:
            held[EXPERT] = held[OTHER].clone()
            save_file(held, file)
    words = ("--bisect", "--data", "rows.jsonl", "--repro", "fault", "--json")

    refused, _, err = parity(capsys, swapped, engine(), *words)
    code, out, _ = parity(capsys, swapped, engine(), *words, "--weights", "checkpoint")

    told = json.loads(out)
    (wrong, *_) = told["finding"]["weights"]
    assert (refused, code) == (6, 5)
    assert "has the weights of checkpoint" in err
    assert told["finding"]["compared"] == "plan against eager"
    assert (told["finding"]["op"], told["finding"]["layer"]) == ("lingc.int4_weight_experts", 2)
    assert wrong["experts"] == [3]
    assert EXPERT in wrong["sources"]
    assert told["reproducer"] == "fault"


def test_a_node_that_is_wrong_is_found_in_its_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = TracedOnnx.run

    def wrong(
        self: TracedOnnx, phase: str, inputs: Mapping[str, Array]
    ) -> tuple[dict[str, Array], Mapping[str, Array]]:
        out, told = sound(self, phase, inputs)
        if phase != "verify":
            return out, told
        (name,) = (n for n in told if n.startswith("layers.1.") and n.endswith("router.weights"))
        return out, {**told, name: np.float32(0.5) * told[name]}

    monkeypatch.setattr(TracedOnnx, "run", wrong)

    code, out, _ = parity(capsys, f"interpret:{engine()}", engine(), "--bisect",
                          "--data", "rows.jsonl", "--repro", "fault")  # fmt: skip
    again, said, _ = parity(capsys, "repro", "fault")

    assert code == 5
    assert "made by lingc.router, layer 1" in out
    assert "in verify" in out
    # The fault was in what was told of the node: by itself it is sound.
    assert again == 0
    assert "ran: the engine's node for lingc.router" in said


def test_every_format_of_a_checkpoint_has_a_limit() -> None:
    assert {*LIMITS} == {*KINDS}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("repro", "none"), 3, "'none' is not a reproducer: No such file"),
        (("repro", "."), 3, "'.' is not a reproducer: it is a directory"),
        (("repro", "rows.jsonl"), 3, "'rows.jsonl' is not a reproducer"),
        (("repro", "weights"), 3, "'weights' is not a reproducer: it is safetensors of another"),
        (("repro", "list"), 3, "it tells a list"),
        (("repro", "empty"), 3, "lacks finding.tensor"),
        (("repro", "empty", "--batch", "2"), 2, "--batch 2 says nothing to parity repro"),
        (("SMALL", "--record", "x", "--bisect"), 2, "--bisect says nothing to --record"),
        (("SMALL", "--drift", "64", "--record", "x"), 2, "--record x says nothing to --drift"),
        (("SMALL", "--drift", "64", "--budget", "quantized"), 2, "has no state_error"),
        (("SMALL", "SMALL", "--repro", "x"), 2, "--repro x says nothing to a comparison"),
        (("SMALL", "SMALL", "--threads", "2"), 2, "--threads 2 says nothing to sides without a"),
        (("SMALL", "SMALL", "--checkpoint", "x"), 2, "--checkpoint x says nothing to sides"),
        (("SMALL", "--record", "x", "--report", "x"), 2, "--report x says nothing to --record"),
        (("interpret:ENGINE", "interpret:ENGINE", "--bisect"), 2, "two interpreted plans"),
        (("SMALL",), 2, "there is no B, which A is held against"),
        (("SMALL", "SMALL", "--bisect", "--budget", "quantized"), 2, "has limits of its own"),
        (("SMALL", "SMALL", "--drift", "64"), 2, "--drift is of A alone"),
        (("SMALL", "ENGINE", "--bisect", "--data", "none"), 3, "'none' cannot be read"),
        (("SMALL", "ENGINE", "--bisect", "--repro", "no/x", "--data", "rows.jsonl"), 7, "no/x"),
        (("SMALL", "ENGINE", "--bisect", "--repro", ".", "--data", "rows.jsonl"), 7, "a directory"),
    ],
)
def test_what_cannot_be_walked_is_answered(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, message: str
) -> None:
    for name, said in (("list", "[1]"), ("empty", '{"format": 1, "kind": "step"}')):
        save_file({"row": torch.zeros(1)}, name, {"lingc_reproducer": said})
    save_file({"row": torch.zeros(1)}, "weights")
    names = {"SMALL": str(checkpoint()), "ENGINE": str(engine())}
    given = [word.replace("SMALL", names["SMALL"]).replace("ENGINE", names["ENGINE"])
             for word in words]  # fmt: skip

    found, _, err = parity(capsys, *given, *_few(given))

    assert found == code
    assert message in err


def _few(words: list[Any]) -> tuple[str, ...]:
    return ("--mode", "prefill", "--samples", "1") if "--bisect" in words else ()
