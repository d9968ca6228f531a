"""A package small enough to flip every byte of."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lingc.engine import Contents, write_package
from lingc.engine.machine import Machine
from lingc.plan import Plan, Program, Ref, Step, TensorType, WeightSpec, dumps

LIBRARIES = {"onnxruntime": "1.31.1"}


def _spec(name: str, dtype: str, shape: tuple[int, ...], form: str) -> WeightSpec:
    sources = () if form == "decay" else (f"model.{name}",)
    layer = 0 if form == "decay" else -1
    part = "codes" if form == "fp8_block" else "values"
    kind = TensorType(dtype, shape)
    return WeightSpec(name=name, type=kind, sources=sources, format=form, part=part, layer=layer)


@pytest.fixture
def plan() -> Plan:
    x, y = TensorType("f32", ("T", 8)), TensorType("f32", ("T", 16))
    weights = [
        _spec("layers.0.norm.weight", "f32", (8,), "plain"),
        _spec("layers.0.mlp.weight", "f8e4m3", (16, 8), "fp8_block"),
        _spec("layers.0.decay", "f32", (2,), "decay"),
    ]
    states = {f"linear_state.{i}": TensorType("f32", ("S", 2, 4, 4)) for i in range(2)}
    program = Program(
        inputs=("x",),
        states=(),
        outputs={"logits": "y"},
        updates={},
        weights=("layers.0.mlp.weight",),
        types={"x": x, "y": y, "layers.0.mlp.weight": TensorType("f8e4m3", (16, 8))},
        steps=(
            Step(op="lingc.linear", args=(Ref("x"), Ref("layers.0.mlp.weight")), outputs=("y",)),
        ),
    )
    return Plan(
        config={"hidden_size": 8, "rope_theta": 6e6},
        precision="fp8",
        target="cpu",
        activation="f32",
        page_size=16,
        max_draft=3,
        states=states,
        weights={spec.name: spec for spec in weights},
        programs={"decode": program},
    )


@pytest.fixture
def contents(plan: Plan) -> Contents:
    """Without weights."""
    return Contents(
        plan=dumps(plan),
        model_files={"config.json": b'{"hidden_size": 8}\n', "tokenizer.json": b"{}\n"},
        variants={"cpu": {"decode.onnx": b"an engine", "kernels/a.bin": bytes(range(256))}},
        variant_info={
            "cpu": {
                "engine": "onnx",
                "runs_on": {
                    "os": ["linux"],
                    "arch": ["x86_64", "aarch64"],
                    "libraries": {"onnxruntime": ">=1.23,<2"},
                },
                "initializers": [{"name": "w", "dtype": "f16", "shape": [16, 8]}],
            }
        },
        weights=None,
        architecture="BailingMoeV2_5ForCausalLM",
        checkpoint=("bf16", "a" * 64),
        request={
            "precision": "fp8",
            "target": "cpu",
            "engine": "onnx",
            "page_size": 16,
            "max_draft": 3,
            "widen": {"policy": "auto"},
        },
        passes=({"phase": "decode", "name": "fuse_x", "expected": 2, "found": 2},),
        quant={"recipe": "fp8"},
        producer={"torch": "2.13.0"},
        tests={"cases.json": b"[]\n"},
    )


def write_shards(directory: Path) -> list[Path]:
    """The weights of `plan` in two files."""
    directory.mkdir(parents=True, exist_ok=True)
    first, second = directory / "0.safetensors", directory / "1.safetensors"
    norm = np.arange(8, dtype=np.float32)
    save_file({"layers.0.norm.weight": norm, "layers.0.decay": norm[:2]}, first)
    code = np.arange(128, dtype=np.uint8).reshape(16, 8)
    _save_as(second, "layers.0.mlp.weight", code, "F8_E4M3")
    return [first, second]


def _save_as(path: Path, name: str, bits: np.ndarray, tag: str) -> None:
    """NumPy has no FP8: the header's tag is written over that of the bits."""
    save_file({name: bits}, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U8"', f'"{tag}"'.encode()).rstrip()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


@pytest.fixture
def embed(contents: Contents, tmp_path: Path) -> Callable[[], Contents]:
    """Contents with weights; each call writes shards anew, as writing a package moves them."""
    numbers = iter(range(1_000_000))

    def make() -> Contents:
        return replace(contents, weights=write_shards(tmp_path / f"shards-{next(numbers)}"))

    return make


@pytest.fixture
def package(embed: Callable[[], Contents], tmp_path: Path) -> Path:
    path = tmp_path / "x.ling"
    write_package(path, embed())
    return path


@pytest.fixture
def machine() -> Machine:
    """One on which the package runs."""
    return Machine(os="linux", arch="x86_64", version_of=LIBRARIES.get)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is meant to outlive a power cut; one test counts what would be forced."""
    monkeypatch.setattr("os.fsync", lambda _: None)
