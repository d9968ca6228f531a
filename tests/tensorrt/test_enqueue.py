"""Plugins on a GPU, outside TensorRT: each object's `enqueue` launches what its reference computes.

Every plugin step of every phase of the shipped checkpoint is called with the arguments that the
plan's references were given, in device memory, through the very method that TensorRT calls.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc import targets
from lingc.bench.kernels import problem_of
from lingc.cli.failure import cache_dir
from lingc.device import Binary
from lingc.errors import InputError
from lingc.interpret import InterpreterBackend, open_sizes, run_step
from lingc.kernel import Kernel
from lingc.op import OPS, TORCH_DTYPE
from lingc.plan import Plan, Ref, Step
from lingc.plugin_table import shape_of
from lingc.runtime.backend import Limits
from lingc.targets.cuda.binaries import compile_all, read_compilers
from lingc.targets.tensorrt import lower
from tests.tensorrt.engines import plan, weights

pytestmark = pytest.mark.gpu

log = logging.getLogger(__name__)

TARGET = "h200-sxm"
PAGES = 8
"""Of a sequence in the smallest bucket."""


Steps = list[tuple[Step, list[Any]]]
"""Steps of a run with the arguments that they were given."""


def recorded(backend: InterpreterBackend, phase: str, inputs: Mapping[str, Any]) -> Steps:
    """Run a phase, and keep what every step was given."""
    program, values = backend.begin(phase, inputs)
    sizes, found = open_sizes(program, values), []
    for one in program.steps:
        given = [values[a.name].clone() if isinstance(a, Ref) else a for a in one.args]
        found.append((one, given))
        values.update(zip(one.outputs, run_step(one, values, sizes), strict=True))
    backend.end(program, values)
    return found


def step(made: Plan, phase: str, spans: Sequence[tuple[int, int, int]], **more: Any) -> Any:
    """Inputs of a phase; spans are slot (-1 for padding), first position and tokens."""
    size = made.page_size
    ends = np.cumsum([0, *(count for _, _, count in spans)])
    positions = [np.arange(first, first + count) for _, first, count in spans]
    rows = [
        np.full(len(p), -1) if slot < 0 else slot * PAGES * size + p
        for (slot, _, _), p in zip(spans, positions, strict=True)
    ]
    given = {
        "token_ids": np.arange(ends[-1]) * 37 % 4096,
        "positions": np.concatenate(positions),
        "offsets": ends,
        "slots": np.array([slot for slot, _, _ in spans]),
        "cache_rows": np.concatenate(rows),
        "page_table": np.array([np.arange(PAGES) + max(s, 0) * PAGES for s, _, _ in spans]),
        "logit_rows": ends[1:] - 1,
        "accepted": np.zeros(len(spans)),
    }
    inputs = {name: value.astype(np.int32) for name, value in given.items()} | more
    return {name: inputs[name] for name in made.programs[phase].inputs}


def run(made: Plan, precision: str) -> dict[str, Steps]:
    """Steps of every phase with their arguments, in sizes of buckets."""
    limits = Limits(slots=2, pages=2 * PAGES)
    backend = InterpreterBackend(made, weights(TARGET, precision), limits)
    found = {}
    hidden = np.random.default_rng(0).standard_normal((16, made.config["hidden_size"]))
    script: Sequence[tuple[str, list[tuple[int, int, int]], dict[str, Any]]] = (
        ("prefill", [(0, 0, 11), (1, 0, 5)], {}),
        ("decode", [(0, 11, 1), (1, 5, 1)], {}),
        ("verify", [(0, 12, 3), (1, 6, 3)], {}),
        ("verify", [(0, 14, 3), (-1, 0, 3)], {"accepted": np.array([2, 0], np.int32)}),
        ("decode", [(0, 17, 1), (1, 9, 1)], {"accepted": np.array([3, 3], np.int32)}),
        (
            "draft",
            [(0, 0, 11), (1, 0, 5), *[(-1, 0, 0)] * 14],
            {"hidden": hidden.astype(np.float32)},
        ),
    )
    for number, (phase, spans, more) in enumerate(script):
        given = step(made, phase, spans, **more)
        found[f"{number} {phase}"] = recorded(backend, phase, given)
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4-all"])
def test_every_plugin_computes_what_its_reference_does(precision: str, tmp_path: Path) -> None:
    from lingc.device import Device  # noqa: PLC0415
    from lingc.runtime.tensorrt_plugin import Launcher, OpPlugin  # noqa: PLC0415

    made, target = plan(TARGET, precision), targets.get(TARGET)
    binaries: dict[Kernel, Binary] = {}

    def compiled(wanted: tuple[Kernel, ...]) -> dict[Kernel, Binary]:
        binaries.update(kernels_of(wanted, target.arch, cache_dir() or tmp_path))
        return binaries

    log.info("%s: planned", precision)
    table = lower.tabled(made, target, compiled)
    log.info("%s: %d kernels", precision, len(binaries))
    kernels = list(binaries)
    device = Device()
    launcher = Launcher(
        table=table.table,
        digest=table.digest,
        kernel=lambda index: binaries[kernels[index]],
        device=device,
    )
    ran: set[str] = set()
    problems: list[str] = []
    for phase_name, steps in run(made, precision).items():
        phase = phase_name.partition(" ")[2]
        for (one, given), number in zip(steps, table.numbers[phase], strict=True):
            if number is None:
                continue
            plugin = OpPlugin(launcher, number)
            for in_place in (False, True):
                problem = difference(plugin, given, device, in_place=in_place)
                if problem is not None:
                    where = "in place" if in_place else "beside"
                    problems.append(f"{phase_name}, {where}: {one.outputs[0]}: {problem}")
                    log.warning("%s: %s", precision, problems[-1])
            ran.add(plugin.call.op)
        log.info("%s: %s ran, %d wrong so far", precision, phase_name, len(problems))
    device.close()

    assert problems == []
    assert ran == {call.op for call in table.table.calls}


def kernels_of(wanted: Sequence[Kernel], arch: str, folder: Path) -> Mapping[Kernel, Binary]:
    """Kernels from a folder; of the compilers that it names, else of those that are installed."""
    try:
        compilers = read_compilers(folder)
    except InputError:
        compilers = None
    return compile_all(wanted, arch, folder, compilers=compilers)


def difference(plugin: Any, given: list[Any], device: Any, *, in_place: bool) -> str | None:
    """What is wrong with a plugin's results, or None."""
    op, call = OPS[plugin.call.op], plugin.call
    tensors = [value.contiguous().cuda() for value in given if isinstance(value, Tensor)]
    shapes = [tuple(value.shape) for value in tensors]
    results = []
    for output in call.outputs:
        if output.place >= 0 and in_place:
            results.append(tensors[output.place])
            continue
        shape, dtype = shape_of(output, shapes), TORCH_DTYPE[output.dtype]
        raw = torch.full((int(np.prod(shape)) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
        results.append(raw.cuda().view(dtype).reshape(shape))
    size = max(plugin.get_workspace_size(None, None), 1)
    workspace = torch.full((min(size, 1 << 30),), 0xFF, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    plugin.enqueue(
        [SimpleNamespace(dims=shape) for shape in shapes],
        [SimpleNamespace(dims=tuple(value.shape)) for value in results],
        [value.data_ptr() for value in tensors],
        [value.data_ptr() for value in results],
        workspace.data_ptr(),
        int(device.stream),  # TensorRT gives its handle
    )
    device.synchronize()
    got = [value.cpu() for value in results]
    return problem_of(op, given, got, similar=0.0)
