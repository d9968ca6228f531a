"""The C++ plugins compiled against TensorRT's headers: what TensorRT is given, builds and runs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingc.errors import MissingExtraError, StageError
from lingc.plan import dumps
from lingc.runtime.tensorrt_deploy import COMPILER, compile_plugins, source
from lingc.runtime.tensorrt_plugin import plugin_name, timing_id
from tests.tensorrt.engines import has_rtx, plan
from tests.tensorrt.native_code import (
    SOURCES,
    Evaluator,
    bundle,
    expected,
    has_compiler,
    has_headers,
    include_dirs,
    of_tiny,
    small_table,
)
from tests.tensorrt.test_native_code import request

ROOT = Path(__file__).parents[2]
TARGET, PRECISION = "spark", "int4-all"
READER = "readelf"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plugins") / "libling_plugins.so"
    compile_plugins(source(), made, include_dirs())
    return made


@has_compiler
@has_headers
def test_it_needs_the_standard_library_alone_and_offers_what_tensorrt_asks_for(
    library: Path,
) -> None:
    listed = subprocess.run(
        (READER, "-dW", "--dyn-syms", str(library)), capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", listed))
    offered = set(re.findall(r" FUNC +GLOBAL +DEFAULT +\d+ (\w+)$", listed, re.MULTILINE))

    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2"}
    assert offered == {"setLoggerFinder", "getCreators"}


@pytest.fixture(scope="module")
def harness(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    headers = [word for one in include_dirs() for word in ("-isystem", str(one))]
    for words in (
        ("-shared", "-fPIC", str(SOURCES / "libcuda.cpp"), "-o", str(folder / "libcuda.so.1")),
        (*headers, str(SOURCES / "harness.cpp"), "-o", str(folder / "harness"), "-ldl"),
    ):
        subprocess.run((COMPILER, "-std=c++17", *words), check=True)
    assert library.is_file()
    return folder / "harness"


def asked(table: Any, number: int, sizes: tuple[int, ...], digest: str, **more: Any) -> Any:
    given = {"phase": 1, "field": "call", "op": plugin_name(table.calls[number].op), **more}
    return {**request(table, number, sizes, digest), **given}


@has_compiler
@has_headers
def test_a_plugin_puts_on_the_stream_what_pythons_does(
    library: Path, harness: Path, tmp_path: Path
) -> None:
    table, binaries = of_tiny(TARGET, PRECISION)
    digest = bundle(tmp_path, table, binaries)
    plugins = Evaluator(harness, library, LINGC_PLUGINS=str(tmp_path))
    for number, call in enumerate(table.calls):
        given = asked(table, number, next(iter(call.choices)), digest)
        got = [one for one in plugins(**given) if "load" not in one and "attribute" not in one]
        assert got == expected(table, binaries, given), call.op
    plugins.close()


@has_compiler
@has_headers
def test_what_is_wrong_is_told_to_tensorrts_log_and_building_launches_nothing(
    library: Path, harness: Path, tmp_path: Path
) -> None:
    table, binaries = small_table()
    digest = bundle(tmp_path, table, binaries)
    plugins = Evaluator(harness, library, LINGC_PLUGINS=str(tmp_path))

    def told(**more: Any) -> str:
        return str(plugins(**{**asked(table, 0, (4, 64), digest), **more})[-1].get("error"))

    assert re.search(
        r"failed: lingc: plugin 'layer' \(op\): there are no launches for sizes 10x64",
        told(shapes=[[5, 64], [3], [9, 3]]),
    )
    assert re.search(
        r"no plugin: lingc: plugin 'layer' \(op\): plugin table f{64}.json: it is not in",
        told(table="f" * 64),
    )
    assert "has no call 7" in told(call=7)
    assert "its field 'call' is missing" in told(field="number")
    assert "no creator" in told(op="LingOther")
    built = plugins(**asked(table, 0, (5, 64), digest, phase=0))
    assert built == [{"workspace": 1024, "timing": timing_id(table, table.calls[0])}]
    plugins.close()


@has_compiler
@has_headers
@has_rtx
def test_an_engine_built_by_them_has_the_layers_of_pythons(library: Path, tmp_path: Path) -> None:
    given = {
        "plan": dumps(plan(TARGET, PRECISION)), "phase": "decode", "library": str(library),
        "folder": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        (sys.executable, "-m", "tests.tensorrt.native_build"),
        input=json.dumps(given), capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)

    assert found["native"]["faults"] == []
    assert found["native"]["layers"] == found["python"]["layers"]
    assert found["native"]["bytes"] == found["python"]["bytes"]
    assert sum(bool(op) for _, op, *_ in found["native"]["layers"]) > 20


def test_headers_and_a_compiler_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda _name: None)
        with pytest.raises(MissingExtraError, match=r"there is no g\+\+ here"):
            compile_plugins(source(), tmp_path / "lib.so", [tmp_path])
    monkeypatch.setattr(shutil, "which", lambda _name: "false")
    with pytest.raises(MissingExtraError, match=r"'NvInfer.h' is in none of the folders"):
        compile_plugins(source(), tmp_path / "lib.so", [tmp_path])
    for name in ("NvInfer.h", "cuda_runtime_api.h"):
        (tmp_path / name).touch()
    with pytest.raises(StageError, match=r"g\+\+ does not compile the plugins"):
        compile_plugins(source(), tmp_path / "lib.so", [tmp_path])
