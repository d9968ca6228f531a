"""The whole of a build: what the package holds, and that it answers as the references do."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lingc.cli.build as command
from lingc import recording, targets
from lingc.build import Built, _activation_note, build
from lingc.checkpoint import SyntheticCheckpoint, open_checkpoint, write_checkpoint
from lingc.code import Code
from lingc.compile import Request, compile_plan, engine_kind, silent
from lingc.engine import Package, open_package, verify
from lingc.errors import CheckpointError, ConfigError, UnknownPrecisionError, UnknownTargetError
from lingc.interpret import InterpreterBackend
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.runtime import vectors
from lingc.runtime.backend import Limits
from lingc.runtime.load import run_vectors
from lingc.weights import open_weights
from tests import programs

CONFIG = programs.config("tiny")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small spend more time handing work to a second thread than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(SyntheticCheckpoint(CONFIG, 1), tmp_path_factory.mktemp("c") / "tiny")


def make(source: Path, path: Path, **changes: Any) -> Built:
    stage = changes.pop("stage", silent)
    request = Request(sizes=programs.SIZES, **changes)
    return build(source, path, request, stage=stage, capturer=programs.capturer("tiny"))


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Package]:
    """`built(precision)`: a package with its weights, made once."""
    place = tmp_path_factory.mktemp("built")

    def get(precision: str) -> Package:
        path = place / f"{precision}.ling"
        if not path.exists():
            make(checkpoint, path, precision=precision)
        return open_package(path)

    return get


def packed(package: Package) -> dict[str, Any]:
    return dict(open_weights(package.shards()))


# ------------------------------------------------------------------------------- what is in there


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4"])
def test_a_package_is_whole_and_its_engine_answers_its_vectors(
    precision: str, built: Callable[[str], Package]
) -> None:
    package = built(precision)

    results = run_vectors(package)

    assert verify(package.root).exit_code == 0
    assert [result.case for result in results] == ["prompt-5", "prompt-70"]
    assert [result.problems for result in results] == [(), ()]
    assert all(result.compared >= 6 for result in results)


def test_the_manifest_says_what_was_asked_and_of_what_it_was_made(
    checkpoint: Path, built: Callable[[str], Package]
) -> None:
    manifest = built("fp8").manifest
    identity = open_checkpoint(checkpoint).identity()

    assert manifest.value["request"] == {
        "precision": "fp8",
        "target": "cpu",
        "engine": "onnx",
        "weights": "embed",
        "widen": "load",
        "page_size": 4,
        "max_draft": 3,
        "waive": [],
    }
    assert manifest.value["model"]["checkpoint"] == {"layout": "bf16", "identity": identity}
    assert manifest.value["quant"]["recipe"]["name"] == "fp8"
    assert re.search(r"weight-only.*f32", manifest.value["quant"]["note"])
    assert manifest.value["producer"].keys() == {"lingc", "numpy", "onnx", "torch"}
    assert {line["phase"] for line in manifest.value["graph"]["passes"]} == set(
        programs.phases("tiny")
    )


def test_a_package_without_weights_has_no_vectors_either(
    checkpoint: Path, built: Callable[[str], Package], tmp_path: Path
) -> None:
    make(checkpoint, tmp_path / "x.ling", weights="external")

    package = open_package(tmp_path / "x.ling")
    files = set(package.manifest.files)
    assert not [name for name in files if name.startswith(("weights/", "tests/"))]
    assert files < set(built("bf16").manifest.files)
    assert package.manifest.checkpoint_identity == open_checkpoint(checkpoint).identity()


def test_a_package_for_a_config_alone_takes_any_weights_of_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    make(checkpoint / "config.json", tmp_path / "x.ling", weights="external")

    assert open_package(tmp_path / "x.ling").manifest.checkpoint_identity is None


def test_a_config_alone_has_nothing_to_embed(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights to embed\nhint: .*--weights external"):
        make(checkpoint / "config.json", tmp_path / "x.ling")

    assert list(tmp_path.iterdir()) == []


def test_weights_of_the_asked_layout_are_taken_unchanged(checkpoint: Path, tmp_path: Path) -> None:
    twin = write_checkpoint(open_checkpoint(checkpoint), tmp_path / "fp8", layout="fp8")
    source = open_checkpoint(twin)
    make(twin, tmp_path / "x.ling")

    package = open_package(tmp_path / "x.ling")
    name = "model.layers.0.attention.dense.weight"
    codes, scales, _ = source.quantized(name)
    weights = packed(package)
    found = {s.part: weights[s.name] for s in package.plan.weights.values() if s.sources == (name,)}
    assert package.plan.precision == "fp8"
    assert np.array_equal(found["codes"], codes)
    assert np.array_equal(found["scales"], scales)


def test_a_release_without_mtp_weights_gives_no_draft_phase(
    checkpoint: Path, tmp_path: Path
) -> None:
    source = write_checkpoint(open_checkpoint(checkpoint), tmp_path / "x", keep_mtp=False)
    make(source, tmp_path / "x.ling")

    package = open_package(tmp_path / "x.ling")
    assert set(package.plan.programs) == {"prefill", "decode", "verify"}
    assert "variants/cpu/draft.onnx" not in package.manifest.files
    assert [result.problems for result in run_vectors(package)] == [(), ()]


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


@pytest.fixture
def with_texts(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with a tokenizer and a generation config."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "texts"))
    (copy / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (copy / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (copy / "notes.txt").write_text("mine")
    return copy


@pytest.mark.parametrize("source", ["", "config.json"])
def test_the_tokenizer_travels_as_it_is(source: str, with_texts: Path, tmp_path: Path) -> None:
    make(with_texts / source, tmp_path / "x.ling", weights="external")

    package = open_package(tmp_path / "x.ling")
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (package.root / "model").iterdir()} == {"config.json", *names}
    assert all(package.model_file(name) == (with_texts / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json"),
        ("generation_config.json", "[]", r"generation_config\.json' holds a list, not an object"),
    ],
)
def test_texts_that_an_engine_could_not_read_stop_the_build(
    name: str, text: str, message: str, with_texts: Path, tmp_path: Path
) -> None:
    (with_texts / name).write_text(text)

    with pytest.raises(Exception, match=message) as caught:
        make(with_texts, tmp_path / "x.ling")

    assert getattr(caught.value, "exit_code", None) == 3
    assert not (tmp_path / "x.ling").exists()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(
    with_texts: Path, tmp_path: Path
) -> None:
    text = json.dumps(TOKENIZER).replace('"b": 1', f'"b": {CONFIG.vocab_size}')
    (with_texts / "tokenizer.json").write_text(text)

    with pytest.raises(CheckpointError, match=f"ids up to {CONFIG.vocab_size}, the model has a vo"):
        make(with_texts, tmp_path / "x.ling")


# --------------------------------------------------------------------------------------- vectors


def test_vectors_do_not_depend_on_the_order_of_f32_sums(built: Callable[[str], Package]) -> None:
    package = built("bf16")
    recorded = vectors.decode(
        {name: package.read(f"tests/{name}") for name in (vectors.CASES, vectors.VECTORS)}
    )

    def record(plan: Plan) -> list[vectors.Case]:
        limits = Limits.from_tokens(slots=1, tokens_per_sequence=80, page_size=plan.page_size)
        backend = InterpreterBackend(plan, packed(package), limits)
        prompts = {case.name: case.prompt for case in recorded}
        return vectors.record(backend, prompts, count=8, tolerance=recording.F32_TOLERANCE)

    plain, wide = record(package.plan), record(recording.in_f64(package.plan))
    assert vectors.encode(wide) == vectors.encode(recorded)
    assert vectors.encode(plain) != vectors.encode(recorded)
    for f32, f64 in zip(plain, wide, strict=True):
        assert f32.logits.dtype == f64.logits.dtype == np.float32
        assert np.abs(f32.logits - f64.logits).max() < 1e-4
        assert all(np.float32(margin) == margin for margin in f64.margins[:1])


def test_large_weights_are_not_run_while_building(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recording, "MOST_WEIGHT_BYTES", 1000)

    make(checkpoint, tmp_path / "x.ling")

    assert run_vectors(open_package(tmp_path / "x.ling")) == []
    assert "no test vectors: the weights exceed" in caplog.text


def test_the_prompts_of_vectors_stay_in_a_small_vocabulary(
    built: Callable[[str], Package],
) -> None:
    cases = json.loads(built("bf16").read("tests/cases.json"))["cases"]

    assert all(0 <= token < CONFIG.vocab_size for case in cases for token in case["prompt"])


# -------------------------------------------------------------------------------------- the build


@pytest.mark.parametrize("changes", [{"precision": "fp9"}, {"target": "h2o"}])
def test_what_is_unknown_is_refused_before_the_checkpoint_is_read(
    changes: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises((UnknownPrecisionError, UnknownTargetError), match="did you mean"):
        make(tmp_path / "nowhere", tmp_path / "x.ling", **changes)


def test_every_stage_is_shown_and_counted_to_its_end(checkpoint: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int | None, list[int]]] = {}

    @contextmanager
    def stage(
        name: str, *, total: int | None = None, unit: str = ""
    ) -> Iterator[Callable[[int], None]]:
        del unit
        seen[name] = (total, [])
        yield seen[name][1].append

    make(checkpoint, tmp_path / "x.ling", stage=stage)

    assert list(seen) == [
        "read checkpoint",
        "capture and fuse",
        "lower to ONNX",
        "pack weights",
        "record test vectors",
        "write package",
    ]
    assert all(sum(done) == total for total, done in seen.values() if total is not None)


def test_what_was_built_is_handed_back(checkpoint: Path, tmp_path: Path) -> None:
    made = make(checkpoint, tmp_path / "x.ling", weights="external")

    assert made.path == tmp_path / "x.ling"
    assert made.manifest.bundle_id == open_package(made.path).manifest.bundle_id
    assert made.compiled.plan.precision == "bf16"


@pytest.mark.parametrize(
    ("target", "engine", "weights", "note"),
    [
        ("cpu", "onnx", "embed", r"weight-only: activations stay f32 on this target"),
        ("h20", "cuda", "embed", r"on the fly, in blocks: cuda engines have no kernel for static"),
        ("h20", "tensorrt", "external", r"in blocks: static scales are constants of an engine"),
        ("h20", "tensorrt", "embed", r"experts are, .*; 27 of 27 matrices have no calibrated"),
        ("spark", "tensorrt", "embed", r"experts are, .*; 27 of 27 matrices have no calibrated"),
    ],
)
def test_where_static_scales_are_not_used_is_told(
    target: str, engine: str, weights: str, note: str, checkpoint: Path
) -> None:
    request = Request(target=target, engine=engine, weights=weights, sizes=programs.SIZES)
    source, recipe = open_checkpoint(checkpoint), load_recipe("fp8-static")
    compiled = compile_plan(
        source.config, recipe, targets.get(target), has_mtp=source.has_mtp, request=request,
        capturer=programs.capturer("tiny"),
    )  # fmt: skip
    kind = engine_kind(compiled.target, engine)
    made = Code(kind=kind, plan=compiled.plan, files={}, info={}, request={}, producer={})

    said = _activation_note(compiled, made, source, request)

    assert re.search(note, said)


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        (None, "tiny-cpu.ling"),
        ("fp8-max", "tiny-fp8-max-cpu.ling"),
        ("recipes/mine.json", "tiny-mine-cpu.ling"),
        ("mine.json", "tiny-mine-cpu.ling"),
    ],
)
def test_a_package_without_a_name_is_called_after_what_it_is(
    precision: str | None,
    name: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command._default_path(checkpoint, precision, "cpu") == Path(name)

    (tmp_path / "artifacts").mkdir()
    assert command._default_path(checkpoint, precision, "cpu") == Path("artifacts", name)
