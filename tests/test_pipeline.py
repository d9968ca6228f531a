"""The ordered pipeline: every rule fires as often as the config says, or the build says why not."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc import pipeline
from lingc.errors import FusionError, StageError
from lingc.graph import Captured, Program
from lingc.pipeline import Line, Report, sentence
from lingc.quantize.recipes import built_in
from lingc.rewrite import Builder, Refusal
from tests.evaluate import assert_same
from tests.programs import CHANGES, EVERYDAY, YARN, calls, captured, context, names, output, phases

aten = torch.ops.aten

EVERY_MODEL = [
    pytest.param(model, marks=[] if model in EVERYDAY else pytest.mark.long) for model in CHANGES
]
EVERY_RECIPE = [
    pytest.param(recipe, marks=[] if recipe in ("bf16", "fp8-max") else pytest.mark.long)
    for recipe in built_in()
]


@pytest.mark.parametrize("precision", EVERY_RECIPE)
@pytest.mark.parametrize("target", ["cpu", "h20"])
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_every_rule_fires_as_the_config_says(model: str, target: str, precision: str) -> None:
    report = Report()

    for phase in phases(model):
        about = context(model, phase, precision, target)
        pipeline.run(captured(model, phase), about, report, check=True)

    assert [line for line in report.lines if line.missed] == []
    assert len(report.lines) == len(phases(model)) * sum(len(s.rules) for s in pipeline.PIPELINE)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("int4-all", marks=pytest.mark.long)])
@pytest.mark.parametrize("model", EVERY_MODEL)
def test_all_rules_together_keep_the_numbers(model: str, precision: str) -> None:
    for phase in phases(model):
        about = context(model, phase, precision)
        fused = pipeline.run(captured(model, phase), about, Report())

        assert_same(fused, captured(model, phase), model, layout=precision)


@st.composite
def legal_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that a config may have together; many are not a power of two, or 1."""
    heads = draw(st.integers(1, 5))
    head_dim = draw(st.sampled_from([2, 4, 6, 10, 16, 64]))
    rotary = draw(st.sampled_from(range(2, head_dim + 1, 2)))
    groups, in_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 4))
    width = heads * head_dim
    return {
        "hidden_size": draw(st.sampled_from([1, 8, 36, 128, 130])),
        "num_hidden_layers": layers,
        "layer_group_size": draw(st.integers(1, 5)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "partial_rotary_factor": rotary / head_dim,
        "group_norm_size": draw(
            st.sampled_from([n for n in range(1, width + 1) if width % n == 0])
        ),
        "q_lora_rank": draw(st.sampled_from([None, 1, 24, 128])),
        "kv_lora_rank": draw(st.sampled_from([1, 16, 128])),
        "qk_nope_head_dim": draw(st.sampled_from([1, 6, 16])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 8])),
        "v_head_dim": draw(st.sampled_from([1, 5, 16])),
        "rope_scaling": draw(st.sampled_from([None, YARN])),
        "intermediate_size": draw(st.sampled_from([1, 50, 128])),
        "num_experts": groups * in_group,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, kept * in_group)),
        "moe_intermediate_size": draw(st.sampled_from([1, 9, 128])),
        "num_shared_experts": draw(st.integers(0, 2)),
        "moe_shared_expert_intermediate_size": draw(st.sampled_from([1, 40, 128])),
        "norm_topk_prob": draw(st.booleans()),
    }


@pytest.mark.long
@settings(max_examples=8)
@given(changes=legal_changes(), target=st.sampled_from(["cpu", "h20"]), data=st.data())
def test_any_legal_model_goes_through_with_its_numbers(
    changes: dict[str, Any], target: str, data: st.DataObject
) -> None:
    model = f"drawn {json.dumps(changes, sort_keys=True)}"
    CHANGES[model] = changes
    precision = data.draw(st.sampled_from(built_in()))

    for phase in phases(model):
        about = context(model, phase, precision, target)
        fused = pipeline.run(captured(model, phase), about, Report(), check=True)
        if target == "cpu":
            assert_same(fused, captured(model, phase), model, layout=precision)


def run(program: Program, **options: Any) -> Report:
    """Run the pipeline over a phase of the tiny model."""
    report = Report()
    pipeline.run(Captured(program), context("tiny", program.phase), report, **options)
    return report


def tap(program: Program, name: str) -> None:
    """Let somebody outside read a call's first result."""
    (node, *_) = calls(program, name)
    with program.graph.inserting_before(output(program)):
        build = Builder(program, node)
        first = build.items(node)[0] if isinstance(node.meta["type"], tuple) else node
        part = build.call(aten.slice.Tensor, first, 0, 0, 1, type=first.meta["type"])
    output(program).args = ((*program.results()[:2], part, *program.results()[2:]),)
    program.outputs = (*program.outputs, "tap")


def test_a_missed_fusion_fails_with_its_reason_and_the_line_of_the_model() -> None:
    program = captured("tiny", "prefill")
    tap(program, "aten.silu.default")

    with pytest.raises(FusionError) as raised:
        run(program)

    assert raised.value.exit_code == 8
    assert "fusion missed in the prefill phase:\n  - fuse_silu_mul: expected 4, found 3; " in str(
        raised.value
    )
    assert "refused at mul_" in str(raised.value)
    assert "(layer 0, moe.py:" in str(raised.value)
    assert "aten.silu.default is also read by slice_tensor" in str(raised.value)
    assert raised.value.hint == (
        "waive it with `--waive fuse_silu_mul` to build a slower engine all the same"
    )


def test_a_pattern_that_no_longer_matches_is_named_with_the_nearest_place() -> None:
    program = captured("tiny", "decode")
    (softmaxed,) = calls(program, "aten.scaled_dot_product_attention.default")
    softmaxed.args = (*softmaxed.args[:4], 0.5)

    with pytest.raises(
        FusionError, match=r"fuse_mla_attention: expected 1, found 0; nearest:"
    ) as e:
        run(program)

    assert "expected 0.0, found 0.5; in scaled_dot_product_attention" in str(e.value)
    assert "(layer 3, blocks.py:" in str(e.value)


def test_a_fusion_may_be_waived_where_what_is_left_has_a_slower_form() -> None:
    program = captured("tiny", "decode")
    tap(program, "lingc.lightning_decode")

    report = run(program, waive=["fuse_decode_mixer"])

    (line,) = (line for line in report.lines if line.missed)
    assert (line.name, line.expected, line.found, line.waived) == ("fuse_decode_mixer", 3, 2, True)
    assert {"lingc.lightning_decode", "lingc.qk_norm_rope"} <= set(names(program))


def test_a_waived_build_computes_the_same() -> None:
    program, whole = captured("tiny", "decode"), captured("tiny", "decode")
    for one in (program, whole):
        tap(one, "lingc.lightning_decode")

    run(program, waive=["fuse_decode_mixer"])

    assert_same(program, whole, "tiny")


def test_one_waiver_covers_no_other_rule() -> None:
    program = captured("tiny", "decode")
    tap(program, "lingc.lightning_decode")

    with pytest.raises(FusionError, match="fuse_decode_mixer: expected 3, found 2"):
        run(program, waive=["fuse_silu_mul"])


def test_a_waived_fusion_without_a_slower_form_says_what_is_left_and_why() -> None:
    program = captured("tiny", "prefill")
    tap(program, "aten.silu.default")

    with pytest.raises(StageError, match="is left over: no engine kind lowers it") as raised:
        run(program, waive=["fuse_silu_mul"])

    assert "silu = aten.silu.default (layer 0, moe.py:" in str(raised.value)
    assert str(raised.value).startswith(
        "nothing lowers what these leave where they did not fire:\n  - fuse_silu_mul: expected 4"
    )


def test_the_report_is_there_when_a_fusion_is_missed() -> None:
    program, report = captured("tiny", "prefill"), Report()
    tap(program, "aten.silu.default")

    with pytest.raises(FusionError, match="fuse_silu_mul"):
        pipeline.run(program, context("tiny", "prefill"), report)

    (line,) = (line for line in report.lines if line.missed)
    assert (line.phase, line.stage, line.name) == ("prefill", "fuse", "fuse_silu_mul")
    assert "also read by" in line.refused[0].reason


def test_shows_the_program_after_each_stage() -> None:
    shown: dict[str, set[str]] = {}

    run(captured("tiny", "prefill"), dump=lambda stage, now: shown.update({stage: {*names(now)}}))

    assert [*shown] == ["captured", "canonicalize", "fuse", "quantize", "launch"]
    assert "aten.split.Tensor" in shown["captured"] - shown["canonicalize"]
    assert "lingc.router" in shown["fuse"] - shown["canonicalize"]
    assert "aten.linear.default" in shown["fuse"] - shown["quantize"]


def test_a_program_that_breaks_its_contract_is_not_touched() -> None:
    program = captured("tiny", "draft")
    (embedding,) = calls(program, "aten.embedding.default")
    embedding.meta["type"] = None

    with pytest.raises(StageError, match="the draft program is not captured"):
        run(program)


def test_a_contract_is_checked_after_every_rule_on_request() -> None:
    program = captured("tiny", "draft")
    seen: list[str] = []

    report = run(program, check=True, dump=lambda stage, _program: seen.append(stage))

    assert len(seen) == 5
    assert all(not line.missed for line in report.lines)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "fuse_x: expected 3, found 1"),
        ({"near_miss": "expected a, found b"}, "{}; nearest: expected a, found b"),
        ({"refused": 1}, "{}; refused at n = op (m.py:1): too wide"),
        ({"refused": 3}, "{}; refused at n = op (m.py:1) (and 2 more): too wide"),
    ],
)
def test_says_in_a_sentence_why_a_rule_fell_short(changes: dict[str, Any], said: str) -> None:
    refusal = Refusal(rule="fuse_x", reason="too wide", place="n = op (m.py:1)")
    more = {**changes, "refused": (refusal,) * changes.get("refused", 0)}
    line = Line(phase="prefill", stage="fuse", name="fuse_x", expected=3, found=1, **more)

    assert sentence(line) == said.format("fuse_x: expected 3, found 1")


def test_more_often_than_expected_is_a_miss_too() -> None:
    line = Line(phase="prefill", stage="fuse", name="fuse_x", expected=3, found=4)
    cleaning = Line(phase="prefill", stage="fuse", name="drop_x", expected=None, found=4)

    assert (line.missed, cleaning.missed) == (True, False)


def test_every_rule_has_a_name_of_its_own() -> None:
    assert len(pipeline.names()) == len({*pipeline.names()})
    assert "fuse_router" in pipeline.names()
