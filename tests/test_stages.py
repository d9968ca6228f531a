"""Contracts of the stages: what breaks them is listed, with its node and the line of the model."""

import operator
import re
from typing import Any

import pytest
import torch
from torch import fx

from lingc import stages
from lingc.errors import StageError
from lingc.graph import Program
from lingc.passes import (
    canonicalize_calls,
    fuse_embedding,
    fuse_quantize,
    gather_rows,
)
from lingc.plan import TensorType
from lingc.rewrite import Builder
from tests.programs import before, calls, captured, copy, fire, output

aten = torch.ops.aten
KIND = TensorType("f32", ("T", 64))


def plant(program: Program, target: Any, *args: Any, kind: Any = KIND) -> fx.Node:
    """A call before the program's end."""
    with program.graph.inserting_before(output(program)):
        node = program.graph.call_function(target, args)
    node.meta.update(type=kind, layer=2, source="model.py:41")
    return node


def embedding(program: Program) -> fx.Node:
    return next(n for n in program.calls() if "embedding" in str(n.target))


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "draft"])
def test_what_capture_gives_is_captured(phase: str) -> None:
    stages.check(captured("tiny", phase), "captured")


def test_a_contract_is_named_with_everything_that_breaks_it() -> None:
    program = captured("tiny", "draft")
    x = embedding(program)
    plant(program, torch.relu, x)
    plant(program, aten.relu_.default, x)
    plant(program, torch.ops.lingc.silu_mul.default, x)
    plant(program, aten.relu.default, x, kind=None)

    expected = (
        "the draft program is not captured:"
        "\n  - relu_1 = relu (layer 2, model.py:41) is neither ATen nor an op of ours"
        "\n  - relu__default = aten.relu_.default (layer 2, model.py:41) changes its input"
        "\n  - silu_mul_default = lingc.silu_mul (layer 2, model.py:41) is a fused op in a"
        " captured program"
        "\n  - relu_default = aten.relu.default (layer 2, model.py:41) has no type"
        "\nhint: run `lingc passes` to see which rewrite did not fire, and why"
    )
    with pytest.raises(StageError, match="not captured") as raised:
        stages.check(program, "captured")
    assert re.sub(r"relu(_\d)? = relu", "relu_1 = relu", str(raised.value)) == expected


def test_a_long_list_is_cut() -> None:
    program = captured("tiny", "draft")
    x = embedding(program)
    for _ in range(25):
        plant(program, aten.relu_.default, x)

    with pytest.raises(StageError, match=r"\n  - and 5 more\n"):
        stages.check(program, "captured")


def test_a_node_that_is_no_call_breaks_every_contract() -> None:
    program = captured("tiny", "draft")
    with program.graph.inserting_before(output(program)):
        program.graph.get_attr("weight").meta.update(layer=-1, source="")

    with pytest.raises(StageError, match=r"weight = get_attr \(no source line\) is a get_attr"):
        stages.check(program, "captured")


def test_sizes_may_be_computed() -> None:
    program = captured("tiny", "draft")
    plant(program, operator.floordiv, 40, 5, kind="8")

    stages.check(program, "captured")


def test_canonical_has_one_spelling() -> None:
    program = fire(canonicalize_calls.RULES[-1], "tiny", "draft").after
    stages.check(program, "canonical")

    changed = before(fuse_embedding.RULE, "tiny", "draft")
    plant(changed, aten.view.default, embedding(changed), [-1, 8])

    with pytest.raises(StageError, match=r"aten\.view\.default .* has a canonical spelling"):
        stages.check(changed, "canonical")


def test_fused_leaves_linears_alone_to_the_next_stage() -> None:
    program = fire(fuse_embedding.RULE, "tiny", "draft").after

    stages.check(program, "fused")

    with pytest.raises(StageError, match=r"aten\.linear\.default .* is left over"):
        stages.check(program, "legal")


def test_a_structural_op_is_not_lowered() -> None:
    program = fire(fuse_embedding.RULE, "tiny", "draft").after
    plant(program, torch.ops.lingc.expert_dispatch.default, *6 * [embedding(program)])

    with pytest.raises(StageError, match=r"lingc\.expert_dispatch .*: no engine kind lowers it"):
        stages.check(program, "fused")


def test_gpu_kernels_are_chosen_after_formats() -> None:
    program = fire(fuse_embedding.RULE, "tiny", "draft").after
    x = embedding(program)
    plant(program, torch.ops.lingc.expert_down.default, *[x] * 8, "bf16", 0, 0)

    with pytest.raises(StageError, match=r"lingc\.expert_down .* before formats are chosen"):
        stages.check(program, "fused")


def test_what_a_gpu_kernel_takes_in_is_not_launched() -> None:
    program = copy(fire(gather_rows.RULE, "tiny", "draft", "bf16", "h20").after)
    stages.check(program, "launched")

    (norm, *_) = calls(program, "lingc.rms_norm")
    weight = program.weights["layers.4.mlp.gate.weight"]
    kind = TensorType("bf16", ("T", 16))
    plant(program, torch.ops.lingc.linear.default, norm, weight, kind=kind)

    with pytest.raises(StageError, match=r"lingc\.linear .*: no GPU kernel of its own computes"):
        stages.check(program, "launched")


def test_a_type_must_be_what_the_op_says() -> None:
    program = before(fuse_quantize.SWIGLU_RULE, "tiny", "draft")
    stages.check(program, "legal")
    (silu,) = calls(program, "lingc.silu_mul")
    silu.meta["type"] = TensorType("bf16", ("T", 40))

    with pytest.raises(StageError, match=r"is bf16\[T, 40\], its op says f32\[T, 40\]"):
        stages.check(program, "legal")


@pytest.mark.parametrize(("dtype", "narrow"), [("f32", "f32"), ("bf16", "bf16")])
def test_activations_and_their_states_take_the_element_type(dtype: str, narrow: str) -> None:
    target = {"f32": "cpu", "bf16": "h20"}[dtype]
    program = fire(fuse_embedding.RULE, "tiny", "verify", "bf16", target).after

    stages.retype(program, dtype)

    states = {n.meta["name"]: n.meta["type"].dtype for n in program.placeholders("state")}
    logits, hidden, *_ = (node.meta["type"].dtype for node in program.results())
    assert states["linear_state.0"] == "f32"
    assert states["pending_k.0"] == states["latent_cache.3"] == narrow
    assert (logits, hidden) == ("f32", narrow)


def test_the_hidden_state_that_a_draft_takes_has_the_element_type() -> None:
    program = fire(fuse_embedding.RULE, "tiny", "draft", "bf16", "h20").after

    stages.retype(program, "bf16")

    inputs = {n.meta["name"]: n.meta["type"].dtype for n in program.placeholders("input")}
    assert inputs["hidden"] == "bf16"
    assert inputs["positions"] == "i32"
    assert {node.meta["type"].dtype for node in calls(program, "aten.cat.default")} == {"bf16"}


def test_builders_and_contracts_agree_on_views() -> None:
    program = fire(fuse_embedding.RULE, "tiny", "prefill").after
    build = Builder(program, embedding(program))

    with program.graph.inserting_before(output(program)):
        part = build.slice(embedding(program), 1, 0, 8)
        build.cat(part, part)

    stages.check(program, "fused")
