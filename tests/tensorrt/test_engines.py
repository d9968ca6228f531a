"""Engines: TensorRT builds what was lowered, the same bytes each time, and mistakes are seen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lingc import targets
from lingc.errors import LingcError, StageError
from lingc.plan import refs
from lingc.targets.tensorrt import lower
from tests.tensorrt.engines import (
    MORE,
    SAMPLE,
    has_rtx,
    lowering,
    networks,
    plan,
    stand_ins,
    weights,
)

pytestmark = has_rtx

CASES = [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]


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


def test_the_same_network_gives_the_same_layers() -> None:
    """What runs, and how large it is; the bytes are not the same.

    TensorRT for RTX writes tensors and the numbers of open sizes in an order of its own where there
    are plugins.
    """
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    found, sizes = set(), set()
    for _ in range(2):
        made = lowering("spark", "int4-all")
        network, begin = made.network("decode"), len(made.backend.log.messages)
        sizes.add(len(made.engine(network)))
        messages = [text for _, text in made.backend.log.messages[begin:]]
        layers = report.parse(messages, network).layers
        found.add(tuple(sorted((one.kind, one.op, tuple(sorted(one.origins))) for one in layers)))

    assert len(found) == len(sizes) == 1


def test_an_engine_without_plugins_is_the_same_bytes() -> None:
    made = lowering("rtx-89", "bf16")
    engines = set()
    for _ in range(3):
        builder = made.backend.builder()
        network = made.backend.network(builder, [])
        x = network.add_input("x", made.backend.trt.bfloat16, (-1, 64))
        y = network.add_elementwise(x, x, made.backend.trt.ElementWiseOperation.SUM)
        network.mark_output(y.get_output(0))
        config = made.backend.config(builder, made.target)
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (1, 64), (8, 64), (64, 64))
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


def planted(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    from lingc.targets.tensorrt import native  # noqa: PLC0415

    changed = {**native.EMBEDDED, "int4_weight_linear": function}
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

    planted(monkeypatch, turned)
    made = lowering("spark", "int4-all")

    with pytest.raises(LingcError, match="TensorRT builds no engine"):
        built(made, made.network("decode"))
    planted(monkeypatch, int4_weight_linear)
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
