"""The standard flavour, which cannot be built here: it uses what its published bindings have.

The lowering and the runtime run from end to end on a recorder that has the members and signatures
of 10.16.1 and of 11.4.0, and nothing else.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc import targets
from lingc.launch_table import Bucket
from lingc.runtime import tensorrt_deploy, tensorrt_plugin
from lingc.runtime.backend import Limits
from lingc.runtime.tensorrt_backend import TensorrtBackend
from lingc.runtime.tensorrt_deploy import LIBRARY, PLUGINS
from lingc.runtime.tensorrt_package import TensorrtCode
from lingc.runtime.tensorrt_plugin import Launcher, OpPlugin, plugin_class
from lingc.targets.spec import Target
from lingc.targets.tensorrt.backend import StandardBackend
from lingc.targets.tensorrt.lower import Lowering
from lingc.targets.tensorrt.profile import sizes
from tests.runtime.host_device import HostDevice
from tests.tensorrt.engines import plan, plugins, weights
from tests.tensorrt.recording import Recording
from tests.tensorrt.surface import load

VERSIONS = ("10.16.1.11", "11.4.0.106")
TARGET = "h20"


def lowered(
    version: str, precision: str, kind: type[StandardBackend] = StandardBackend, **surface: Any
) -> tuple[Recording, dict[str, Any]]:
    """Every phase lowered and built, as far as a recorder builds."""
    recording = Recording({**load(version), **surface})
    made = Lowering(
        kind(recording),
        plan(TARGET, precision),
        targets.get(TARGET),
        plugins(TARGET, precision),
        weights=weights(TARGET, precision),
        aliased=True,
    )
    networks = {phase: made.network(phase) for phase in made.plan.programs}
    for network in networks.values():
        assert made.engine(network) == b"IHostMemory"
    return recording, networks


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp8-static", "int4-all"])
def test_lowering_uses_what_a_version_has(version: str, precision: str) -> None:
    recording, networks = lowered(version, precision)
    found = plugins(TARGET, precision).numbers
    called = sum(number is not None for numbers in found.values() for number in numbers)

    assert recording.calls.count("add_plugin_v3") == called
    assert {*networks} == {"prefill", "decode", "verify", "draft"}
    assert "IBuilderConfig.hardware_compatibility_level" in recording.used
    assert "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY" in recording.used


def _without(version: str, kind: str, member: str) -> dict[str, Any]:
    classes = load(version)["classes"]
    members = {name: one for name, one in classes[kind].items() if name != member}
    return {"classes": {**classes, kind: members}}


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("INetworkDefinition", "add_plugin_v3"),
        ("INetworkDefinition", "add_gather_v2"),
        ("ITensor", "set_dimension_name"),
        ("IPluginRegistry", "register_creator"),
        ("IOptimizationProfile", "set_shape"),
        ("ILayer", "metadata"),
        ("IGatherLayer", "axis"),
    ],
)
def test_a_member_that_were_missing_is_named(kind: str, member: str) -> None:
    from lingc.runtime import tensorrt_plugin  # noqa: PLC0415

    known: Mapping[Any, Any] = dict(tensorrt_plugin._CREATORS)
    tensorrt_plugin._CREATORS.clear()
    surface = _without(VERSIONS[1], kind, member)
    if kind == "ILayer":
        layers = {
            name: {n: m for n, m in members.items() if n != member}
            for name, members in surface["classes"].items()
            if name.startswith("I") and name.endswith("Layer")
        }
        surface["classes"] |= layers
    try:
        with pytest.raises(AttributeError, match=f"has no '{member}'"):
            lowered(VERSIONS[1], "bf16", **surface)
    finally:
        tensorrt_plugin._CREATORS.clear()
        tensorrt_plugin._CREATORS.update(known)


class Weakly(StandardBackend):
    """Asks for precisions by flags, which version 11 has no more."""

    __slots__ = ()

    def _aim(self, config: Any, target: Target) -> None:
        config.set_flag(self.trt.BuilderFlag.FP16)
        StandardBackend._aim(self, config, target)


class OldPlugins(StandardBackend):
    """Asks the registry by a method that version 11 has no more."""

    __slots__ = ()

    def builder(self) -> Any:
        self.trt.get_plugin_registry().get_plugin_creator("LingRouter", "1", "lingc")
        return StandardBackend.builder(self)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Weakly, "BuilderFlag of TensorRT 11.4.0.106 has no 'FP16'"),
        (OldPlugins, "IPluginRegistry of TensorRT 11.4.0.106 has no 'get_plugin_creator'"),
    ],
)
def test_what_version_11_removed_is_named_and_version_10_has(
    kind: type[StandardBackend], told: str
) -> None:
    lowered(VERSIONS[0], "bf16", kind)
    with pytest.raises(AttributeError, match=told):
        lowered(VERSIONS[1], "bf16", kind)


def test_arguments_are_counted() -> None:
    network = Recording(load(VERSIONS[1])).Builder(None).create_network(0)
    with pytest.raises(TypeError, match=r"add_dequantize .* takes \(input, scale, output_type\)"):
        network.add_dequantize(1, 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("is_native", [False, True])
def test_the_runtime_uses_what_a_version_has(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_native: bool
) -> None:
    monkeypatch.setattr(tensorrt_plugin, "_CREATORS", {})
    monkeypatch.setattr(tensorrt_deploy, "_LOADED", {})
    (tmp_path / LIBRARY).touch()
    recording, made = Recording(load(version)), plan(TARGET, "bf16")
    table = plugins(TARGET, "bf16")
    (tmp_path / PLUGINS).mkdir()
    (tmp_path / PLUGINS / f"{table.digest}.json").touch()
    none: Callable[[int], Any] = lambda _index: None  # noqa: E731
    code = TensorrtCode(
        plan=made,
        module="tensorrt",
        version=version,
        table=table.table,
        digest=table.digest,
        engines={phase: phase.encode for phase in made.programs},
        buckets=tuple(
            Bucket(
                phase=one.phase, sizes=one.axes, tactics=(), offsets=(), scratch=(), arena_bytes=0
            )
            for one in sizes(made)
        ),
        kernel=none,
    )
    backend = TensorrtBackend(
        code, weights(TARGET, "bf16"), Limits(slots=1, pages=1), threads=1, device=HostDevice(),
        plugins=tmp_path if is_native else None, trt=recording,
    )  # fmt: skip
    inputs = {
        "token_ids": [1], "positions": [0], "offsets": [0, 1], "slots": [0], "accepted": [0],
        "cache_rows": [0], "page_table": [[0]],
    }  # fmt: skip
    backend.run("decode", {n: np.array(v, np.int32) for n, v in inputs.items()})
    backend.close()

    assert recording.used >= {
        "Runtime.engine_host_code_allowed", "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_execution_context", "IExecutionContext.execute_async_v3",
    }  # fmt: skip
    # One makes the plugins, and the other does not.
    assert ("IPluginRegistry.load_library" in recording.used) == is_native
    assert ("IPluginRegistry.register_creator" in recording.used) == (not is_native)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_plugin_says_of_itself_is_what_tensorrt_asks_for(version: str) -> None:
    classes, table = load(version)["classes"], plugins(TARGET, "bf16")
    asked = set().union(*(classes[f"IPluginV3{part}"] for part in PARTS))
    kind = plugin_class(Recording(load(version)))
    made = kind(Launcher(table=table.table, digest=table.digest), 0)
    own = {"trt", "launcher", "number", "call", "held"}
    said = {name for name in (*vars(OpPlugin), *vars(made)) if not name.startswith("_")} - own

    assert said <= asked
    assert "timing_cache_id" in said
    assert made.clone().timing_cache_id == made.timing_cache_id


PARTS = ("", "OneCore", "OneBuildV2", "OneRuntime")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_surface_says_what_it_was_made_of(version: str) -> None:
    found = load(version)

    assert found["version"] == version
    assert found["classes"]["INetworkDefinition"]["add_plugin_v3"]


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_a_surface_is_that_of_the_published_bindings(version: str, tmp_path: Path) -> None:
    """Needs a package index, from which everything else was installed, and a C compiler."""
    wheel, stubs, compiler = tmp_path / "wheel", tmp_path / "stubs", shutil.which("cc")
    assert compiler is not None
    got = subprocess.run(
        (
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(wheel),
            f"tensorrt-cu13-bindings=={version}",
        ),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr[-200:]
    stubs.mkdir()
    (stubs / "stub.c").write_text(STUB, encoding="utf-8")
    major = version.partition(".")[0]
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        soname = f"lib{name}.so.{major}"
        made = subprocess.run(
            (
                compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", stubs / soname,
                stubs / "stub.c",
            ),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    root = Path(__file__).parents[2]
    read = subprocess.run(
        (sys.executable, "-m", "tests.tensorrt.surface"),
        env={"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": f"{wheel}:{root}"},
        capture_output=True, text=True, check=True, cwd=root,
    )  # fmt: skip

    assert read.stdout == (Path(__file__).parent / "surfaces" / f"{version}.json").read_text(
        encoding="utf-8"
    )


STUB = """
#define S(n) void* n(void){return 0;}
S(createInferBuilder_INTERNAL) S(createInferRefitter_INTERNAL) S(createInferRuntime_INTERNAL)
S(createNvOnnxParserRefitter_INTERNAL) S(createNvOnnxParser_INTERNAL) S(getBuilderPluginRegistry)
S(getPluginRegistry) S(initLibNvInferPlugins)
int getNvOnnxParserVersion(void){return 0;}
"""
