"""The C++ plugins in tests: compiled, run without a GPU, and what they should put on a stream.

`libcuda.so.1` of tests is a driver that writes down what it is told; kernels are texts that name
themselves and their parameters, for that driver to tell.
"""

import hashlib
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lingc import plugin_table
from lingc.device import Binary, _c_types
from lingc.engine import canonical
from lingc.launch_table import Counted, Place, TableLaunch, TableTactic
from lingc.plugin_table import Axis, Call, Output, PluginTable
from lingc.runtime.tensorrt_deploy import COMPILER, write_bundle
from lingc.runtime.tensorrt_plugin import Launcher, timing_id
from tests.tensorrt.engines import plugins

SOURCES = Path(__file__).parent / "cpp"
STREAM = 0x5000

has_compiler = pytest.mark.skipif(
    shutil.which(COMPILER) is None, reason=f"the C++ plugins need {COMPILER}: apt install g++"
)


def include_dirs() -> list[Path]:
    """Where headers of TensorRT and CUDA are: `TENSORRT_INCLUDE`, by colons, or usual places."""
    given = os.environ.get("TENSORRT_INCLUDE", "").split(os.pathsep)
    usual = (
        "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu",
        "/usr/local/tensorrt/include", "/usr/local/cuda/include",
    )  # fmt: skip
    return [Path(one) for one in (*given, *usual) if one and Path(one).is_dir()]


has_headers = pytest.mark.skipif(
    not all(
        any((folder / name).is_file() for folder in include_dirs())
        for name in ("NvInfer.h", "cuda_runtime_api.h")
    ),
    reason="the C++ plugins are not compiled: TENSORRT_INCLUDE names no headers of TensorRT and "
    "CUDA, by a colon",
)


def compiled(folder: Path) -> Path:
    """The evaluator; the driver of tests lies beside it."""
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
    library, program = folder / "libcuda.so.1", folder / "evaluate"
    for words in (
        ("-shared", "-fPIC", SOURCES / "libcuda.cpp", "-o", library),
        (SOURCES / "evaluate.cpp", "-o", program, "-ldl"),
    ):
        done = subprocess.run((COMPILER, *flags, *words), capture_output=True, text=True)  # noqa: PLW1510
        assert done.returncode == 0, done.stderr[-2000:]
    return program


class Evaluator:
    """The evaluator as a process: calls in, what reached its driver out."""

    def __init__(self, program: Path, bundle: Path, **variables: str) -> None:
        self._process = subprocess.Popen(
            (str(program), str(bundle)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(program.parent), **variables},
        )

    def __call__(self, **given: Any) -> list[dict[str, Any]]:
        """What the driver was told, and the error at the end if there is one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(given) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = []
        for line in self._process.stdout:
            told = json.loads(line)
            if "end" in told:
                return found
            found.append(told)
            if "error" in told:
                return found
        raise AssertionError(f"the evaluator ended: {self._process.wait()}")

    def close(self) -> None:
        with self._process:  # closes both pipes, and waits
            pass
        assert self._process.returncode == 0


LETTERS = {"i32": "i", "i64": "l", "f32": "f"}


def named(binary: Binary, number: int) -> Binary:
    """A kernel whose code is its name and its parameters, for the driver of tests."""
    kinds = "".join(
        "p" if kind.startswith("*") else LETTERS[kind.partition(":")[0]]
        for _, kind in binary.arguments
    )
    # Hidden pointers and shared memory as some kernels have them.
    hidden, shared = number % 3, 1024 * (number % 100)
    code = f"k{number}:{kinds}{'p' * hidden}\0".encode()
    return replace(binary, code=code, hidden=hidden, shared_bytes=shared, arch="test")


def at_hand(table: PluginTable, binaries: Sequence[Binary]) -> tuple[PluginTable, str]:
    """The table with those kernels, and its digest."""
    images = tuple(hashlib.sha256(one.to_bytes()).hexdigest() for one in binaries)
    made = replace(table, arch="test", images=images)
    return made, hashlib.sha256(canonical.encode(plugin_table.to_value(made))).hexdigest()


@cache
def of_tiny(target: str, precision: str) -> tuple[PluginTable, tuple[Binary, ...]]:
    """The table of the shipped checkpoint's engines, with kernels that name themselves."""
    tabled = plugins(target, precision)
    binaries = tuple(
        named(Binary.from_bytes(lzma.decompress(tabled.kernels[digest])), number)
        for number, digest in enumerate(tabled.table.kernels)
    )
    return at_hand(tabled.table, binaries)[0], binaries


def bundle(folder: Path, table: PluginTable, binaries: Sequence[Binary]) -> str:
    """Write them; the table's digest."""
    digest = at_hand(table, binaries)[1]
    write_bundle(folder, table, digest, lambda number: binaries[number])
    return digest


class Told:
    """A device that writes down what it is told, as the driver of tests does."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.told: list[dict[str, Any]] = []

    def copy(self, address: int, source: int, size: int) -> None:
        self.told.append({"copy": [address, source, size], "stream": self.stream})

    def clear(self, address: int, size: int) -> None:
        if size:
            self.told.append({"clear": [address, size, 0], "stream": self.stream})

    def put(self, binary: Binary, values: Sequence[Any], **more: Any) -> None:
        types = _c_types(binary)
        bits = [
            int.from_bytes(bytes(kind(value)), "little")
            for kind, value in zip(types, (*values, *[0] * binary.hidden), strict=True)
        ]
        self.told.append(
            {
                "launch": binary.code.partition(b":")[0].decode(),
                "grid": list(more["grid"]),
                "block": [binary.threads, 1, 1],
                "shared": binary.shared_bytes,
                "cluster": list(more["cluster"]),
                "dependent": int(more["dependent"]),
                "stream": self.stream,
                "values": bits,
            }
        )


def expected(table: PluginTable, binaries: Sequence[Binary], given: dict[str, Any]) -> list[Any]:
    """What Python's plugin puts on a stream for a call of the evaluator."""
    device: Any = Told()
    launcher = Launcher(table=table, digest="", kernel=lambda n: binaries[n], device=device)
    call = table.calls[given["call"]]
    launcher.run(
        call, given["shapes"], given["inputs"], given["outputs"], given["places"][0], STREAM
    )
    first = {"workspace": table.workspace_bytes(call), "timing": timing_id(table, call)}
    return [first, *device.told]


def shapes_of(call: Call, sizes: Sequence[int], other: int) -> list[list[int]]:
    """Shapes of inputs of which the tactic is chosen by those sizes; any size else is `other`."""
    made = [[other] * rank for _, _, rank in call.inputs]
    for axis, size in zip(call.axes, sizes, strict=True):
        made[axis.input][axis.axis] = size
    return made


def small_table() -> tuple[PluginTable, tuple[Binary, ...]]:
    """What the shipped checkpoint's table has none of: clusters, counters, sizes taken twice."""
    binary = Binary(
        name="0" * 64, arch="test", code=b"", entry="kernel", hidden=0, threads=128,
        shared_bytes=0,
        arguments=(("x", "*bf16"), ("n", "i32:16"), ("m", "i64"), ("e", "f32"), ("w", "*f32"),
                   ("c", "*i32"), ("none", "*u8"), ("y", "*bf16")),
    )  # fmt: skip
    binaries = (named(binary, 50), named(replace(binary, entry="other"), 7))
    operands = (
        Place("x", 32), Counted(3, -2, 7), 1 << 40, 1e-6, Place("w", 256), Place("counter"),
        None, Place("y"),
    )  # fmt: skip
    launches = (
        TableLaunch(kernel=0, grid=(5, 2, 1), cluster=(2, 1, 1), dependent=True, operands=operands),
        TableLaunch(kernel=1, grid=(9, 1, 3), dependent=True, operands=operands),
        TableLaunch(kernel=1, grid=(1, 1, 1), operands=(*operands[:3], 3, *operands[4:])),
    )
    tactic = TableTactic(
        op="op", key="", tactic="t", origin="model", microseconds=1.5, moved_bytes=1e9, flops=0,
        launches=launches, workspaces=(("v", 100), ("w", 300)), counters=(("counter", 12),),
    )  # fmt: skip
    call = Call(
        op="op", key="", literals={"eps": 1e-6, "name": 'é"\\', "none": None, "is": True},
        inputs=(("x", "bf16", 2), ("y", "bf16", 1), ("rows", "f32", 2)),
        outputs=(
            Output(name="y", dtype="bf16", shape=(Axis(0, 0, 2), 64), place=1),
            Output(name="z", dtype="f8e4m3", shape=(Axis(0, 0),)),
        ),
        axes=(Axis(0, 0, 2), Axis(0, 1)), choices={(8, 64): 0, (16, 64): 0},
        slots=Axis(1, 0), rows=Axis(2, 0),
    )  # fmt: skip
    table = PluginTable(
        target="spark", arch="test", page_size=16, kernels=("a" * 64, "b" * 64), images=(),
        tactics=(tactic,), calls=(call,),
    )  # fmt: skip
    return at_hand(table, binaries)[0], binaries
