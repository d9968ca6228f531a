"""`lingc deploy`: what a program without Python needs, whole or not at all."""

import errno
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lingc import engine
from lingc.cli import main
from lingc.engine import Code
from lingc.errors import (
    IncompatibleError,
    IntegrityError,
    MissingExtraError,
    ResourceError,
    UsageError,
)
from lingc.runtime import tensorrt_deploy, tensorrt_plugin
from lingc.runtime.tensorrt_deploy import (
    COMPILER,
    LIBRARY,
    compilation,
    deploy,
    load_plugins,
    source,
)
from lingc.runtime.tensorrt_plugin import Launcher, register
from tests.tensorrt.engines import plugins
from tests.tensorrt.native_code import has_compiler, has_headers, include_dirs
from tests.tensorrt.recording import Recording
from tests.tensorrt.surface import load
from tests.tensorrt.test_backend import PRECISION, TARGET, Held

DIGEST = "a" * 64
DOCS = Path(__file__).parents[2] / "docs" / "tensorrt.md"
CUDA = Path(__file__).parents[2] / "artifacts" / "engines" / "ling-2.6-flash-fp8.ling"


class Packed(Held):
    """A package's files, with all its kernels."""

    root = Path("spark.ling")
    manifest = SimpleNamespace(bundle_id="0" * 64)
    engine = "tensorrt"

    def __init__(self) -> None:
        super().__init__()
        self.info["embedded_weights"] = ["layers.0.linear.weight"]
        made = plugins(TARGET, PRECISION)
        self.files |= {f"kernels/{name}.xz": data for name, data in made.kernels.items()}
        self.files |= {f"variants/{TARGET}/{p}.engine": p.encode() for p in self.plan.programs}

    def code(self) -> Any:
        info: Mapping[str, Any] = MappingProxyType(self.info)
        return Code(target=TARGET, engine=self.engine, info=info, files={})

    def names(self, role: str) -> tuple[str, ...]:
        return ("weights/a.safetensors",) if role == "weights" else super().names(role)


@pytest.fixture
def packed() -> Any:
    """Kernels of tests are for no architecture."""
    held = Packed()
    held.change_table(lambda table: table.update(arch="none"))
    return held


def test_all_that_is_needed_is_written(packed: Any, tmp_path: Path) -> None:
    made = deploy(packed, tmp_path / "spark")
    told = json.loads((made / "deploy.json").read_text())
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    plan = packed.plan

    assert {f"engines/{phase}.engine" for phase in plan.programs} <= files
    assert (made / told["phases"]["decode"]["engine"]).read_bytes() == b"decode"
    assert f"plugins/{told['table']}.json" in files
    assert sum(name.endswith(".kernel") for name in files) == len(
        {*plugins(TARGET, PRECISION).table.images}
    )
    assert {f"source/{path.name}" for path in source().iterdir()} <= files
    assert LIBRARY not in files
    decode = told["phases"]["decode"]
    assert decode["inputs"]["token_ids"] == {"dtype": "i32", "shape": ["B"]}
    assert set(decode["updates"].values()) <= set(decode["states"])
    assert decode["sizes"][0].keys() >= {"B", "P"}
    assert "layers.0.linear.weight" not in decode["weights"]
    assert set(decode["weights"]) <= set(told["weights"])
    assert told["weight_files"] == ["weights/a.safetensors"]
    assert told["target"] == TARGET


def test_one_of_several_targets_is_written_by_its_own_name(packed: Any, tmp_path: Path) -> None:
    """They share a plan, which names one of them."""
    packed.plan = replace(packed.plan, target="rtx-89")
    made = deploy(packed, tmp_path / "spark")

    assert json.loads((made / "deploy.json").read_text())["target"] == TARGET


def test_the_command_says_for_which_target_it_wrote(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing else does where a package has several and no GPU is here."""
    packed.plan = replace(packed.plan, target="rtx-89")
    monkeypatch.setattr(engine, "open_package", lambda *_args, **_more: packed)
    assert main(["deploy", "two.ling", "-o", str(tmp_path / "a")]) == 0
    assert re.search(rf"/a  [\d.]+ kB for {TARGET}, plugins as source", capsys.readouterr().out)
    assert main(["deploy", "two.ling", "-o", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == TARGET


def test_what_is_there_is_replaced_only_when_it_was_written_by_this_and_that_is_wanted(
    packed: Any, tmp_path: Path
) -> None:
    made = deploy(packed, tmp_path / "spark")
    with pytest.raises(UsageError, match="exists already"):
        deploy(packed, made)
    deploy(packed, made, overwrite=True)
    (made / LIBRARY).touch()
    deploy(packed, made, overwrite=True)
    (made / "program.cpp").write_text("mine")
    with pytest.raises(UsageError, match="holds other things than what would replace it"):
        deploy(packed, made, overwrite=True)
    (made / "program.cpp").unlink()
    (made / "deploy.json").unlink()
    with pytest.raises(UsageError, match="holds other things than what would replace it"):
        deploy(packed, made, overwrite=True)


def test_every_file_of_the_plugins_has_the_digest_that_it_is_named_by(
    packed: Any, tmp_path: Path
) -> None:
    made = deploy(packed, tmp_path / "spark")
    for path in (made / "plugins").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem, path.name

    packed.change_table(lambda table: table.update(more=1))
    with pytest.raises(IntegrityError, match=r"plugins/[0-9a-f]{12}….json' would have the SHA-256"):
        deploy(packed, tmp_path / "other")
    assert [*tmp_path.iterdir()] == [made]


def test_no_engine_is_written_outside_of_the_folder(packed: Any, tmp_path: Path) -> None:
    packed.info["engines"][str(tmp_path / "up")] = "decode.engine"
    with pytest.raises(IntegrityError, match="is no phase of its plan"):
        deploy(packed, tmp_path / "spark")

    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_nothing(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingExtraError, match=r"'NvInfer\.h' is in none of|there is no g"):
        deploy(packed, tmp_path / "spark", includes=[tmp_path])
    packed.files[f"kernels/{plugins(TARGET, PRECISION).table.kernels[0]}.xz"] = b"other"
    with pytest.raises(IntegrityError, match=r"of the engine (cannot be unpacked|is cut off)"):
        deploy(packed, tmp_path / "spark")
    monkeypatch.setattr(Packed, "engine", "cuda")
    with pytest.raises(IncompatibleError, match="is an engine of kind 'cuda', which has no"):
        deploy(packed, tmp_path / "spark")

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_named_with_the_folder(
    packed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorrt_deploy, "write_bundle", full)
    with pytest.raises(ResourceError, match=r"spark' cannot be written: No space left"):
        deploy(packed, tmp_path / "spark")

    assert list(tmp_path.iterdir()) == []


@has_compiler
@has_headers
def test_plugins_are_compiled_where_headers_are_given(packed: Any, tmp_path: Path) -> None:
    made = deploy(packed, tmp_path / "spark", includes=include_dirs())

    assert (made / LIBRARY).read_bytes().startswith(b"\x7fELF")


def test_the_command_for_people_is_the_one_that_runs() -> None:
    said = DOCS.read_text(encoding="utf-8").replace("\\\n", "")
    (command,) = (line for line in said.splitlines() if line.startswith(COMPILER))
    folder = Path("spark")

    assert tuple(shlex.split(command)) == compilation(
        folder / "source", folder / LIBRARY, [Path("TENSORRT/include"), Path("CUDA/include")]
    )


class Registry:
    """Of a TensorRT that takes libraries, or does not."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return self.answer

    def register_creator(self, _creator: object, _namespace: str) -> bool:
        return not self.loaded


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Of a process that has no plugins yet."""
    monkeypatch.setattr(tensorrt_deploy, "_LOADED", {})
    monkeypatch.setattr(tensorrt_plugin, "_CREATORS", {})
    monkeypatch.setattr(tensorrt_plugin, "_TABLES", {})
    return Registry(object())


@pytest.fixture
def trt(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A TensorRT with that registry; what makes plugins is not looked at."""
    monkeypatch.setattr(tensorrt_plugin, "creator_class", lambda _trt: lambda op: op)
    return SimpleNamespace(
        __name__="tensorrt", __version__="11.4.0", get_plugin_registry=lambda: registry
    )


def deployed(folder: Path, digest: str = DIGEST) -> Path:
    """A folder as `deploy` writes one, as far as loading looks."""
    (folder / "plugins").mkdir(parents=True)
    (folder / LIBRARY).touch()
    (folder / "plugins" / f"{digest}.json").touch()
    return folder


def test_a_library_that_is_not_there_or_not_taken_is_named(
    trt: Any, registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(MissingExtraError, match="the plugins were not compiled"):
        load_plugins(trt, tmp_path, DIGEST)
    registry.answer = None
    with pytest.raises(IncompatibleError, match=r"TensorRT 11\.4\.0 does not load"):
        load_plugins(trt, deployed(tmp_path / "a"), DIGEST)
    registry.answer = object()
    load_plugins(trt, tmp_path / "a", DIGEST)  # what failed is not taken for loaded
    assert registry.loaded == [str(tmp_path / "a" / LIBRARY)] * 2


def test_a_folder_without_a_name_is_not_looked_for_among_the_systems(
    trt: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deployed(tmp_path / "a"))
    load_plugins(trt, Path(), DIGEST)
    assert registry.loaded == [str(tmp_path / "a" / LIBRARY)]


def test_plugins_of_another_package_are_named_before_they_are_loaded(
    trt: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = deployed(tmp_path / "a", "b" * 64)
    with pytest.raises(IncompatibleError, match="launch from table aaaaaaaaaaaa…, which is not in"):
        load_plugins(trt, made, DIGEST)
    assert not registry.loaded

    other = tmp_path / "other"
    other.mkdir()
    (other / f"{DIGEST}.json").touch()
    monkeypatch.setenv("LINGC_PLUGINS", f"{tmp_path}:{other}")
    load_plugins(trt, made, DIGEST)
    assert registry.loaded


def test_a_process_loads_one_library_once_and_is_told_where_it_would_need_another(
    trt: Any, registry: Registry, tmp_path: Path
) -> None:
    """TensorRT answers a second library, and the same again, by taking none."""
    made, other = deployed(tmp_path / "a"), deployed(tmp_path / "b", "b" * 64)
    load_plugins(trt, made, DIGEST)
    registry.answer = None

    load_plugins(trt, made, DIGEST)
    load_plugins(trt, deployed(tmp_path / "again"), DIGEST)
    with pytest.raises(
        IncompatibleError, match="has loaded C\\+\\+ plugins before, without"
    ) as told:
        load_plugins(trt, other, "b" * 64)
    assert "LINGC_PLUGINS" in str(told.value.hint)
    assert registry.loaded == [str(made / LIBRARY)]


def test_one_library_serves_all_packages_that_are_named_before_it_is_loaded(
    trt: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = deployed(tmp_path / "a"), deployed(tmp_path / "b", "b" * 64)
    monkeypatch.setenv("LINGC_PLUGINS", f"{made / 'plugins'}:{other / 'plugins'}")
    load_plugins(trt, made, DIGEST)
    load_plugins(trt, other, "b" * 64)

    assert registry.loaded == [str(made / LIBRARY)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"table": None}, "plugin 'layer' has no field 'table'"),
        ({"call": None}, "plugin 'layer' has no field 'call'"),
        ({"table": "b" * 64}, "plugin 'layer' launches from table bbbbbbbbbbbb…, which was not"),
        ({"call": -1}, "plugin 'layer' is call -1 of table aaaaaaaaaaaa…, which is none of 'Ling"),
        ({"call": 9999}, "plugin 'layer' is call 9999 of table aaaaaaaaaaaa…, which is none of"),
        ({"call": 0}, "plugin 'layer' is call 0 of table aaaaaaaaaaaa…, which is none of"),
    ],
)
def test_what_an_engine_serialized_otherwise_is_named(
    change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that is missing, and a call that is not there or another op's."""
    monkeypatch.setattr(tensorrt_plugin, "_TABLES", {})
    monkeypatch.setattr(tensorrt_plugin, "_CREATORS", {})
    table, recording = plugins(TARGET, PRECISION).table, Recording(load("11.4.0.106"))
    register(recording, Launcher(table=table, digest=DIGEST))
    number = next(n for n, one in enumerate(table.calls) if one.op != table.calls[0].op)
    creator = tensorrt_plugin._CREATORS["tensorrt", table.calls[number].op]

    def made(fields: dict[str, Any]) -> Any:
        raw = {
            name: np.frombuffer(value.encode(), np.int8) if name == "table" else np.array([value])
            for name, value in fields.items()
            if value is not None
        }
        given = [SimpleNamespace(name=name, data=data) for name, data in raw.items()]
        return creator.create_plugin("layer", given, None)

    assert made({"table": DIGEST, "call": number}).number == number
    with pytest.raises(IncompatibleError, match=told):
        made({"table": DIGEST, "call": number, **change})


def test_plugins_of_python_and_of_the_library_do_not_meet_in_one_process(
    trt: Any, registry: Registry, tmp_path: Path
) -> None:
    launcher = Launcher(table=plugins(TARGET, PRECISION).table, digest=DIGEST)
    register(trt, launcher)
    with pytest.raises(IncompatibleError, match="this process has Python's plugins"):
        load_plugins(trt, deployed(tmp_path / "a"), DIGEST)
    assert not registry.loaded

    tensorrt_plugin._CREATORS.clear()
    load_plugins(trt, tmp_path / "a", DIGEST)
    with pytest.raises(
        IncompatibleError, match=r"TensorRT has a plugin 'Ling.*' of another library"
    ):
        register(trt, launcher)
    assert not tensorrt_plugin._CREATORS


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["nowhere.ling", "-o", "out"], 3, "'nowhere.ling' is not a package"),
        (
            [str(CUDA), "-o", "out"],
            4,
            "is an engine of kind 'cuda', which has no plugins to deploy",
        ),
        ([str(CUDA)], 2, "Missing option '-o'"),
        ([str(CUDA), "-o", "out", "--include", "nowhere"], 2, "'nowhere' does not exist"),
        ([str(CUDA), "-o", "out", "--target", "spark"], 2, "has no code for 'spark'"),
    ],
)
def test_the_command_says_what_is_wrong_and_leaves_nothing(
    words: list[str], code: int, problem: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    assert main(["deploy", *words]) == code
    assert problem.lower() in capsys.readouterr().err.lower()
    assert list(tmp_path.iterdir()) == []
