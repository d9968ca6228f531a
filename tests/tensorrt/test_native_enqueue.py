"""The C++ plugins' launches on a GPU: real kernels on real memory compute what references do.

As `test_enqueue` does it with Python's plugins, which are the reference for how plugins are called.
"""

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lingc import targets
from lingc.cli.failure import cache_dir
from lingc.device import Binary
from lingc.errors import LingcError
from lingc.kernel import Kernel
from lingc.runtime.tensorrt_deploy import COMPILER, write_bundle
from lingc.targets.cuda.binaries import compile_all
from lingc.targets.tensorrt import lower
from tests.tensorrt.engines import plan
from tests.tensorrt.native_code import SOURCES, bundle, has_compiler, shapes_of, small_table
from tests.tensorrt.test_enqueue import TARGET, difference, run


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = tmp_path_factory.mktemp("native") / "launch.so"
    words = ("-std=c++17", "-O1", "-shared", "-fPIC", str(SOURCES / "launch.cpp"), "-ldl")
    subprocess.run((COMPILER, *words, "-o", str(made)), check=True)
    found = ctypes.CDLL(str(made))
    found.launch.restype = ctypes.c_char_p
    return found


class NativePlugin:
    """A call of a table as a plugin object, launched by the C++ sources."""

    def __init__(
        self, library: ctypes.CDLL, folder: Path, tabled: lower.Tabled, number: int
    ) -> None:
        self._library, self._folder, self._tabled, self._number = library, folder, tabled, number
        self.call = tabled.table.calls[number]

    def get_workspace_size(self, _inputs: Any, _outputs: Any) -> int:
        return self._tabled.table.workspace_bytes(self.call)

    def enqueue(
        self, input_desc: Sequence[Any], _output_desc: Any, inputs: Sequence[int],
        outputs: Sequence[int], workspace: int, stream: Any,
    ) -> None:  # fmt: skip
        told = launched(
            self._library, self._folder, self._tabled.digest, self._number,
            [one.dims for one in input_desc], inputs, outputs, workspace, int(stream),
        )  # fmt: skip
        if told:
            raise LingcError(told)


def launched(  # noqa: PLR0913, PLR0917 (as C takes them)
    library: ctypes.CDLL, folder: Path, digest: str, number: int, shapes: Sequence[Sequence[int]],
    inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int,
) -> str:  # fmt: skip
    """What is wrong with a launch, or nothing."""
    sizes = [size for shape in shapes for size in shape]
    told = library.launch(
        str(folder).encode(),
        digest.encode(),
        ctypes.c_int64(number),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_void_p * len(inputs))(*inputs),
        (ctypes.c_void_p * len(outputs))(*outputs),
        ctypes.c_void_p(workspace),
        ctypes.c_void_p(stream),
    )
    return str(told.decode())


@has_compiler
def test_where_it_cannot_launch_it_says_why(library: ctypes.CDLL, tmp_path: Path) -> None:
    table, binaries = small_table()
    digest = bundle(tmp_path, table, binaries)
    shapes = shapes_of(table.calls[0], (5, 64), 3)

    told = launched(library, tmp_path, digest, 0, shapes, [1, 2, 3], [4, 5], 6, 7)
    assert "there are no launches for sizes" in told


@pytest.mark.gpu
@has_compiler
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4-all"])
def test_every_plugin_computes_what_its_reference_does(
    precision: str, library: ctypes.CDLL, tmp_path: Path
) -> None:
    from lingc.device import Device  # noqa: PLC0415

    made, target = plan(TARGET, precision), targets.get(TARGET)
    binaries: dict[Kernel, Binary] = {}

    def compiled(wanted: tuple[Kernel, ...]) -> Mapping[Kernel, Binary]:
        binaries.update(compile_all(wanted, target.arch, cache_dir() or tmp_path))
        return binaries

    tabled = lower.tabled(made, target, compiled)
    kernels = list(binaries)
    write_bundle(tmp_path, tabled.table, tabled.digest, lambda n: binaries[kernels[n]])
    device, ran = Device(), set()
    for phase_name, steps in run(made, precision).items():
        phase = phase_name.partition(" ")[2]
        for (one, given), number in zip(steps, tabled.numbers[phase], strict=True):
            if number is None:
                continue
            plugin = NativePlugin(library, tmp_path, tabled, number)
            for in_place in (False, True):
                problem = difference(plugin, given, device, in_place=in_place)
                assert problem is None, f"{phase_name}: {one.outputs[0]}: {problem}"
            ran.add(plugin.call.op)
    device.close()

    assert ran == {call.op for call in tabled.table.calls}
