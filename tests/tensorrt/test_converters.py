"""Converters for Torch-TensorRT make of our ops what our own lowering makes of them.

Torch-TensorRT needs a GPU to be installed; a registry with its signatures stands for it here, and a
TensorRT that records for the network.
"""

import lzma
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # it looks modules up by name, and shall not find those of tests
from torch import fx

from lingc import targets
from lingc.device import Binary
from lingc.errors import MissingExtraError, UsageError
from lingc.op import OPS, TORCH_DTYPE
from lingc.plan import Program, Ref, Step
from lingc.plugin_table import Call, PluginTable
from lingc.runtime import tensorrt_plugin
from lingc.runtime.tensorrt_plugin import Launcher
from lingc.targets.tensorrt.backend import StandardBackend
from lingc.targets.tensorrt.body import Body
from lingc.targets.tensorrt.converters import Converters, register_converters
from lingc.targets.tensorrt.lower import Lowering, Tabled
from lingc.targets.tensorrt.native import EMBEDDED, is_native
from lingc.targets.tensorrt.profile import sizes
from tests.runtime.host_device import HostDevice
from tests.tensorrt.engines import plan, plugins, stand_ins, weights
from tests.tensorrt.recording import Recording, Thing
from tests.tensorrt.surface import load
from tests.tensorrt.torch_tensorrt_fake import Registry, interpret

VERSION = "11.4.0.106"
TARGET = "h20"


@dataclass
class Host:
    """A machine with Torch-TensorRT on it."""

    registry: Registry
    trt: Recording

    def converters(self, **more: Any) -> Converters:
        return register_converters(TARGET, compile_kernels=stand_ins, device=HostDevice, **more)

    def network(self) -> Any:
        return Thing(self.trt, "INetworkDefinition")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    registry, trt = Registry(), Recording(load(VERSION))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo.conversion", registry.module())
    known = dict(tensorrt_plugin._CREATORS)
    yield Host(registry, trt)
    tensorrt_plugin._CREATORS.clear()
    tensorrt_plugin._CREATORS.update(known)


def lowered(
    trt: Recording, precision: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[list[str], Call | None]]:
    """What each step of a phase became: methods of the network, and the plugin's call."""
    begun: list[tuple[Step, int]] = []
    begin = Body.begin

    def watched(body: Body, step: Step) -> None:
        begun.append((step, len(trt.calls)))
        begin(body, step)

    tabled = plugins(TARGET, precision)
    made = Lowering(
        StandardBackend(trt), plan(TARGET, precision), targets.get(TARGET), tabled,
        weights=weights(TARGET, precision),
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(Body, "begin", watched)
        made.network(phase)
    outputs = len(
        {*made.plan.programs[phase].outputs.values()}
        | {*made.plan.programs[phase].updates.values()}
    )
    ends = [*(at for _, at in begun[1:]), len(trt.calls) - outputs]
    numbers = tabled.numbers[phase]
    return {
        step.outputs[0]: (
            trt.calls[at:end], None if number is None else tabled.table.calls[number]
        )
        for (step, at), end, number in zip(begun, ends, numbers, strict=True)
    }  # fmt: skip


def node_of(step: Step, program: Program, sizes: dict[str, int], arrays: Any) -> fx.GraphModule:
    """A step as a graph of one node; what lowering makes a constant is an attribute."""
    op = OPS[step.op.removeprefix("lingc.")]
    graph, root = fx.Graph(), torch.nn.Module()
    known = EMBEDDED.get(op.name)
    constants = known.constants if known and is_native(step, program, embeds=True) else ()
    args: list[Any] = []
    for index, (name, arg) in enumerate(zip(op.arguments, step.args, strict=True)):
        if not isinstance(arg, Ref):
            args.append(list(arg) if isinstance(arg, tuple) else arg)
            continue
        kind = program.types[arg.name]
        dtype = TORCH_DTYPE[kind.dtype]
        if index in constants:
            raw = np.array(arrays[arg.name])
            root.register_buffer(name, torch.from_numpy(raw).view(dtype).reshape(kind.bind({})))
            args.append(graph.get_attr(name))
        else:
            args.append(graph.placeholder(name))
        args[-1].meta["val"] = torch.empty(kind.bind(sizes), dtype=dtype, device="meta")
    made = graph.call_function(op.overload, tuple(args))
    kinds = [program.types[one] for one in step.outputs]
    values = tuple(
        torch.empty(kind.bind(sizes), dtype=TORCH_DTYPE[kind.dtype], device="meta")
        for kind in kinds
    )
    made.meta["val"] = values[0] if len(values) == 1 else values
    graph.output((made,) if len(values) == 1 else ())
    return fx.GraphModule(root, graph)


CASES = [
    ("int4-all", "decode"),
    pytest.param("fp8", "prefill", marks=pytest.mark.long),
    pytest.param("fp8-static", "verify", marks=pytest.mark.long),
    pytest.param("bf16", "draft", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("precision", "phase"), CASES)
def test_an_op_becomes_what_our_lowering_makes_of_it(
    precision: str, phase: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = lowered(Recording(load(VERSION)), precision, phase, monkeypatch)
    made, tabled = plan(TARGET, precision), plugins(TARGET, precision)
    program, arrays = made.programs[phase], weights(TARGET, precision)
    converters, seen = host.converters(), set()
    bucket = next(one for one in sizes(made) if one.phase == phase)
    axes = {**bucket.axes, "S": 3, "R": 5 * made.page_size + 1}
    for step in program.steps:
        if not step.op.startswith("lingc."):
            continue
        graph, begin = node_of(step, program, axes, arrays), len(host.trt.calls)
        interpret(host.registry, graph, host.network())
        calls = [one for one in host.trt.calls[begin:] if one not in {"add_input", "mark_output"}]
        known, call = want[step.outputs[0]]
        assert calls == known, step
        if call is not None:
            shapes = [
                program.types[arg.name].bind(axes) for arg in step.args if isinstance(arg, Ref)
            ]
            (plugin,) = converters._kept[-1].plugins.values()
            held = tensorrt_plugin._TABLES[plugin.launcher.digest]
            assert held.kernel is not None
            got = puts(held.table, held.kernel, plugin.call, shapes)
            assert got == puts(tabled.table, kernel_of(tabled), call, shapes), step
        seen.add(step.op)

    assert len(seen) >= 7


def kernel_of(tabled: Tabled) -> Callable[[int], Binary]:
    files, table = tabled.kernels, tabled.table
    return lambda n: Binary.from_bytes(lzma.decompress(files[table.kernels[n]]))


def puts(
    table: PluginTable, kernel: Callable[[int], Binary], call: Call, shapes: Sequence[Any]
) -> list[Any]:
    """What a call puts on a stream, kernels by what they were made of."""
    told: list[Any] = []
    device: Any = SimpleNamespace(
        stream=None,
        copy=lambda *given: told.append(given),
        clear=lambda *given: told.append(given),
        put=lambda binary, values, **more: told.append((binary.code, values, more)),
    )
    launcher = Launcher(table=table, digest="", kernel=kernel, device=device)
    inputs = [1 << 40 | number << 32 for number in range(len(call.inputs))]
    outputs = [1 << 50 | number << 32 for number in range(len(call.outputs))]
    launcher.run(call, shapes, inputs, outputs, 1 << 60, 7)
    return told


class Chain(torch.nn.Module):
    """Ops of ours in a row."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = torch.ones(256, dtype=torch.bfloat16)
        self.up = torch.randn(1024, 256, generator=generator).to(torch.bfloat16)
        self.gate = torch.randn(16, 256, generator=generator).to(torch.bfloat16)
        self.bias = torch.zeros(16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops: Any = torch.ops.lingc
        y = ops.rms_norm(x, self.norm, 1e-6)
        made = ops.silu_mul(ops.linear(y, self.up))
        ids, scales = ops.router(y, self.gate, self.bias, 4, 2, 4, 2.5, True)  # noqa: FBT003
        return made, ids, scales


def exported(*, is_open: bool = True) -> fx.GraphModule:
    x = torch.zeros(8, 256, dtype=torch.bfloat16)
    dims = {"x": {0: torch.export.Dim("T", min=1, max=64)}} if is_open else None
    module = torch.export.export(Chain(), (x,), dynamic_shapes=dims).module()
    assert isinstance(module, fx.GraphModule)
    return module


def test_a_module_of_open_sizes_has_launches_for_those_that_were_asked_for(host: Host) -> None:
    converters = host.converters(sizes=(1, 8, 64))
    ctx = interpret(host.registry, exported(), host.network())
    (router,) = converters.plugins
    (call,) = router.plugins.table.calls

    assert host.trt.calls.count("mark_output") == 3
    assert host.trt.calls.count("add_plugin_v3") == 1
    assert (call.op, list(call.choices)) == ("router", [(1,), (8,), (64,)])
    assert [one.shape for one in call.outputs] == [(call.axes[0], 4)] * 2
    # What TensorRT reads while it builds lives as long as Torch-TensorRT says: weights and scalars.
    held = {raw.numel() for raw in ctx.cpu_weights_reference_holder}
    assert {2 * 1024 * 256, 2 * 16 * 256, 2 * 256, 4 * 16} <= held


def test_one_that_is_open_where_no_size_was_given_stays_in_pytorch(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    converters = host.converters()
    nodes = {node.name: node for node in exported().graph.nodes}

    assert host.registry.get(nodes["router"]) is None
    assert host.registry.get(nodes["linear"]) is not None  # a layer of TensorRT's takes any size
    assert "router stays in PyTorch: 1 open sizes of 0 values each make 0 sets" in caplog.text
    assert interpret(host.registry, exported(is_open=False), host.network())
    assert [list(one.plugins.table.calls[0].choices) for one in converters.plugins] == [[()]]


def by_name(graph: fx.GraphModule, places: int) -> fx.GraphModule:
    """The same calls of our ops, arguments from that place on by their names, backwards."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            names = OPS[node.target._schema.name.partition("::")[2]].arguments
            given = dict(zip(names, node.args, strict=True))
            node.args = node.args[:places]
            node.kwargs = {name: given[name] for name in reversed(names[places:])}
    return graph


@pytest.mark.parametrize("places", [0, 1, 2])
def test_arguments_are_given_by_place_or_by_name(host: Host, places: int) -> None:
    converters = host.converters(sizes=(8,))
    interpret(host.registry, exported(), host.network())
    by_place, host.trt.calls[:] = list(host.trt.calls), []
    interpret(host.registry, by_name(exported(), places), host.network())

    assert host.trt.calls == by_place
    assert len(converters.plugins) == 1  # alike, so of one table


@pytest.mark.parametrize("places", [0, 2])
def test_weights_that_become_constants_are_found_by_their_names(host: Host, places: int) -> None:
    made = plan(TARGET, "int4-all")
    program = made.programs["decode"]
    step = next(s for s in program.steps if is_native(s, program, embeds=True) and "int4" in s.op)
    axes = next(one for one in sizes(made) if one.phase == "decode").axes
    graph = node_of(step, program, {**axes, "S": 3}, weights(TARGET, "int4-all"))
    host.converters()
    interpret(host.registry, by_name(graph, places), host.network())

    assert "add_plugin_v3" not in host.trt.calls
    assert host.trt.calls.count("add_dequantize") == 1


def test_what_is_no_call_of_an_op_stays_in_pytorch_and_says_why(host: Host) -> None:
    converters, module = host.converters(), exported(is_open=False)
    (node,) = (one for one in module.graph.nodes if one.name == "rms_norm")
    x, weight, eps = node.args
    for args, kwargs, told in (
        ((x, weight), {}, "'eps' is missing"),
        ((x, weight, eps), {"weight": weight}, "'weight' is given twice"),
        ((x, weight, eps, eps), {}, "4 are given"),
    ):
        node.args, node.kwargs = args, kwargs
        assert converters.refusal(node) == f"rms_norm takes (x, weight, eps), and {told}"


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "8"])
def test_a_size_that_is_none_is_refused_when_converters_are_registered(
    host: Host, wrong: Any
) -> None:
    with pytest.raises(UsageError, match=f"sizes has {wrong!r}, and a plugin has launches for"):
        host.converters(sizes=(8, wrong))
    assert not host.registry.found


def test_what_is_empty_becomes_layers_of_tensorrt_and_no_plugin(host: Host) -> None:
    bf16, f32 = torch.bfloat16, torch.float32

    assert refused(host, "linear", (bf16, (0, 256)), (bf16, (16, 256))) == "None"
    told = refused(
        host, "router", (bf16, (0, 256)), (bf16, (16, 256)), (f32, (16,)),
        literals=(4, 2, 4, 2.5, True),
    )  # fmt: skip
    assert told == "'router_default.x' is empty, [0, 256], and a plugin has no launches for that"


def test_a_size_that_nothing_is_left_of_is_named(host: Host) -> None:
    """An open size that is one less than another, of which 1 is asked for."""

    class Shorter(torch.nn.Module):
        def forward(self, x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor) -> Any:
            return torch.ops.lingc.router(x[1:], gate, bias, 4, 2, 4, 2.5, True)  # noqa: FBT003

    given = (torch.zeros(8, 256).bfloat16(), torch.zeros(16, 256).bfloat16(), torch.zeros(16))
    dims: Any = ({0: torch.export.Dim("T", min=4, max=64)}, None, None)
    module: Any = torch.export.export(Shorter(), given, dynamic_shapes=dims).module()
    (node,) = (one for one in module.graph.nodes if one.name == "router")

    told = str(host.converters(sizes=(1, 8)).refusal(node))
    assert re.search(r"a size of \w+ - 1 is 0 where \w+ is 1, and a plugin has no launches", told)
    assert host.converters(sizes=(8,)).refusal(node) is None


def refused(host: Host, op: str, *shapes: Any, literals: tuple[Any, ...] = ()) -> str:
    """Why a call of an op of such inputs, (dtype, shape) each, cannot be converted."""
    graph = fx.Graph()
    given: list[Any] = []
    for number, (dtype, shape) in enumerate(shapes):
        given.append(graph.placeholder(f"x{number}"))
        given[-1].meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    node = graph.call_function(OPS[op].overload, (*given, *literals))
    made = OPS[op].overload(*(one.meta["val"] for one in given), *literals)
    node.meta["val"] = made
    return str(host.converters().refusal(node))


def test_weights_without_a_fake_tensor_are_looked_up_and_others_stay_in_pytorch(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.converters()
    module = exported(is_open=False)
    nodes = {node.name: node for node in module.graph.nodes}
    for node in nodes.values():
        if node.op == "get_attr":
            del node.meta["val"]
    assert interpret(host.registry, module, host.network())
    del nodes["linear"].meta["val"]

    assert host.registry.get(nodes["silu_mul"]) is None
    assert "silu_mul stays in PyTorch: nothing tells the type of 'linear'" in caplog.text


def test_what_has_no_kernel_stays_in_pytorch_and_says_why(host: Host) -> None:
    bf16, f32 = torch.bfloat16, torch.float32
    routing = (4, 2, 4, 2.5, True)

    assert "weight is f32, not bf16" in refused(
        host, "router", (bf16, (8, 256)), (f32, (16, 256)), (f32, (16,)), literals=routing
    )
    assert "f64" in refused(
        host, "router", (torch.float64, (8, 256)), (bf16, (16, 256)), (f32, (16,)), literals=routing
    )
    assert (
        refused(host, "router", (bf16, (8, 256)), (bf16, (16, 256)), (f32, (16,)), literals=routing)
        == "None"
    )


def test_what_was_converted_runs_by_itself_and_is_saved_for_the_cpp_plugins(
    host: Host, tmp_path: Any
) -> None:
    converters = host.converters(sizes=(8,))
    interpret(host.registry, exported(), host.network())
    (made,) = converters.plugins
    launcher = tensorrt_plugin._TABLES[made.plugins.digest]
    converters.save(tmp_path)

    assert isinstance(launcher.device, HostDevice)
    assert launcher.kernel is not None
    assert launcher.kernel(0) == made.binaries[0]
    assert {one.name for one in tmp_path.iterdir()} == {
        f"{made.plugins.digest}.json", *(f"{one}.kernel" for one in made.plugins.table.images)
    }  # fmt: skip


def test_without_torch_tensorrt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match="'tensorrt' is not installed here"):
        register_converters(TARGET)
    monkeypatch.undo()


@pytest.mark.usefixtures("host")
def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="h21"):
        register_converters("h21")
