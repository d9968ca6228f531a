"""Engines: TensorRT builds what was lowered, the same layers each time, and mistakes are seen."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc import targets
from lingc.context import module_of
from lingc.errors import LingcError, StageError
from lingc.plan import WeightSpec, dumps, loads, refs
from lingc.quantize.recipes import load_recipe
from lingc.targets.tensorrt import lower
from lingc.targets.tensorrt.body import Value
from tests.tensorrt.engines import (
    MORE,
    SAMPLE,
    STATIC,
    checkpoint,
    has_rtx,
    lowering,
    networks,
    plan,
    stand_ins,
    weights,
)

pytestmark = has_rtx

CASES = [*SAMPLE, STATIC, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]


def built(made: Any, network: Any) -> tuple[bytes, list[str]]:
    """An engine, and what its report finds wrong."""
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    begin = len(made.backend.log.messages)
    engine = made.engine(network)
    messages = [text for _, text in made.backend.log.messages[begin:]]
    return engine, report.faults(report.parse(messages, network), network)


@pytest.mark.parametrize(("target", "precision"), CASES)
def test_every_phase_builds_and_is_what_was_lowered(target: str, precision: str) -> None:
    made, found = networks(target, precision)

    assert found.keys() == plan(target, precision).programs.keys()
    for network in found.values():
        engine, faults = built(made, network)
        assert faults == []
        assert engine


@pytest.mark.parametrize(
    "phase",
    ["decode", *(pytest.param(p, marks=pytest.mark.long) for p in ("prefill", "verify", "draft"))],
)
def test_an_engine_that_is_built_again_is_the_same_but_for_the_order_of_open_sizes(
    phase: str,
) -> None:
    """Every layer with its name, kind, types, shapes and place, all memory, and the length.

    The bytes are not: where a network has several open sizes, TensorRT for RTX numbers them, and
    orders what it keeps by them, by addresses in its heap. `docs/tensorrt.md` has the evidence.
    """
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    reports, engines = [], []
    for _ in range(2):
        made = lowering("spark", "int4-all")
        network, begin = made.network(phase), len(made.backend.log.messages)
        engines.append(np.frombuffer(made.engine(network), np.uint8))
        messages = [text for _, text in made.backend.log.messages[begin:]]
        reports.append(report.to_value(report.parse(messages, network)))

    assert reports[0] == reports[1]
    assert len(engines[0]) == len(engines[1])
    assert (engines[0] != engines[1]).mean() < 0.02


def test_a_plan_that_was_kept_gives_the_same_table() -> None:
    """As the cache of plans does: from its text, in which names are sorted."""
    made = plan("spark", "int4-all")
    kept, target = loads(dumps(made)), targets.get("spark")

    assert lower.tabled(kept, target, stand_ins, embeds=True).data == (
        lower.tabled(made, target, stand_ins, embeds=True).data
    )


def test_an_engine_with_one_open_size_is_the_same_bytes() -> None:
    """However many tensors have it: what differs elsewhere is the order of several."""
    engines = set()
    for _ in range(4):
        made = lowering("rtx-89", "bf16")
        builder = made.backend.builder()
        network = made.backend.network(builder, [])
        profile = builder.create_optimization_profile()
        for number in range(8):
            x = network.add_input(f"x{number}", made.backend.trt.bfloat16, (-1, 64))
            x.set_dimension_name(0, "T")
            y = network.add_elementwise(x, x, made.backend.trt.ElementWiseOperation.SUM)
            network.mark_output(y.get_output(0))
            profile.set_shape(f"x{number}", (1, 64), (8, 64), (64, 64))
        config = made.backend.config(builder, made.target)
        config.add_optimization_profile(profile)
        engines.add(made.backend.build(builder, network, config))

    assert len(engines) == 1


def test_an_engine_holds_no_weights_but_those_it_fuses() -> None:
    made, found = networks("spark", "int4-all")
    program = made.plan.programs["decode"]
    network = found["decode"]
    inputs = {network.network.get_input(i).name for i in range(network.network.num_inputs)}

    assert {*program.weights} - inputs == network.embedded
    assert network.embedded
    assert not any("experts.gate_up" in name for name in network.embedded if "shared" not in name)
    for step in program.steps:
        if step.op == "lingc.int4_weight_experts":
            assert {*refs(step.args)} & {*program.weights} <= inputs


def test_what_a_recipe_quantizes_is_multiplied_in_fp8_and_nothing_else() -> None:
    """One by one: products of TensorRT for matrices with one scale, plugins for experts."""
    made, found = networks(*STATIC)
    recipe, seen = load_recipe(STATIC[1]), set[str]()
    for phase, network in found.items():
        program, embedded = made.plan.programs[phase], set[str]()
        for step in program.steps:
            specs = [made.plan.weights[name] for name in refs(step.args) if name in program.weights]
            modules = {module_of(s, e) for one in specs for s in one.sources for e in members(one)}
            stored = {recipe.format_of(module).kind for module in modules}
            if "fp8_tensor" in stored:
                is_expert = step.op == "lingc.fp8_experts"
                role = "plugin fp8_experts" if is_expert else "fp8"
                assert stored == {"fp8_tensor"}
                assert network.roles[step.outputs[0]] == role
                assert {one.type.dtype for one in specs} == {"f8e4m3", "f32"}
                embedded |= {one.name for one in specs if one.type.shape == (1,)}
                seen |= modules
            else:
                assert network.roles.get(step.outputs[0]) != "fp8"
        assert network.embedded == embedded, "scales are constants, and codes are bound"

    names = (name.removesuffix(".weight") for name in checkpoint().names)
    assert seen == {name for name in names if recipe.format_of(name).kind != "plain"}


def test_a_head_with_static_scales_keeps_its_sums(tmp_path: Path) -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    rules = [{"modules": ["lm_head"], "format": "fp8_tensor"}]
    path = tmp_path / "head.json"
    path.write_text(json.dumps({"name": "head", "activations": "fp8_static", "rules": rules}))
    made = lowering("spark", str(path))
    network, begin = made.network("draft"), len(made.backend.log.messages)
    _, faults = built(made, network)
    messages = [text for _, text in made.backend.log.messages[begin:]]
    layers = report.parse(messages, network).layers

    assert faults == []
    (origin,) = (one for one, role in network.roles.items() if role == "fp8")
    (product,) = (layer for layer in layers if origin in layer.origins)
    assert [one.dtype for one in product.outputs] == ["Float"]


def members(spec: WeightSpec) -> range:
    return range(max(spec.experts, 1))


def test_without_weights_nothing_is_embedded() -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    made = lowering("spark", "int4-all", embeds=False)
    network = made.network("decode")
    _, faults = built(made, network)
    messages = [text for _, text in made.backend.log.messages]

    assert network.embedded == set()
    assert faults == []
    assert report.parse(messages, network).weight_bytes < 4096


def test_every_layer_carries_the_value_of_the_plan_that_it_is_for() -> None:
    made, found = networks("rtx-120", "bf16")
    values = {s.outputs[0] for p in made.plan.programs.values() for s in p.steps}
    for network in found.values():
        layers = (network.network.get_layer(i) for i in range(network.network.num_layers))
        named = [layer for layer in layers if layer.metadata]

        assert {layer.name.partition("/")[0] for layer in named} <= values
        assert len({layer.name for layer in named}) == len(named)
        assert {layer.metadata.partition(" ")[0] for layer in named} <= values


def test_states_updated_in_place_can_be_one_tensor_to_tensorrt() -> None:
    made = lowering("rtx-120", "bf16", aliased=True)

    assert made.engine(made.network("decode"))


# --------------------------------------------------------------------------------- planted mistakes


def planted(monkeypatch: pytest.MonkeyPatch, op: str, function: Any) -> None:
    from lingc.targets.tensorrt import native  # noqa: PLC0415

    changed = {**native.EMBEDDED, op: replace(native.EMBEDDED[op], function=function)}
    monkeypatch.setattr(native, "EMBEDDED", changed)
    monkeypatch.setattr("lingc.targets.tensorrt.lower.EMBEDDED", changed)


def test_scales_in_another_layout_do_not_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from lingc.targets.tensorrt.native import int4_weight_linear  # noqa: PLC0415

    def turned(body: Any, x: Any, packed: Any, scales: Any, group: int) -> Any:
        rows, words = packed.shape
        signed = np.ascontiguousarray(packed).view(np.uint8) ^ np.uint8(0x88)
        codes = body.constant(signed, "int4", (rows, 8 * words))
        scale = body.constant(scales.T, "bf16", (8 * words // group, rows))
        return body.times(x, body.dequantize(codes, scale, x.dtype))

    planted(monkeypatch, "int4_weight_linear", turned)
    made = lowering("spark", "int4-all")

    with pytest.raises(LingcError, match="TensorRT builds no engine"):
        built(made, made.network("decode"))
    planted(monkeypatch, "int4_weight_linear", int4_weight_linear)
    assert built(made, made.network("decode"))[1] == []


def test_a_matrix_that_is_dequantized_apart_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one group a row are: lowering gives them to a plugin, and here does not."""
    from lingc.targets.tensorrt.backend import backend  # noqa: PLC0415

    monkeypatch.setattr("lingc.targets.tensorrt.native.int4_refusal", lambda *_: None)
    made, target = plan("spark", "int4-all"), targets.get("spark")
    plugins = lower.tabled(made, target, stand_ins, embeds=True)
    held = weights("spark", "int4-all")
    planted = lower.Lowering(backend(target), made, target, plugins, weights=held)
    _, faults = built(planted, planted.network("decode"))

    assert len(faults) == 7
    assert faults[0].startswith(
        "layers.1.int4_weight_linear.3: the INT4 matrix is dequantized apart from its product"
    )


def by_channel(body: Any, x: Any, x_scale: Any, weight: Any, scale: Any) -> Any:
    """A scale a row of the matrix: codes are multiplied, and scaled by a kernel of its own."""
    rows = body.constant(np.full(weight.type.shape[0], scale[0], np.float32))
    layer = body.network.add_dequantize(weight.tensor, rows.tensor, body._type(x.dtype))
    layer.axis = 0
    wide = Value(body.named(layer, "dequantize").get_output(0), replace(weight.type, dtype=x.dtype))
    return body.times(body.rounded(x, x_scale, x.dtype), wide)


def by_blocks(body: Any, x: Any, x_scale: Any, weight: Any, scale: Any) -> Any:
    """A scale 128x128 values."""
    grid = tuple(-(-size // 128) for size in weight.type.shape)
    scales = body.constant(np.full(grid, scale[0], np.float32))
    layer = body.network.add_dequantize(weight.tensor, scales.tensor, body._type(x.dtype))
    layer.block_shape = body.backend.trt.Dims((128, 128))
    wide = Value(body.named(layer, "dequantize").get_output(0), replace(weight.type, dtype=x.dtype))
    return body.times(body.rounded(x, x_scale, x.dtype), wide)


def by_an_input(body: Any, x: Any, _scale: Any, weight: Any, scale: Any) -> Any:
    """A scale of inputs that is told at each step."""
    name = f"scale of {x.tensor.name} {body.network.num_layers}"
    by = body.network.add_input(name, body.backend.trt.float32, ())
    layer = body.network.add_quantize(x.tensor, by, body.backend.trt.DataType.FP8)
    codes = body.named(layer, "quantize")
    layer = body.network.add_dequantize(codes.get_output(0), by, body._type(x.dtype))
    values = Value(body.named(layer, "rounded").get_output(0), x.type)
    return body.times(values, body.dequantize(weight, body.constant(scale), x.dtype))


@pytest.mark.parametrize("function", [by_channel, by_blocks, by_an_input])
def test_static_scales_in_another_layout_are_seen(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = lowering(*STATIC)
    planted(monkeypatch, "fp8_static_linear", function)
    network = made.network("draft")
    _, faults = built(made, network)

    products = [origin for origin, role in network.roles.items() if role == "fp8"]
    assert len(products) == len(faults) == 5
    for origin, told in zip(products, faults, strict=True):
        assert told.startswith(f"{origin}: not one product of FP8 by FP8 alone, but")


def test_a_product_of_fp8_that_nobody_asked_for_is_seen() -> None:
    made, found = networks(*STATIC)
    origin = next(one for one, role in found["draft"].roles.items() if role == "fp8")
    roles = {one: role for one, role in found["draft"].roles.items() if one != origin}
    _, faults = built(made, replace(found["draft"], roles=roles))

    assert len(faults) == 1
    assert origin in faults[0]
    assert faults[0].endswith("a product of FP8 by FP8 that nobody asked for")


def test_a_plugin_that_is_missing_or_doubled_is_seen() -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    made, found = networks("rtx-120", "bf16")
    network, begin = found["decode"], len(made.backend.log.messages)
    made.engine(network)
    messages = [text for _, text in made.backend.log.messages[begin:]]
    (listed,) = (text for text in messages if text.startswith("Layers:"))
    rows = listed.splitlines()
    (router,) = (row for row in rows if row.startswith("Name: layers.4.router.ids/router"))

    def faults(changed: list[str]) -> list[str]:
        return report.faults(report.parse(["\n".join(changed)], network), network)

    missing = faults([row for row in rows if row != router])
    doubled = faults([*rows, router])
    assert len(missing) == len(doubled) == 2
    assert missing[0].startswith("layers.4.router.ids: plugin router is 0 calls among 0 layers")
    assert doubled[0].startswith("layers.4.router.ids: plugin router is 2 calls among 2 layers")


def test_a_plugin_that_nobody_reads_is_refused_before_tensorrt_sees_it() -> None:
    from lingc.targets.tensorrt.lower import Lowering  # noqa: PLC0415

    made = lowering("rtx-120", "bf16")
    program = made.plan.programs["draft"]
    short = replace(program, steps=program.steps[:4], outputs={"y": "embedding"}, updates={})
    cut = replace(made.plan, programs={"draft": short})
    numbers = {"draft": made._tabled.numbers["draft"][:4]}
    plugins = replace(made._tabled, numbers=numbers)

    with pytest.raises(StageError, match=r"nobody reads 'rope_table\.cos', 'rope_table\.sin'"):
        Lowering(made.backend, cut, made.target, plugins).network("draft")


def test_a_log_of_another_form_is_refused() -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    _, found = networks("rtx-120", "bf16")
    with pytest.raises(StageError, match="listed its layers 0 times"):
        report.parse(["Engine generation completed"], found["decode"])
    with pytest.raises(StageError, match="a layer of the build log cannot be read"):
        report.parse(["Layers:\nName: one, Type: gemm"], found["decode"])


def test_a_plugin_of_a_table_that_was_not_loaded_is_refused() -> None:
    from lingc.runtime import tensorrt_plugin  # noqa: PLC0415

    made = lowering("rtx-120", "bf16")
    known: Mapping[str, Any] = dict(tensorrt_plugin._TABLES)
    tensorrt_plugin._TABLES.clear()
    try:
        with pytest.raises(StageError, match="TensorRT's parser takes no plugin"):
            made.network("decode")
    finally:
        tensorrt_plugin._TABLES.update(known)
