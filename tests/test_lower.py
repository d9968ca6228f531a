"""Lowering: a fused program becomes named steps, and nothing of torch is left."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from lingc import pipeline
from lingc.capture import input_types, state_types
from lingc.errors import StageError
from lingc.graph import Fused, Program
from lingc.lower import lower
from lingc.op import OPS
from lingc.plan import Plan, Ref, Size, TensorType, refs
from lingc.rewrite import Builder
from tests.programs import (
    EVERYDAY,
    SIZES,
    calls,
    captured,
    compiled,
    config,
    context,
    output,
    phases,
)

aten = torch.ops.aten

PLANS = [(model, *kind) for model in EVERYDAY for kind in [("bf16", "cpu"), ("fp8", "h20")]]
EVERY_PLAN = pytest.mark.parametrize(("model", "precision", "target"), PLANS)


def fused(phase: str = "draft", precision: str = "bf16", target: str = "cpu") -> Fused:
    """A fused phase of the tiny model, for the test to change."""
    given = context("tiny", phase, precision, target)
    return pipeline.run(captured("tiny", phase), given, pipeline.Report())


def lowered(program: Fused) -> Plan:
    return lower({program.phase: program}, context("tiny", program.phase), SIZES)


def plant(program: Program, target: Any, *args: Any, kind: TensorType, **kwargs: Any) -> None:
    """One more call, whose result the program returns as `tap`."""
    with program.graph.inserting_before(output(program)):
        node = program.graph.call_function(target, args, kwargs)
    node.meta.update(type=kind, layer=-1, source="model.py:41")
    results = program.results()
    output(program).args = ((*results[:2], node, *results[2:]),)
    program.outputs = (*program.outputs, "tap")


@EVERY_PLAN
def test_every_value_is_made_before_it_is_read(model: str, precision: str, target: str) -> None:
    for program in compiled(model, precision, target).programs.values():
        known = {*program.inputs, *program.states, *program.weights}
        for step in program.steps:
            assert set(refs(step.args)) <= known
            assert known.isdisjoint(step.outputs)
            known.update(step.outputs)
        assert {*program.outputs.values(), *program.updates.values()} <= known
        assert program.types.keys() == known


@EVERY_PLAN
def test_a_phase_has_the_inputs_and_states_that_callers_know(
    model: str, precision: str, target: str
) -> None:
    plan = compiled(model, precision, target)

    assert [*plan.programs] == [*phases(model)]
    assert [*plan.states] == [*state_types(config(model), SIZES)]
    for phase, program in plan.programs.items():
        assert [*program.inputs] == [*input_types(config(model), phase)]
        assert {*program.updates} <= {*program.states} <= {*plan.states}
        for name in program.states:
            assert program.types[name] == plan.states[name]
        for name, value in program.updates.items():
            assert program.types[value] == plan.states[name]


@EVERY_PLAN
def test_results_have_the_types_that_their_ops_say(model: str, precision: str, target: str) -> None:
    for program in compiled(model, precision, target).programs.values():
        for step in program.steps:
            if not step.op.startswith("lingc."):
                continue
            given = [program.types[a.name] if isinstance(a, Ref) else a for a in step.args]
            said = OPS[step.op.removeprefix("lingc.")].types(*given)
            made = tuple(program.types[name] for name in step.outputs)
            assert made == (said if isinstance(said, tuple) else (said,))


def test_all_phases_share_one_set_of_weights() -> None:
    plan = compiled("tiny")

    assert {*plan.weights} == {name for p in plan.programs.values() for name in p.weights}
    assert [*plan.weights] == sorted(plan.weights)
    assert all(name == spec.name for name, spec in plan.weights.items())


def test_the_plan_says_what_it_was_made_for() -> None:
    plan = compiled("tiny", "fp8", "h20")

    assert (plan.precision, plan.target, plan.activation) == ("fp8", "h20", "bf16")
    assert (plan.page_size, plan.max_draft) == (4, 3)
    assert plan.config == config("tiny").raw


def test_state_is_as_wide_as_the_activations_but_for_the_linear_one() -> None:
    states = compiled("tiny", "fp8", "h20").states

    assert str(states["linear_state.0"]) == "f32[S, 4, 16, 16]"
    assert str(states["pending_v.0"]) == "bf16[S, 4, 4, 16]"
    assert str(states["latent_cache.3"]) == "bf16[R, 20]"


def test_without_a_draft_phase_there_is_no_cache_for_it() -> None:
    plan = lowered(fused("prefill"))

    assert [*plan.programs] == ["prefill"]
    assert "latent_cache.4" not in plan.states
    assert "latent_cache.3" in plan.states


def test_names_say_layer_op_and_which_one() -> None:
    program = compiled("tiny").programs["prefill"]
    names = [name for step in program.steps for name in step.outputs]

    assert names[:3] == ["embedding", "rope_table.cos", "rope_table.sin"]
    assert {"rope_table.1.cos", "layers.0.linear", "layers.0.linear.3"} <= {*names}
    assert {"layers.1.router.ids", "layers.1.router.weights", "layers.3.mla_latent.cq"} <= {*names}
    assert len(names) == len({*names})


def test_a_result_that_nobody_reads_has_a_name_too() -> None:
    program = compiled("tiny").programs["prefill"]

    last = [step for step in program.steps if step.op == "lingc.add_rms_norm"][-1]

    assert last.outputs == ("add_rms_norm.y", "add_rms_norm.h")
    assert all("add_rms_norm.h" not in refs(step.args) for step in program.steps)


def test_steps_keep_their_layer_and_the_line_of_the_model() -> None:
    steps = compiled("tiny").programs["prefill"].steps

    (attention,) = (step for step in steps if step.op == "lingc.mla_attention")

    assert attention.layer == 3
    assert attention.source.startswith("blocks.py:")


def test_the_size_of_an_axis_may_be_an_argument() -> None:
    program = fused()
    (tokens,) = (n for n in program.placeholders("input") if n.meta["name"] == "positions")
    with program.graph.inserting_before(output(program)):
        size = program.graph.call_function(aten.sym_size.int, (tokens, 0))
    size.meta.update(type="T", layer=-1, source="")
    (embedding,) = calls(program, "lingc.embedding")
    kind = TensorType("f32", ("T", 8, 8))
    plant(program, aten.reshape.default, embedding, [size, 8, 8], kind=kind)

    steps = lowered(program).programs["draft"].steps

    (reshape,) = (step for step in steps if step.outputs == ("reshape",))
    assert reshape.args == (Ref("embedding"), (Size("T"), 8, 8))


def test_refuses_keyword_arguments() -> None:
    program = fused()
    (embedding,) = calls(program, "lingc.embedding")
    plant(program, aten.add.Tensor, embedding, embedding, kind=embedding.meta["type"], alpha=2)

    with pytest.raises(StageError, match=r"add_tensor = .*model\.py:41\) has keyword arguments"):
        lowered(program)


def test_refuses_an_argument_that_no_plan_can_hold() -> None:
    program = fused()
    (embedding,) = calls(program, "lingc.embedding")
    plant(program, aten.reshape.default, embedding, torch.float32, kind=embedding.meta["type"])

    with pytest.raises(StageError, match=r"argument torch\.float32 has no form in a plan"):
        lowered(program)


def test_refuses_a_value_that_nothing_makes() -> None:
    program = fused()
    (embedding,) = calls(program, "lingc.embedding")
    build = Builder(program, embedding)
    with program.graph.inserting_before(embedding):
        build.slice(embedding, 1, 0, 8)

    with pytest.raises(StageError, match=r"embedding.* is read before it is made"):
        lowered(program)


def test_weights_are_laid_out_where_our_own_kernels_are_launched() -> None:
    plain, laid = (compiled("whole-blocks", "int4-all", t).weights for t in ("rtx-120", "h20"))

    assert {spec.layout for spec in plain.values()} == {"plain"}
    assert {
        name: laid[f"layers.1.{name}"].layout
        for name in (
            "attention.qkvg.weight_packed",
            "attention.qkvg.weight_scale",
            "mlp.all_experts.gate_up_packed",
            "mlp.all_experts.gate_up_scale",
            "mlp.gate.weight",
        )
    } == {
        "attention.qkvg.weight_packed": "tiled",
        "attention.qkvg.weight_scale": "tiled_scales",
        "mlp.all_experts.gate_up_packed": "tiled_gated",
        "mlp.all_experts.gate_up_scale": "tiled_gated_scales",
        "mlp.gate.weight": "plain",
    }


def test_a_matrix_that_cannot_have_its_layout_stays_plain_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = compiled.__wrapped__("odd", "bf16", "h20")

    assert plan.weights["lm_head.weight"].layout == "plain"
    assert re.search(
        r"h20 has no kernels for \d+ of \d+ weights, such as layers\.\d[^:]*: "
        r"\d+ rows are not a multiple of 16",
        caplog.text,
    )


def test_refuses_a_weight_that_two_ops_want_in_two_layouts() -> None:
    program = fused("draft", "bf16", "h20")
    (head, *_) = (n for n in calls(program, "lingc.fused_linear") if n.args[7] == "swiglu")
    (down, *_) = (n for n in calls(program, "lingc.fused_linear") if n.args[6] == "none")
    down.args = (*down.args[:3], head.args[3], *down.args[4:])

    with pytest.raises(StageError, match=r"wants layers_4_mlp_\w+ in another layout"):
        lower({"draft": program}, context("tiny", "draft", "bf16", "h20"), SIZES)


def test_refuses_a_weight_that_two_phases_make_differently() -> None:
    decode, draft = fused("decode"), fused("draft")
    node = draft.weights["lm_head.weight"]
    node.meta["weight"] = replace(node.meta["weight"], sources=("other",))

    with pytest.raises(StageError, match=r"two phases want weight 'lm_head\.weight' made diff"):
        lower({"decode": decode, "draft": draft}, context("tiny", "decode"), SIZES)
