"""The function of every op, in both libraries, gives what the op's reference gives."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lingc.compare import assert_close
from lingc.op import DTYPE_NAME, Mechanism, Op
from lingc.plugins.table import OPS
from lingc.stages import LAUNCHED_OPS
from lingc.targets.onnx.functions import FUNCTIONS
from tests.onnx.one_op import run_op

MECHANISMS: dict[str, Mechanism] = {
    "qk_norm_rope": "rope",
    "mla_query_rope": "rope",
    "mla_latent": "rope",
    "mla_latent_kv": "rope",
    "fp8_linear": "fp8_gemm",
    "fp8_linear_f32": "fp8_gemm",
    "fp8_experts": "fp8_gemm",
    "mla_attention": "attention",
    "mla_absorbed_attention": "attention",
    "lightning_prefill": "lightning",
    "lightning_decode": "lightning",
    "lightning_verify": "lightning",
    "decode_mixer": "lightning",
    "verify_mixer": "lightning",
    "router": "router",
}
SCRATCH = frozenset({"state", "pending_k", "pending_v", "cache"})
"""Results whose last row is scratch."""

EXPERTS = [name for name in FUNCTIONS if name.endswith("experts")]
HEAVY = [*EXPERTS, *(n for n in FUNCTIONS if "linear" in n or "attention" in n or n == "router")]
"""Ops with matrices among their weights, which may be widened in the step."""

LIBRARIES = ("ort", "standard")
EVALUATED = (
    "rms_norm", "add_rms_norm", "linear", "qk_norm_rope", "group_norm_gate", "silu_mul",
    "lightning_prefill", "decode_mixer", "verify_mixer", "mla_latent", "mla_query_rope",
    "mla_attention", "mla_absorbed_attention", "router", "experts", "int4_weight_linear",
)  # fmt: skip


def mechanism(op: str) -> Mechanism:
    if op in MECHANISMS:
        return MECHANISMS[op]
    if op.endswith("experts"):
        return "experts"
    return "gemm" if "linear" in op else "elementwise"


def result_names(op: Op) -> list[str]:
    """Names of the results, as the schema has them; `Tensor` for one without a name."""
    made = op.schema.partition("->")[2].strip(" ()")
    return [part.split()[-1] for part in made.split(",")]


def check(op: Op, args: tuple[Any, ...], **options: Any) -> None:
    """Hold an op's function against its reference."""
    want = op.reference(*args)
    got = run_op(op, args, **options)
    expected: tuple[Tensor, ...] = want if isinstance(want, tuple) else (want,)
    for name, found, value in zip(result_names(op), got, expected, strict=True):
        rows = slice(0, -1) if name in SCRATCH else slice(None)
        dtype = DTYPE_NAME[value.dtype]
        kind = "elementwise" if dtype == "f8e4m3" else mechanism(op.name)
        assert_close(found[rows], value[rows], dtype=dtype, mechanism=kind)


def example(name: str, *case: Any) -> tuple[Any, ...]:
    return OPS[name].inputs(*case, dtype="f32", device="cpu")


def cases(*names: str) -> list[Any]:
    return [
        pytest.param(OPS[name], case, id=f"{name}-{i}")
        for name in names
        for i, case in enumerate(OPS[name].cases)
    ]


def test_every_op_of_a_cpu_plan_has_a_function_but_the_structural_one() -> None:
    after_logits = {"sample", "judge", "accept", "verify_inputs"}  # the host's work on a CPU
    others = {"fp8_static_linear", "fp8_static_linear_f32"}  # on a CPU inputs are not rounded

    missing = OPS.keys() - FUNCTIONS.keys()

    assert missing == {"expert_dispatch", *after_logits, *others, *LAUNCHED_OPS}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("op", "case"), cases(*FUNCTIONS))
def test_function_equals_reference(op: Op, case: tuple[Any, ...], library: str) -> None:
    check(op, example(op.name, *case), library=library)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("op", "case"), cases(*HEAVY))
def test_weights_may_be_widened_in_the_step(op: Op, case: tuple[Any, ...], library: str) -> None:
    check(op, example(op.name, *case), library=library, widen="step")


@pytest.mark.parametrize("widen", ["load", "step"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("op", "case"), cases(*EXPERTS))
def test_experts_of_few_tokens_equal_reference(
    op: Op, case: tuple[Any, ...], library: str, widen: str
) -> None:
    check(op, example(op.name, *case), library=library, widen=widen, phase="decode")


@pytest.mark.parametrize("name", EVALUATED)
def test_standard_functions_pass_the_checker_and_the_reference_evaluator(name: str) -> None:
    check(OPS[name], example(name, *OPS[name].cases[-1]), library="standard", evaluate=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_stale_values_of_slots_and_pending_tokens_leave_no_trace(library: str) -> None:
    args = list(example("decode_mixer", 3, 3, 10, 2, 3, 4))
    state, pending_k, pending_v, slots, accepted = args[7:12]
    state[slots[0]] = torch.nan  # position 0 starts from zero
    for b in (1, 2):
        pending_k[slots[b], accepted[b] :] = torch.nan
        pending_v[slots[b], accepted[b] :] = torch.nan

    y, _ = run_op(OPS["decode_mixer"], args, library=library)

    assert y.isfinite().all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_equal_scores_choose_the_lower_expert(library: str) -> None:
    x, weight, bias, *rest = example("router", 5, 16, 12, 3, 2, 5)
    args = (x, torch.zeros_like(weight), torch.zeros_like(bias), *rest)

    ids, weights = run_op(OPS["router"], args, library=library)

    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 5
    assert torch.allclose(weights, torch.tensor(0.5))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_weights_of_experts_need_not_add_up(library: str, phase: str) -> None:
    x, ids, weights, *rest = example("experts", 6, 3, 5, 10, 12, 1)
    weights *= torch.rand(6, 1) * 3
    weights[0] = 0

    check(OPS["experts"], (x, ids, weights, *rest), library=library, phase=phase)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("inner", "width", "group"), [(32, 64, 16), (48, 40, 16), (24, 24, 8)])
def test_int4_experts_of_shapes_with_and_without_an_op_of_their_own(
    inner: int, width: int, group: int, phase: str
) -> None:
    args = example("int4_weight_experts", 5, 2, 4, inner, width, group, 1)

    check(OPS["int4_weight_experts"], args, phase=phase)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    heads=st.integers(1, 4),
    key=st.integers(1, 9),
    value=st.integers(1, 9),
    library=st.sampled_from(LIBRARIES),
)
def test_lightning_prefill_of_any_shape(
    lengths: list[int], heads: int, key: int, value: int, library: str
) -> None:
    args = example("lightning_prefill", tuple(lengths), heads, key, value)

    check(OPS["lightning_prefill"], args, library=library)


@settings(max_examples=12)
@given(
    sequences=st.integers(1, 4),
    heads=st.integers(1, 4),
    half=st.integers(1, 5),
    pending=st.integers(1, 4),
    library=st.sampled_from(LIBRARIES),
    data=st.data(),
)
def test_mixers_of_any_shape(
    sequences: int, heads: int, half: int, pending: int, library: str, data: st.DataObject
) -> None:
    pairs = data.draw(st.integers(1, half))
    groups = data.draw(st.sampled_from([g for g in range(1, heads + 1) if heads % g == 0]))
    draft = data.draw(st.integers(1, pending))
    shape = (heads, 2 * half, pairs, groups, pending)

    check(OPS["decode_mixer"], example("decode_mixer", sequences, *shape), library=library)
    args = example("verify_mixer", sequences, draft, *shape)
    check(OPS["verify_mixer"], args, library=library)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    heads=st.integers(1, 3),
    nope=st.integers(1, 5),
    pairs=st.integers(1, 3),
    value=st.integers(1, 5),
    latent=st.integers(1, 7),
    page_size=st.integers(1, 5),
    library=st.sampled_from(LIBRARIES),
)
def test_attention_of_any_shape(
    lengths: list[int],
    heads: int,
    nope: int,
    pairs: int,
    value: int,
    latent: int,
    page_size: int,
    library: str,
) -> None:
    case = (tuple(lengths), heads, nope, pairs, value, latent, page_size)

    for name in ("mla_attention", "mla_absorbed_attention"):
        check(OPS[name], example(name, *case), library=library)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 6),
    groups=st.integers(1, 4),
    each=st.integers(1, 5),
    library=st.sampled_from(LIBRARIES),
    data=st.data(),
)
def test_router_of_any_shape(
    tokens: int, groups: int, each: int, library: str, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * each))

    args = example("router", tokens, 12, groups * each, groups, kept, top_k)

    check(OPS["router"], args, library=library)


@settings(max_examples=12)
@given(
    tokens=st.integers(1, 4),
    rows=st.integers(1, 40),
    width=st.integers(1, 80),
    group=st.sampled_from([8, 16, 24, 32, 128]),
    library=st.sampled_from(LIBRARIES),
    widen=st.sampled_from(["load", "step"]),
)
def test_int4_linear_of_any_shape(
    tokens: int, rows: int, width: int, group: int, library: str, widen: str
) -> None:
    args = example("int4_weight_linear", tokens, rows, width, group)

    check(OPS["int4_weight_linear"], args, library=library, widen=widen)
