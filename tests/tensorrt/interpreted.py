"""Plugins called without a GPU: `enqueue` over host memory, kernels in Triton's interpreter.

Run as a program, as the interpreter is chosen when Triton is imported: reads a precision and the
name of a step in the script of `test_enqueue` as JSON, calls the first plugin of each op of that
step once, and writes what was wrong with each, or null. Kernels in CUDA C++ are passed over, and
named.
"""

import ctypes
import importlib
import json
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lingc import targets
from lingc.bench.kernels import problem_of
from lingc.device import Binary
from lingc.kernel import Kernel, align
from lingc.op import OPS, TORCH_DTYPE
from lingc.plugin_table import shape_of
from lingc.runtime.tensorrt_plugin import Launcher, OpPlugin
from lingc.targets.tensorrt import lower
from tests.kernels.interpreter import exact_rounding
from tests.runtime.host_device import HostDevice
from tests.tensorrt import test_enqueue
from tests.tensorrt.engines import plan, stand_ins

POINTER = {
    "*bf16": torch.bfloat16, "*f32": torch.float32, "*f8e4m3": torch.float8_e4m3fn,
    "*i32": torch.int32, "*u8": torch.uint8,
}  # fmt: skip


class InterpretedDevice(HostDevice):
    """Runs a launch at once, over tensors that lie at its addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Kernel] = {}
        self.extents: dict[int, int] = {}

    def copy(self, address: int, source: int, size: int) -> None:
        ctypes.memmove(address, source, size)

    def clear(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def put(self, binary: Binary, values: Sequence[Any], *, grid: Any, **_more: Any) -> None:
        kernel = self.kernels[binary.name]
        module, name = kernel.source.split(":")
        function = getattr(importlib.import_module(module), name)
        # The interpreter has no product of bf16 numbers; kernels that multiply some widen them.
        constants = {key: 1 if key == "WIDE" else value for key, value in kernel.constants}
        operands = [
            self._tensor(value, kind) if kind.startswith("*") else value
            for value, (_, kind) in zip(values, kernel.arguments, strict=True)
        ]
        function[grid](*operands, **constants)

    def _tensor(self, address: int, kind: str) -> torch.Tensor | None:
        if address == 0:
            return None
        start = max(one for one in self.extents if one <= address)
        size = start + self.extents[start] - address
        assert size > 0, f"{address:#x} is nobody's"
        raw = (ctypes.c_uint8 * size).from_address(address)
        return torch.from_numpy(np.ctypeslib.as_array(raw)).view(POINTER[kind])


def problem(plugin: OpPlugin, given: list[Any], device: InterpretedDevice) -> str | None:
    """What is wrong with a plugin's results, or None."""
    op, call, table = OPS[plugin.call.op], plugin.call, plugin.launcher.table
    tensors = [value.contiguous() for value in given if isinstance(value, torch.Tensor)]
    shapes = [tuple(value.shape) for value in tensors]
    results = []
    for output in call.outputs:
        shape, dtype = shape_of(output, shapes), TORCH_DTYPE[output.dtype]
        raw = torch.full((int(np.prod(shape)) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
        results.append(raw.view(dtype).reshape(shape))
    workspace = torch.full((plugin.get_workspace_size(None, None),), 0xFF, dtype=torch.uint8)
    for value in (*tensors, *results):
        device.extents[value.data_ptr()] = value.numel() * value.itemsize
    at, tactic = workspace.data_ptr(), table.tactic(call, shapes)
    for _, size in (*tactic.workspaces, *tactic.counters):
        device.extents[at] = size
        at += align(size)
    plugin.enqueue(
        [SimpleNamespace(dims=shape) for shape in shapes],
        [SimpleNamespace(dims=tuple(value.shape)) for value in results],
        [value.data_ptr() for value in tensors],
        [value.data_ptr() for value in results],
        workspace.data_ptr(),
        device.stream,
    )
    return problem_of(op, given, results, similar=0.0)


def main() -> None:
    exact_rounding()
    precision, wanted = json.load(sys.stdin)
    target = test_enqueue.TARGET
    made = plan(target, precision)
    binaries: dict[Kernel, Binary] = {}

    def named(kernels: Any) -> dict[Kernel, Binary]:
        binaries.update(stand_ins(kernels))
        return binaries

    table = lower.tabled(made, targets.get(target), named)
    kernels, device = list(binaries), InterpretedDevice()
    device.kernels = {binary.name: kernel for kernel, binary in binaries.items()}
    launcher = Launcher(
        table=table.table, digest=table.digest, device=device,
        kernel=lambda index: binaries[kernels[index]],
    )  # fmt: skip
    phase, seen = wanted.partition(" ")[2], set()
    steps = test_enqueue.run(made, precision)[wanted]
    for (_, given), number in zip(steps, table.numbers[phase], strict=True):
        if number is None or (plugin := OpPlugin(launcher, number)).call.op in seen:
            continue
        seen.add(plugin.call.op)
        shapes = [tuple(value.shape) for value in given if isinstance(value, torch.Tensor)]
        launches = table.table.tactic(plugin.call, shapes).launches
        languages = {kernels[one.kernel].language for one in launches}
        found = problem(plugin, given, device) if languages == {"triton"} else "in CUDA C++"
        print(json.dumps([plugin.call.op, found]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
