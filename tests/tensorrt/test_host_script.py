"""The script for a host with a GPU: what it judges, and all of it against TensorRTs that record."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch._dynamo  # noqa: F401 (it looks modules up by name, and shall not find those of tests)

from lingc import cli
from lingc.device import Binary
from lingc.engine import machine
from lingc.kernel import Kernel
from lingc.runtime import tensorrt_backend, tensorrt_plugin
from lingc.targets.cuda import binaries
from tests.runtime.host_device import HostDevice
from tests.tensorrt.engines import stand_ins
from tests.tensorrt.recording import Recording
from tests.tensorrt.surface import load
from tests.tensorrt.torch_tensorrt_fake import Registry

DEMO = Path(__file__).parents[2] / "demo"
VERSION = "11.4.0.106"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


HOST, STEPS = script("tensorrt_host"), script("tensorrt_steps")


# --------------------------------------------------------------------------------- what it records

MEASURED = {
    "modes": [
        {"mode": "prefill", "mean_abs": 0.02, "mean_kl": 4e-4, "top5_agreement": 1.0},
        {"mode": "draft", "mean_abs": 0.03, "mean_kl": 3e-4, "top5_agreement": 0.99},
    ]
}


class Canned:
    """Answers commands without running them, by their verb.

    Args:
        answers: Verb -> exit code, stdout, stderr; any other succeeds and says nothing.
    """

    def __init__(self, **answers: tuple[int, str, str]) -> None:
        self.answers = {"references": (0, json.dumps(MEASURED), ""), **answers}
        self.seen: list[list[str]] = []

    def __call__(self, words: Sequence[str]) -> tuple[int, str, str]:
        self.seen.append([*words])
        verb = words[2] if words[:2] == ("-m", "lingc") else words[1]
        if verb == "parity" and "quantized" in words:
            verb = "references"
        if verb == "logits":
            native = "--plugins" in words
            made = np.full((2, 3), 1.0 + (native and "differ" in self.answers), np.float32)
            np.savez(words[words.index("-o") + 1], **{"decode.0": made})  # type: ignore[arg-type]
        return self.answers.get(verb, (0, "", ""))


def ran(tmp_path: Path, canned: Canned, *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status of the script, and its steps by name."""
    output = tmp_path / "record.json"
    given = ["--target", "h20", "--precision", "fp8", "--folder", str(tmp_path / "engines")]
    code = HOST.main([*given, "-o", str(output), *words], host=HOST.Host(run=canned))
    record = json.loads(output.read_text())
    assert len({step["step"] for step in record["steps"]}) == len(record["steps"])
    return code, {step["step"]: step for step in record["steps"]}


def headers(tmp_path: Path) -> list[str]:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "NvInfer.h").touch()
    return ["--include", str(tmp_path / "include")]


def test_every_step_is_recorded_with_its_result(tmp_path: Path) -> None:
    canned = Canned()
    code, steps = ran(tmp_path, canned, *headers(tmp_path))

    assert code == 0
    assert [step for step in steps if steps[step]["result"] == "ran"] == [
        "doctor", "fp8: build", "fp8: verify", "fp8: run", "fp8: references", "fp8: parity",
        "fp8: layers", "fp8: deploy", "fp8: python logits", "fp8: native logits",
        "fp8: same bits", "enqueue",
    ]  # fmt: skip
    assert steps["converters"]["result"] == "skipped"
    assert "is not installed: pip install torch-tensorrt" in steps["converters"]["why"]
    assert ["--include", str(tmp_path / "include")] == steps["fp8: deploy"]["command"][-2:]


def test_the_budget_of_a_recipe_is_what_its_references_need_with_room(tmp_path: Path) -> None:
    canned = Canned(parity=(5, "{}", "lingc parity: over budget 'references-fp8'; draft: mean_kl"))
    code, steps = ran(tmp_path, canned)
    limits = steps["fp8: parity"]["budget"]

    assert code == 1
    assert limits["mean_abs"] == pytest.approx(0.045)
    assert limits["mean_kl"] == pytest.approx(9e-4)
    assert limits["top5_agreement"] == pytest.approx(0.97)
    assert steps["fp8: parity"]["result"] == "failed"
    assert steps["fp8: parity"]["why"] == (
        "exit 5: lingc parity: over budget 'references-fp8'; draft: mean_kl"
    )
    given = next(words for words in canned.seen if "parity" in words and "quantized" not in words)
    assert json.loads(Path(given[given.index("--budget") + 1]).read_text()) == limits
    assert steps["fp8: layers"]["result"] == "ran", "a step that fails stops no other"


@pytest.mark.parametrize(
    ("answers", "step", "result", "why"),
    [
        ({"build": (8, "", "lingc build: no\nhint: x")}, "fp8: build", "failed", "exit 8: lingc"),
        ({"build": (8, "", "no")}, "fp8: all else", "skipped", "the engine was not built"),
        ({"references": (7, "", "x")}, "fp8: parity", "skipped", "there is no budget"),
        ({"deploy": (4, "", "x")}, "fp8: native logits", "skipped", "were not deployed"),
        ({"differ": (0, "", "")}, "fp8: same bits", "failed", "decode.0: 6 of 6 logits differ"),
        ({"verify": (6, "oh", "")}, "fp8: verify", "failed", "exit 6: oh"),
    ],
)
def test_what_failed_or_was_skipped_says_why(
    answers: dict[str, tuple[int, str, str]], step: str, result: str, why: str, tmp_path: Path
) -> None:
    code, steps = ran(tmp_path, Canned(**answers), *headers(tmp_path))

    assert code == 1
    assert (steps[step]["result"], why in steps[step]["why"]) == (result, True), steps[step]


def test_without_headers_the_plugins_are_not_compiled_and_the_record_says_so(
    tmp_path: Path,
) -> None:
    canned = Canned()
    (tmp_path / "none").mkdir()
    code, steps = ran(tmp_path, canned, "--include", str(tmp_path / "none"))

    assert code == 0
    assert "--include" not in steps["fp8: deploy"]["command"]
    assert "NvInfer.h is in no folder" in steps["fp8: native logits"]["why"]
    assert steps["fp8: same bits"]["result"] == "skipped"


# ------------------------------------------------------------------------------- against recorders


def in_process(words: Sequence[str]) -> tuple[int, str, str]:
    """A command run here, where the recorders are."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        if list(words[:2]) == ["-m", "lingc"]:
            code = cli.main([*words[2:]])
        elif words[0] == str(HOST.STEPS):
            more = ["--device", "cpu"] if words[1] == "converters" else []
            code = STEPS.main([*words[1:], *more])
        else:
            code = 0  # the tests of `enqueue`, which need a GPU
    return code, out.getvalue(), told.getvalue()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """An H20 with TensorRT and Torch-TensorRT, as far as the recorders have them."""
    trt, registry = Recording(load(VERSION)), Registry()
    vars(trt)["__spec__"] = ModuleSpec("tensorrt", None)
    torch_trt: Any = ModuleType("torch_tensorrt")
    torch_trt.__spec__ = ModuleSpec("torch_tensorrt", None)
    torch_trt.dynamo = SimpleNamespace(compile=compiler(registry))
    for name, module in (
        ("tensorrt", trt), ("torch_tensorrt", torch_trt),
        ("torch_tensorrt.dynamo.conversion", registry.module()),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    found = machine.Gpu(name="NVIDIA H20", capability="9.0", driver="13.0", memory_bytes=100 << 30)
    monkeypatch.setattr(machine, "_first_gpu", lambda: found)
    monkeypatch.setattr(machine, "_installed_version", lambda name: versions().get(name))
    monkeypatch.setattr(tensorrt_backend, "Device", HostDevice)
    monkeypatch.setattr(binaries, "compile_all", compiled)
    monkeypatch.setattr(tensorrt_plugin, "_CREATORS", {})
    return trt


def compiled(kernels: Any, arch: str, *_: Any, **_more: Any) -> dict[Kernel, Binary]:
    return {one: replace(binary, arch=arch) for one, binary in stand_ins(kernels).items()}


def versions() -> dict[str, str]:
    return {"tensorrt": VERSION, "cuda.bindings": "13.0.0"}


def compiler(registry: Registry) -> Callable[..., Any]:
    """Compiles nothing, and insists that there is a converter for each op of ours."""

    def compile_(exported: Any, *, arg_inputs: Any, **more: Any) -> Any:
        assert more["require_full_compilation"]
        module = exported.module()
        ours = [n for n in module.graph.nodes if str(n.target).startswith("lingc.")]
        assert ours
        for node in ours:
            assert registry.get(node) is not None
        assert arg_inputs
        return module

    return compile_


@pytest.mark.long
def test_all_of_it_runs_against_tensorrts_that_record(
    gpu: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(HOST, "ROWS", ("--mode", "decode", "--samples", "1", "--max-tokens", "8"))
    output = tmp_path / "record.json"
    code = HOST.main(
        ["--target", "h20", "--precision", "bf16", "--folder", str(tmp_path / "engines"),
         "-o", str(output), "--include", str(tmp_path)],
        host=HOST.Host(run=in_process),
    )  # fmt: skip
    steps = {step["step"]: step for step in json.loads(output.read_text())["steps"]}
    results = {name: (step["result"], step["why"]) for name, step in steps.items()}

    assert gpu.calls.count("add_plugin_v3") > 100
    # A recorder computes nothing: what judges results fails, and says of what.
    assert code == 1
    for name in ("doctor", "bf16: build", "bf16: verify", "bf16: references", "bf16: deploy"):
        assert results[name] == ("ran", ""), steps[name]
    assert results["bf16: parity"][0] == "failed"
    assert re.search(r"exit 5: .*budget 'references-bf16'.*is nan", results["bf16: parity"][1])
    assert results["bf16: run"][0] == "failed"
    assert "NvInfer.h is in no folder" in results["bf16: native logits"][1]
    assert results["bf16: python logits"] == results["converters"] == ("ran", "")


def test_ops_are_compiled_and_held_to_their_references(gpu: Recording) -> None:
    assert gpu.calls == []
    code, out, _ = in_process((str(HOST.STEPS), "converters", "--target", "h20"))
    told = {one["op"]: one for one in map(json.loads, out.splitlines())}
    counts = {result: sum(one["result"] == result for one in told.values()) for result in (
        "ran", "failed", "skipped"
    )}  # fmt: skip

    assert (code, counts["failed"]) == (0, 0), [x for x in told.values() if x["result"] == "failed"]
    assert counts["ran"] >= 15
    assert told["router"]["result"] == "ran"
    assert all(one["why"] for one in told.values() if one["result"] == "skipped")
