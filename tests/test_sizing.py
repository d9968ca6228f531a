"""Sizes by config are the sizes of compiled plans, and those that were published."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc import targets
from lingc.capture import Capturer, Sizes
from lingc.compile import Request, compile_plan, default_precision
from lingc.errors import RecipeError, UsageError
from lingc.model.config import ModelConfig
from lingc.plan import DTYPE_BYTES, Plan, refs
from lingc.quantize.recipes import built_in, load_recipe, parse_recipe
from lingc.runtime import generate, onnx_backend
from lingc.sizing import Sizing, distinct_experts, memory, own_precision, weights
from lingc.sizing.estimate import MARGIN, PREPACKED_LIMIT_BYTES
from lingc.targets.onnx import lower
from lingc.targets.onnx.weights import LARGEST_WIDENED_BYTES

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "artifacts" / "checkpoints"
FULL = ModelConfig.from_file(CHECKPOINTS / "ling-2.6-flash")
TINY = ModelConfig.from_file(CHECKPOINTS / "ling-tiny")

Values = dict[str, Any]

# No width is a multiple of an FP8 block, so that merging is refused where blocks would be shared.
UNALIGNED: Values = {
    "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_kv_heads_for_linear_attn": 4, "head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 4, "v_head_dim": 12, "intermediate_size": 80,
    "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 56, "vocab_size": 4096,
}  # fmt: skip
# Queries of one matrix, two dense layers, a short last group, no MTP.
ODD: Values = {
    **UNALIGNED, "num_hidden_layers": 6, "q_lora_rank": None, "first_k_dense_replace": 2,
    "num_attention_heads": 3, "num_key_value_heads": 3, "num_kv_heads_for_linear_attn": 3,
    "num_shared_experts": 2, "group_norm_size": 3, "num_nextn_predict_layers": 0,
}  # fmt: skip
CONFIGS: Mapping[str, Callable[[], ModelConfig]] = {
    "unaligned": lambda: changed(UNALIGNED),
    "odd": lambda: changed(ODD),
    "ling-tiny": lambda: TINY,
    "ling-2.6-flash": lambda: FULL,
}
SIZES = Sizes(page_size=16, max_draft=2)


def changed(values: Values) -> ModelConfig:
    return ModelConfig.from_dict({**TINY.raw, **values})


def sizing(config: ModelConfig, precision: str, target: str = "h20", **given: Any) -> Sizing:
    given.setdefault("has_mtp", config.has_mtp)
    recipe, device = load_recipe(precision), targets.get(target)
    return Sizing(config=config, recipe=recipe, target=device, **given)


@cache
def _capturer(name: str) -> Capturer:
    return Capturer(CONFIGS[name](), SIZES)


@cache
def compiled(name: str, precision: str, target: str = "h20") -> Plan:
    config = CONFIGS[name]()
    return compile_plan(
        config,
        load_recipe(precision),
        targets.get(target),
        has_mtp=config.has_mtp,
        request=Request(sizes=SIZES),
        capturer=_capturer(name),
    ).plan


# ------------------------------------------------------------------------------- as in the plan


def check_against_plan(name: str, precision: str, target: str = "h20") -> None:
    plan, config = compiled(name, precision, target), CONFIGS[name]()
    sizes: Any = {"page_size": SIZES.page_size, "max_draft": SIZES.max_draft}
    found = sizing(config, precision, target, **sizes)

    assert found.specs == dict(plan.weights)
    assert found.stored_bytes == sum(spec.type.bytes() for spec in plan.weights.values())
    assert {phase: set(specs) for phase, specs in found.phases.items()} == {
        phase: set(program.weights) for phase, program in plan.programs.items()
    }
    states = memory.state_types(
        config, plan.activation, max_draft=SIZES.max_draft, has_mtp=config.has_mtp
    )
    assert states == dict(plan.states)
    needed = found.memory(3, 20)  # two pages a sequence
    assert needed.state + needed.cache == sum(
        kind.bytes({"S": 3 + 1, "R": 3 * 2 * SIZES.page_size + 1}) for kind in plan.states.values()
    )


@pytest.mark.parametrize("precision", built_in())
def test_weights_and_state_are_those_of_the_plan(precision: str) -> None:
    check_against_plan("unaligned", precision)


def test_static_scales_of_tensorrt_are_those_of_the_plan() -> None:
    check_against_plan("unaligned", "fp8-static", "spark")


@pytest.mark.long
@pytest.mark.parametrize("precision", built_in())
@pytest.mark.parametrize("name", ["odd", "ling-tiny", "ling-2.6-flash"])
def test_weights_and_state_of_more_models_are_those_of_the_plan(name: str, precision: str) -> None:
    check_against_plan(name, precision)


def peak_bytes(plan: Plan, phase: str, sizes: Mapping[str, int]) -> int:
    """The most that lives between ops; slices and reshapes are views."""
    program = plan.programs[phase]
    views = {"aten.slice.Tensor", "aten.reshape.default"}
    owner: dict[str, str] = {}
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        if step.op in views:
            owner[step.outputs[0]] = next(refs(step.args))
        for name in (*refs(step.args), *step.outputs):
            root = name
            while root in owner:
                root = owner[root]
            last[root] = index
    kept = {*plan.states, *program.updates.values(), *program.weights, *program.inputs}
    live: dict[str, int] = {}
    peak = 0
    for index, step in enumerate(program.steps):
        if step.op not in views:
            made = set(step.outputs) - kept
            live.update((name, program.types[name].bytes(sizes)) for name in made)
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last[name] > index}
    return peak


def check_workspace(name: str) -> None:
    plan, config, h20 = compiled(name, "bf16"), CONFIGS[name](), targets.get("h20")
    prefill = memory.Step(tokens=512, sequences=1, context=512, logits=1, is_absorbed=False)
    decode = memory.Step(tokens=16, sequences=16, context=512, logits=16)
    for phase, step in (("prefill", prefill), ("decode", decode)):
        sizes = {"T": step.tokens, "B": step.sequences, "B+1": step.sequences + 1, "N": step.logits}
        sizes |= {"S": 1, "R": 1, "P": 1}
        peak = peak_bytes(plan, phase, sizes)

        estimate = memory.workspace_bytes(config, h20, step, 1)

        assert peak <= estimate <= 4 * peak, f"{phase}: {peak} live, {estimate} estimated"


def test_workspace_covers_what_lives_between_ops() -> None:
    check_workspace("unaligned")


@pytest.mark.long
def test_workspace_covers_what_lives_between_ops_of_the_full_model() -> None:
    check_workspace("ling-2.6-flash")


@pytest.mark.parametrize("widen", ["load", "step"])
@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "int4-all"])
def test_a_cpu_holds_weights_in_the_form_of_its_engine(precision: str, widen: str) -> None:
    plan = compiled("unaligned", precision, "cpu")
    held: dict[bool, int] = {True: 0, False: 0}
    item = {**DTYPE_BYTES, "f16": 2}
    for made in lower(plan, widen=widen).info["initializers"]:
        count = 1
        for size in made["shape"]:
            count *= size
        held[made["load"] in {"as_stored", "as_bytes"}] += count * item[made["dtype"]]

    needed = sizing(CONFIGS["unaligned"](), precision, "cpu", widen=widen).memory(1, 1)

    assert needed.mapped == held[True]
    assert needed.weights - needed.mapped == held[False]


def test_limits_are_those_of_the_engines() -> None:
    assert generate.PREFILL_TOKENS == memory.PREFILL_TOKENS
    assert memory.WIDEN_LIMIT_BYTES == LARGEST_WIDENED_BYTES
    assert PREPACKED_LIMIT_BYTES == onnx_backend.PREPACKED_BYTES


def test_a_joined_shared_expert_counts_as_shared() -> None:
    joined, apart = (sizing(FULL, "fp8", target).part_bytes() for target in ("h20", "rtx-120"))

    assert joined.keys() == apart.keys()
    for part, (held, read) in joined.items():
        assert held == apart[part][0]
        assert read == pytest.approx(apart[part][1])


@pytest.mark.parametrize("method", [None, "fp8", "compressed-tensors"])
def test_the_own_precision_is_what_a_build_takes(method: str | None) -> None:
    given = {} if method is None else {"quantization_config": {"quant_method": method}}
    config = changed(given)

    assert own_precision(config) == default_precision(None, config)


# ------------------------------------------------------------------------------------- published


@pytest.mark.parametrize(
    ("precision", "gigabytes"),
    [
        ("bf16", (13.611, 31.2, 86.9, 181, 207)),
        ("fp8", (7.573, 16.4, 44.2, 91.2, 104)),
        ("int4", (9.126, 14.1, 29.7, 56.2, 63.5)),
    ],
)
def test_a_step_reads_what_the_release_reads(precision: str, gigabytes: tuple[float, ...]) -> None:
    found = sizing(FULL, precision)

    read = [found.traffic(batch, 0).weights / 1e9 for batch in (1, 4, 16, 64, 256)]

    assert read == pytest.approx(gigabytes, rel=3e-3)
    assert read[0] == pytest.approx(gigabytes[0], abs=6e-4)


def test_expected_distinct_experts() -> None:
    found = [distinct_experts(FULL, tokens) for tokens in (1, 4, 16, 64, 256)]

    assert found == pytest.approx([8, 30.5, 102, 222, 256], rel=5e-3)


@pytest.mark.parametrize(
    ("precision", "gigabytes", "even"), [("bf16", 1.662, 2.66), ("fp8", 1.498, 2.75)]
)
def test_a_draft_reads_what_the_mtp_layer_reads(
    precision: str, gigabytes: float, even: float
) -> None:
    found = sizing(FULL, precision)
    draft, verify = found.draft_bytes(1, 0), found.traffic(1, 0, queries=4).weights

    assert draft / 1e9 == pytest.approx(gigabytes, abs=6e-4)
    assert (3 * draft + verify) / found.traffic(1, 0).weights == pytest.approx(even, abs=0.01)


def test_state_and_cache_of_the_full_model() -> None:
    found = sizing(FULL, "fp8", has_mtp=False)
    states = memory.state_types(FULL, "bf16", max_draft=3, has_mtp=False)
    one, two = (found.memory(1, context).cache for context in (4096, 8192))

    assert memory.state_bytes(states, "linear_state", 1, 1) == 56 * 2**20
    assert two - one == 4096 * 4608
    assert found.traffic(1, 0).state == 2 * 56 * 2**20


@pytest.mark.parametrize(
    ("precision", "target", "ranks", "verdict"),
    [
        ("fp8", "h20", 1, "no"),
        ("fp8", "h20-3e", 1, "fits"),
        ("fp8", "h100-sxm", 2, "fits"),
        ("int4", "h100-sxm", 1, "fits"),
        ("int4-fp8", "h100-sxm", 1, "fits"),
        ("bf16", "h20-3e", 1, "no"),
        ("bf16", "h20-3e", 2, "fits"),
        ("bf16", "rtx-120", 1, None),
    ],
)
def test_what_fits_where(precision: str, target: str, ranks: int, verdict: str | None) -> None:
    found = sizing(FULL, precision, target, ranks=ranks)

    assert found.verdict(found.memory(1, 4096)) == verdict


# -------------------------------------------------------------------------------------- what fits


@settings(max_examples=40)
@given(context=st.integers(1, 20_000), gigabytes=st.floats(0.01, 2), mtp=st.booleans())
def test_the_largest_batch_fits_and_the_next_does_not(
    context: int,
    gigabytes: float,
    mtp: bool,  # noqa: FBT001 hypothesis names it
) -> None:
    found = sizing(TINY, "int4", has_mtp=mtp, memory_bytes=int(gigabytes * 1e9))

    most = found.largest_batch(context)

    assert most is not None
    assert most == 0 or found.verdict(found.memory(most, context)) == "fits"
    assert found.verdict(found.memory(most + 1, context)) != "fits"


@settings(max_examples=40)
@given(batch=st.integers(1, 64), gigabytes=st.floats(0.01, 2))
def test_the_largest_context_fits_and_the_next_does_not(batch: int, gigabytes: float) -> None:
    found = sizing(TINY, "int4", memory_bytes=int(gigabytes * 1e9))

    most = found.largest_context(batch)

    assert most is not None
    assert most == 0 or found.verdict(found.memory(batch, most)) == "fits"
    assert found.verdict(found.memory(batch, most + 1)) != "fits"


def test_a_narrow_fit_is_called_tight() -> None:
    total = sizing(TINY, "bf16").memory(1, 64).total
    narrow = sizing(TINY, "bf16", memory_bytes=round(total / (1 - MARGIN / 2)))

    assert narrow.verdict(narrow.memory(1, 64)) == "tight"


def test_what_is_not_known_is_not_judged() -> None:
    found = sizing(TINY, "bf16", "cpu")

    assert found.verdict(found.memory(1, 64)) is None
    assert found.largest_batch(64) is None
    assert found.largest_context(1) is None
    assert found.tokens_per_s(1, 64) is None


# --------------------------------------------------------------------------------- several ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("precision", built_in())
def test_ranks_share_what_has_an_axis_and_repeat_the_rest(precision: str, ranks: int) -> None:
    specs = sizing(FULL, precision).specs

    for spec in specs.values():
        share, whole = weights.share_bytes(spec, ranks), spec.type.bytes()

        if spec.shard_axis is None:
            assert share == whole, spec.name
        elif not spec.name.startswith("lm_head"):
            assert share * ranks == whole, spec.name
        else:  # its last block of rows is not the same for all
            assert whole <= share * ranks < whole * 1.01, spec.name


def test_linear_state_is_split_and_the_cache_is_not() -> None:
    one, four = (sizing(FULL, "fp8", ranks=ranks).memory(8, 4096) for ranks in (1, 4))

    assert four.state * 4 == one.state
    assert four.cache == one.cache
    assert four.weights < one.weights / 3.9


def test_no_block_of_scales_is_cut() -> None:
    spec = next(s for s in sizing(TINY, "fp8").specs.values() if s.name.endswith("down_proj_codes"))

    # 128 columns are one block: a second rank gets none of them.
    assert weights.share_bytes(spec, 2) == spec.type.bytes()


def test_heads_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(UsageError, match="tp 3 does not divide the 32 attention heads"):
        sizing(FULL, "fp8", ranks=3)


def test_a_cpu_has_no_ranks() -> None:
    with pytest.raises(UsageError, match="tp 2 is for several GPUs"):
        sizing(TINY, "bf16", "cpu", ranks=2)


# ------------------------------------------------------------------------------------- what not


def test_drafts_need_an_mtp_layer() -> None:
    with pytest.raises(UsageError, match="the model has no MTP layer"):
        sizing(changed(ODD), "bf16", has_mtp=True)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.*.attention.kv_b_proj", "which cannot be cut"),
        ("model.layers.*.mlp.experts.*.gate_proj", "an expert of layer 1 differently"),
    ],
)
def test_what_cannot_be_compiled_is_not_planned(module: str, message: str) -> None:
    value = {"name": "mine", "rules": [{"modules": [module], "format": "fp8_block"}]}
    recipe = parse_recipe(value, source="mine.json")

    with pytest.raises(RecipeError, match=message):
        Sizing(config=TINY, recipe=recipe, target=targets.get("h20"), has_mtp=True)
