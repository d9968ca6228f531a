"""The plan: plain data that reads back, and a text that a person can review."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lingc import pipeline, plan_text, targets
from lingc.capture import Capturer, Sizes
from lingc.context import Context
from lingc.errors import InputError
from lingc.graph import Captured
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.plan import FORMAT, PHASES, Plan, Ref, TensorType, dumps, loads, refs, to_json
from lingc.quantize.recipes import load_recipe
from tests.programs import compiled, copy

LING_TINY = Path(__file__).parents[1] / "artifacts" / "checkpoints" / "ling-tiny"


@cache
def _captured(phase: str) -> Captured:
    return _capturer().capture(phase)


@cache
def _capturer() -> Capturer:
    return Capturer(ModelConfig.from_file(LING_TINY))


def shipped(precision: str, target: str) -> Plan:
    """The plan of the shipped checkpoint."""
    first = Context(
        config=_capturer().config,
        phase=PHASES[0],
        target=targets.get(target),
        recipe=load_recipe(precision),
    )
    fused = {
        phase: pipeline.run(
            Captured(copy(_captured(phase))), replace(first, phase=phase), pipeline.Report()
        )
        for phase in PHASES
    }
    return lower(fused, first, Sizes())


@pytest.mark.parametrize(
    ("precision", "target"),
    [("bf16", "cpu"), ("fp8", "cpu"), ("int4", "cpu"), ("fp8", "h20"), ("fp8", "rtx-120")],
)
def test_the_plan_of_the_shipped_checkpoint_is_the_one_that_was_reviewed(
    precision: str, target: str, golden: Callable[[str, str], None]
) -> None:
    golden(f"plans/ling-tiny-{target}-{precision}.txt", plan_text.text(shipped(precision, target)))


# -------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("model", "precision", "target"),
    [
        ("tiny", "fp8-max", "h20"),
        ("whole-blocks", "int4-all", "h20"),
        ("odd", "int4", "cpu"),
        ("whole-head-rope", "bf16", "cpu"),
    ],
)
def test_a_plan_reads_back_equal(model: str, precision: str, target: str) -> None:
    plan = compiled(model, precision, target)

    written = dumps(plan)

    assert loads(written) == plan
    assert [*loads(written).programs] == [*plan.programs]
    assert dumps(loads(written)) == written


def test_is_written_in_one_way() -> None:
    written = dumps(compiled("tiny"))

    assert written == json.dumps(json.loads(written), sort_keys=True, separators=(",", ":")) + "\n"
    assert written.isascii()


def test_holds_no_path_and_no_line_of_this_machine() -> None:
    written = dumps(compiled("tiny"))

    assert str(Path(__file__).parents[1]) not in written
    assert re.findall(r'"source":"[^"]*/', written) == []


def test_refuses_a_newer_format() -> None:
    value = to_json(compiled("tiny")) | {"format": FORMAT + 1}

    with pytest.raises(InputError, match=f"the plan has format {FORMAT + 1}, this lingc reads up"):
        loads(json.dumps(value))


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda value: value.pop(key)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("states"), "the plan cannot be read: 'states'"),
        (lambda v: v["states"].update(x=3), "the plan cannot be read: "),
        (lambda v: v["states"].update(x="f32(4)"), r"'f32\(4\)' is not a tensor type"),
        (lambda v: v["states"].update(x="f12[4]"), "dtype 'f12' is not one of f64, f32, bf16"),
        (lambda v: v["programs"]["draft"].update(inputs=None), "the plan cannot be read: "),
        (
            lambda v: v["programs"]["draft"]["steps"][0].update(args=[{"rif": "x"}]),
            r"\{'rif': 'x'\} is not an argument",
        ),
        (lambda v: v["weights"]["norm.weight"].update(sources=None), "the plan cannot be read: "),
    ],
)
def test_says_what_is_wrong_with_a_plan(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    value = json.loads(dumps(compiled("tiny")))
    change(value)

    with pytest.raises(InputError, match=said):
        loads(json.dumps(value))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"plan"'])
def test_refuses_what_is_no_plan(text: str) -> None:
    with pytest.raises(InputError, match="the plan cannot be read"):
        loads(text)


def test_a_type_binds_its_axes() -> None:
    kind = TensorType("bf16", ("T", 3, "B+1"))

    assert kind.bind({"T": 2, "B+1": 5}) == (2, 3, 5)
    assert kind.bytes({"T": 2, "B+1": 5}) == 60


def test_names_the_tensors_among_arguments() -> None:
    assert [*refs((Ref("a"), 1, (Ref("b"), "c"), None))] == ["a", "b"]


# -------------------------------------------------------------------------------------------- text


def test_layers_that_do_the_same_are_written_once() -> None:
    text = plan_text.text(compiled("tiny"))

    assert "  layer 2 (12 steps)\n" in text
    assert (
        text.count("lingc.lightning_prefill(") == 3
    )  # after the embedding, a dense layer, experts


def test_a_weight_says_how_it_is_made() -> None:
    lines = plan_text.text(compiled("tiny", "fp8", "h20"))

    made = "model.layers.{l}.mlp.experts.{e}.(gate_proj + up_proj).weight / axis 1 as tiled_gated"
    for line in (
        f"layers.{{1-4}}.mlp.experts.gate_up_codes: f8e4m3[16, 64, 64] fp8_block codes = {made}",
        "  layers.{0-2}.attention.decay: f32[4] decay / axis 0\n",
        "  norm.weight: bf16[64] = model.norm.weight\n",
        "absorb_k: bf16[4, 16, 16] = absorb_k of model.layers.{l}.attention.kv_b_proj.weight",
    ):
        assert line in lines


def test_a_stack_says_what_stands_behind_its_experts() -> None:
    lines = plan_text.text(compiled("whole-blocks", "bf16", "h20"))

    assert (
        "  layers.{1-4}.mlp.all_experts.down_proj: bf16[17, 256, 128] = "
        "model.layers.{l}.mlp.experts.{e}.down_proj.weight, "
        "model.layers.{l}.mlp.shared_experts.down_proj.weight / axis 2 as tiled\n"
    ) in lines


def test_a_long_vector_is_counted() -> None:
    text = plan_text.text(compiled("whole-head-rope"))

    assert re.search(r"rope_table\(positions, \[1, [^\]]*\.\.\. 8 in all\], 1\.\d+\)", text)


def test_every_step_and_every_weight_is_in_the_text() -> None:
    plan = compiled("odd")

    text = plan_text.text(plan)

    ops = {step.op for program in plan.programs.values() for step in program.steps}
    assert all(f"{op}(" in text for op in ops)
    assert f"weights ({len(plan.weights)}, " in text
    assert [phase for phase in PHASES if f"\n{phase}(" in text] == [*plan.programs]


@pytest.mark.parametrize(
    ("numbers", "short"), [([], ""), ([7], "7"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")]
)
def test_numbers_in_short(numbers: list[int], short: str) -> None:
    assert plan_text.ranges(numbers) == short
