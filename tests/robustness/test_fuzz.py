"""Mutated files from outside are taken, or refused by an error on purpose, never by another."""

import contextlib
import copy
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingc.checkpoint import matrix_modules
from lingc.checkpoint.tensorfile import TensorWriter, read_header
from lingc.engine import canonical, verify
from lingc.engine.manifest import faults
from lingc.errors import CheckpointError, ConfigError, InputError, RecipeError
from lingc.model.config import ModelConfig
from lingc.plan import dumps, loads
from lingc.quantize.recipes import parse_recipe
from lingc.runtime.tokenizer import Tokenizer
from tests.robustness.conftest import LING_TINY, SMALL

CONFIG: dict[str, Any] = {**json.loads((LING_TINY / "config.json").read_text()), **SMALL}
RECIPE: dict[str, Any] = {
    "name": "mine",
    "summary": "x",
    "activations": "fp8",
    "rules": [
        {"modules": ["*.experts.*"], "format": "int4_group", "group": 32, "optional": True},
        {"modules": ["*.dense"], "format": "fp8_block"},
    ],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0}

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**30])
    | st.floats()
    | st.sampled_from([1e-300, 1e300, 0.5, -0.0])
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)

Place = list[tuple[Any, Any]]


def places(value: Any) -> Place:
    """Every (container, key) in a JSON value."""
    found: Place = []
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        found.append((value, key))
        found += places(value[key])
    return found


@st.composite
def mutated(draw: st.DrawFn, source: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """`source` with a few of its values replaced, removed, or joined by others."""
    value = copy.deepcopy(source)
    for _ in range(draw(st.integers(1, 3))):
        all_places = places(value)
        if not all_places:
            break
        container, key = draw(st.sampled_from(all_places))
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                container[key] = draw(values)
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=8))] = draw(values)
            case "add":
                container.append(draw(values))
    return value


# ---------------------------------------------------------------------------------------- configs


@given(values=mutated({**CONFIG, "rope_scaling": YARN}) | mutated(CONFIG))
@settings(max_examples=400)
def test_a_mutated_config_is_read_or_refused(values: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict(values)
    except ConfigError:
        return
    # What is taken can be worked with.
    assert len(config.linear_layers[:3]) + len(config.mla_layers[:3]) > 0
    assert config.latent_dim > 0
    assert config.rope_attention_factor > 0


@given(values=JSON)
def test_any_json_for_a_config_is_refused_on_purpose(
    values: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_text(json.dumps(values))

    with pytest.raises(ConfigError):
        ModelConfig.from_file(path)


@given(data=st.binary(max_size=64))
def test_any_bytes_for_a_config_are_refused_on_purpose(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(data)

    with pytest.raises(ConfigError):
        ModelConfig.from_file(path)


# ------------------------------------------------------------------------------------ safetensors


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tensors") / "x.safetensors"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "a": ("BF16", (4, 8)),
        "b": ("F32", (3,)),
        "c": ("I64", ()),
    }
    with TensorWriter(path, shapes, {"format": "pt"}) as writer:
        writer._left.clear()
        writer.finish()
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 64 + 12 + 8)
    assert read_header(path).keys() == shapes.keys()
    return path


def assert_read_or_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert all(t.offset_bytes + t.length_bytes <= len(data) for t in found.values())


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_header_is_read_or_refused(
    data: st.DataObject, tensors: Path, tmp_path: Path
) -> None:
    whole = tensors.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = data.draw(mutated(json.loads(whole[8 : 8 + length])))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    assert_read_or_refused(
        tmp_path / "y", struct.pack("<Q", len(text)) + text + whole[8 + length :]
    )


@given(
    at=st.integers(0, 1000),
    value=st.integers(0, 255),
    end=st.integers(-40, 0),
    length=st.none() | st.integers(0, 2**64 - 1),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_bytes_of_a_tensor_file_are_read_or_refused(
    at: int, value: int, end: int, length: int | None, tensors: Path, tmp_path: Path
) -> None:
    data = bytearray(tensors.read_bytes())
    data[at % len(data)] = value
    if length is not None:
        data[:8] = struct.pack("<Q", length)

    assert_read_or_refused(tmp_path / "y", bytes(data[: len(data) + end]))


# ---------------------------------------------------------------------------------------- recipes


MODULES = matrix_modules(ModelConfig.from_dict(CONFIG))


@given(value=mutated(RECIPE) | JSON)
@settings(max_examples=300)
def test_a_mutated_recipe_is_read_or_refused(value: Any) -> None:
    try:
        recipe = parse_recipe(value, source="mine.json")
        recipe.check_matches(MODULES)
    except RecipeError:
        return
    assert {recipe.format_of(module).kind for module in MODULES} <= {
        "plain",
        "fp8_block",
        "int4_group",
    }


# ------------------------------------------------------------------------------ plans and packages


@pytest.fixture(scope="module")
def plan_value(built: Path) -> Any:
    """The plan of a package with its shortest program alone, so that mutations meet every part."""
    value = json.loads((built / "plan.json").read_text())
    draft = value["programs"]["draft"]
    value["programs"] = {"draft": draft}
    value["weights"] = {n: w for n, w in value["weights"].items() if n in draft["weights"]}
    assert loads(json.dumps(value))
    return value


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_plan_is_read_or_refused(data: st.DataObject, plan_value: Any) -> None:
    value = data.draw(mutated(plan_value))

    try:
        plan = loads(json.dumps(value))
    except InputError:
        return
    assert loads(dumps(plan)) == plan


KINDS: dict[str, tuple[list[object], object]] = {
    "an op that is a list": (["programs", "draft", "steps", 0, "op"], []),
    "a page of text": (["page_size"], "64"),
    "a page of nothing": (["page_size"], 0),
    "a format that is true": (["format"], True),
    "a config that is a list": (["config"], []),
    "a target that is an object": (["target"], {}),
    "weights that are a list": (["weights"], []),
    "inputs that are a text": (["programs", "draft", "inputs"], "abc"),
    "a layer between layers": (["programs", "draft", "steps", 0, "layer"], 0.5),
    "an argument that is no number": (["programs", "draft", "steps", 0, "args"], [float("nan")]),
    "a type without a shape": (["states", "latent_cache.4"], "f32"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_with_a_value_of_another_kind_is_refused(name: str, plan_value: Any) -> None:
    (*way, last), value = KINDS[name]
    changed = copy.deepcopy(plan_value)
    inner = changed
    for key in way:
        inner = inner[key]
    inner[last] = value

    with pytest.raises(InputError, match="the plan cannot be read"):
        loads(json.dumps(changed))


@given(text=st.text(max_size=40) | JSON.map(json.dumps) | st.just("[" * 100_000))
def test_any_text_for_a_plan_is_refused_on_purpose(text: str) -> None:
    with pytest.raises(InputError):
        loads(text)


@given(data=st.data())
@settings(max_examples=200)
def test_a_mutated_manifest_is_judged(data: st.DataObject, built: Path) -> None:
    value = data.draw(mutated(json.loads((built / "manifest.json").read_text())))

    assert isinstance(list(faults(value)), list)


RESIGNED = (
    "manifest.json",
    "plan.json",
    "model/config.json",
    "variants/cpu/variant.json",
    "tests/cases.json",
)


@pytest.mark.parametrize("name", RESIGNED)
def test_a_package_with_mutated_json_and_right_digests_is_judged(name: str, package: Path) -> None:
    @given(data=st.data())
    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    def judge(data: st.DataObject) -> None:
        path = package / name
        whole, manifest = path.read_bytes(), (package / "manifest.json").read_bytes()
        path.write_bytes(canonical.encode(plain(data.draw(mutated(json.loads(whole))))))
        resign(package)
        try:
            assert verify(package, level="integrity").exit_code in (0, 4, 6)
        finally:
            path.write_bytes(whole)
            (package / "manifest.json").write_bytes(manifest)

    judge()


def plain(value: Any) -> Any:
    """Without what canonical JSON has no form for."""
    return json.loads(json.dumps(value).replace("NaN", "0").replace("Infinity", "1"))


def resign(package: Path) -> None:
    """Give the manifest the digests of what lies there, as a hostile maker would."""
    path = package / "manifest.json"
    value = json.loads(path.read_text())
    listed = value.get("files")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("path"), str):
            file = package / entry["path"]
            if "\0" not in entry["path"] and file.is_file():
                data = file.read_bytes()
                entry["sha256"], entry["size"] = hashlib.sha256(data).hexdigest(), len(data)
    value.pop("bundle_id", None)
    value["bundle_id"] = canonical.sha256(value)
    path.write_bytes(canonical.encode(value))


# -------------------------------------------------------------------------------------- tokenizers


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


@given(value=mutated(TOKENIZER), config=JSON)
@settings(max_examples=200)
def test_a_mutated_tokenizer_is_read_or_refused(value: Any, config: Any) -> None:
    files = {
        "tokenizer.json": json.dumps(value).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    with contextlib.suppress(InputError):
        assert Tokenizer(files).vocab_size >= 0
