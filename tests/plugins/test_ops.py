"""What holds for every op, over its own cases: types, registration, purity, precision, cost."""

import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from lingc import plugins
from lingc.compare import assert_close
from lingc.op import DTYPE_NAME, TORCH_DTYPE, Mechanism, Op, type_of
from lingc.plan import TensorType
from lingc.plugins.table import MODULES, OPS

Made = TypeVar("Made")

CASES = [
    pytest.param(op, case, id=f"{op.name}-{i}")
    for op in OPS.values()
    for i, case in enumerate(op.cases)
]
LARGEST = [pytest.param(op, op.cases[-1], id=op.name) for op in OPS.values()]

SYMBOLIC = {
    **dict.fromkeys(("x", "residual", "q", "k", "v", "qkv", "qkvg", "o", "a", "base"), "T"),
    **dict.fromkeys(("token_ids", "positions", "rows", "ids", "weights", "cos", "sin"), "T"),
    **dict.fromkeys(("codes", "scales", "gate", "gate_up", "hidden"), "T"),
    **dict.fromkeys(("logits", "temperature", "top_k", "top_p", "draws"), "T"),
    **dict.fromkeys(("slots", "accepted", "page_table"), "B"),
    **dict.fromkeys(("state", "pending_k", "pending_v"), "S"),
    "offsets": "B1",
    "cache": "R",
}
"""Argument -> what its first axis counts, where that is not fixed by the config."""

BY_PLACE = {
    **dict.fromkeys(("drafts", "ahead_positions", "ahead_rows", "draws"), "W"),
    **dict.fromkeys(("tokens", "draft_logits", "cache_rows"), "T"),
    **dict.fromkeys(("temperature", "top_k", "top_p", "rooms", "forced"), "B"),
}
"""The same for `ROUNDS`, where it is another."""

ROUNDS = ("verify_inputs", "judge", "accept")
"""Ops of a speculative round: what they make of a step depends on where a sequence stands in it."""

MECHANISMS: dict[str, Mechanism] = {
    "qk_norm_rope": "rope",
    "mla_query_rope": "rope",
    "mla_latent": "rope",
    "mla_latent_kv": "rope",
    "linear": "gemm",
    "linear_f32": "gemm",
    "fp8_weight_linear": "gemm",
    "fp8_weight_linear_f32": "gemm",
    "int4_weight_linear": "gemm",
    "int4_weight_linear_f32": "gemm",
    "fp8_linear": "fp8_gemm",
    "fp8_linear_f32": "fp8_gemm",
    "fp8_static_linear": "fp8_gemm",
    "fp8_static_linear_f32": "fp8_gemm",
    "fp8_experts": "fp8_gemm",
    "experts": "experts",
    "expert_dispatch": "experts",
    "fp8_weight_experts": "experts",
    "int4_weight_experts": "experts",
    "mla_attention": "attention",
    "mla_absorbed_attention": "attention",
    "lightning_prefill": "lightning",
    "lightning_decode": "lightning",
    "lightning_verify": "lightning",
    "decode_mixer": "lightning",
    "verify_mixer": "lightning",
    "router": "router",
}

TOKEN_BY_TOKEN = (
    "embedding", "rope_table", "rms_norm", "rms_norm_pair", "add_rms_norm", "rms_norm_fp8",
    "add_rms_norm_fp8",
    "quantize_fp8", "silu_mul", "silu_mul_fp8", "qk_norm_rope", "group_norm_gate",
    "mla_query_rope", *(n for n in OPS if "linear" in n or "expert" in n or n == "router"),
)  # fmt: skip
"""Ops in which no token sees another; the rest depend on a sequence."""

ROUNDED_INSIDE = {
    "decode_mixer", "verify_mixer", "fp8_experts", "lightning_prefill_qkv", "lightning_decode_qkv",
    "lightning_verify_qkv",
}  # fmt: skip
"""Ops that round between their parts, so that bf16 results are no roundings of the f64 ones. Their
own tests hold them to their parts bit for bit."""


def given(op: Op, case: tuple[Any, ...], dtype: str = "f32") -> tuple[Any, ...]:
    return op.inputs(*case, dtype=dtype, device="cpu")


def mechanism_of(op: Op) -> Mechanism:
    return MECHANISMS.get(op.name, op.mechanism)


def results(made: Any) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)


def typed(made: Any) -> tuple[TensorType, ...]:
    return (made,) if isinstance(made, TensorType) else tuple(made)


def axis_of(op: Op, name: str, value: Any) -> str | None:
    """What the first axis of an argument counts, if that is symbolic."""
    if not isinstance(value, Tensor):
        return None
    is_weight = (name == "scales" and op.name.startswith("int4")) or (
        name in {"gate", "gate_up"} and value.ndim > 2
    )
    if op.name in ROUNDS and name in BY_PLACE:
        return BY_PLACE[name]
    return None if is_weight else SYMBOLIC.get(name)


def named(op: Op, args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    names = [argument.name for argument in op.overload._schema.arguments]
    return list(zip(names, args, strict=True))


def a_row_a_token(op: Op, made: Sequence[Made]) -> list[Made]:
    """Without the results whose size the config fixes."""
    return [x for name, x in zip(op.results, made, strict=True) if name != "starts"]


def bits(x: Tensor) -> Tensor:
    return x.detach().clone().contiguous().flatten().view(torch.uint8)


def test_every_file_of_the_room_is_in_the_table() -> None:
    files = {info.name for info in pkgutil.iter_modules(plugins.__path__)} - {"table"}
    listed = {module.__name__.rpartition(".")[2] for module in MODULES}
    defined = {
        value.name for module in MODULES for value in vars(module).values() if isinstance(value, Op)
    }

    assert files == listed
    assert defined == set(OPS)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_op_file_states_shapes_rounding_and_source(module: Any) -> None:
    for part in ("Shapes: ", "Rounding: ", "Source: "):
        assert f"\n\n{part}" in module.__doc__


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_types_are_those_of_the_reference(op: Op, case: tuple[Any, ...], dtype: str) -> None:
    args = given(op, case, dtype)

    made = results(op.reference(*args))

    assert typed(op.types(*map(type_of, args))) == tuple(map(type_of, made))
    assert all(x.is_contiguous() for x in made)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_types_pass_symbolic_sizes_on(op: Op, case: tuple[Any, ...]) -> None:
    args = given(op, case)
    sizes: dict[str, int] = {}
    symbolic = []
    for name, value in named(op, args):
        kind, axis = type_of(value), axis_of(op, name, value)
        if axis is not None:
            sizes[axis] = kind.shape[0]
            kind = TensorType(kind.dtype, (axis, *kind.shape[1:]))
        if name == "page_table":
            sizes["P"] = kind.shape[1]
            kind = TensorType(kind.dtype, ("B", "P"))
        symbolic.append(kind)

    made = typed(op.types(*symbolic))

    fixed = typed(op.types(*map(type_of, args)))
    assert [t.bind(sizes) for t in made] == [t.shape for t in fixed]
    assert [t.dtype for t in made] == [t.dtype for t in fixed]
    assert all(isinstance(t.shape[0], str) for t in a_row_a_token(op, made))


@pytest.mark.parametrize(("op", "case"), LARGEST)
def test_tracing_with_symbolic_sizes_asks_nothing_of_them(op: Op, case: tuple[Any, ...]) -> None:
    env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    args = given(op, case)
    traced: list[Any] = []
    for name, value in named(op, args):
        if not isinstance(value, Tensor):
            traced.append(value)
            continue
        free = [DimDynamic.STATIC] * value.ndim
        if axis_of(op, name, value) is not None:
            free[0] = DimDynamic.DYNAMIC
        if name == "page_table":
            free[1] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=free)
        traced.append(mode.from_tensor(value, symbolic_context=context))

    with mode:
        made = results(op.overload(*traced))

    assert all(isinstance(x.shape[0], torch.SymInt) for x in a_row_a_token(op, made))
    assert env.guards == []


@pytest.mark.parametrize(("op", "case"), LARGEST)
def test_registration_passes_the_checks_of_torch(op: Op, case: tuple[Any, ...]) -> None:
    args = given(op, case, "bf16")
    narrow = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
    # The schema test compares inputs before and after with allclose, which has no FP8 form; the
    # purity test below stands in for it.
    tests = ("test_faketensor",) if narrow else ("test_schema", "test_faketensor")

    assert set(torch.library.opcheck(op.overload, args, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("op", "case"), LARGEST)
def test_a_reference_changes_no_argument_and_returns_none(op: Op, case: tuple[Any, ...]) -> None:
    args = given(op, case)
    tensors = [a for a in args if isinstance(a, Tensor)]
    before = [bits(a) for a in tensors]

    made = results(op.reference(*args))

    assert all(torch.equal(bits(a), b) for a, b in zip(tensors, before, strict=True))
    owners = [x.untyped_storage().data_ptr() for x in (*tensors, *made)]
    assert len(set(owners[len(tensors) :])) == len(made)
    assert not set(owners[: len(tensors)]) & set(owners[len(tensors) :])


@pytest.fixture
def nan_allocation() -> Iterator[None]:
    """New floating-point memory is full of NaN, integers of their largest value."""
    torch.use_deterministic_algorithms(mode=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.usefixtures("nan_allocation")
@pytest.mark.parametrize(("op", "case"), CASES)
def test_no_result_shows_memory_that_was_never_written(op: Op, case: tuple[Any, ...]) -> None:
    assert torch.empty(3).isnan().all()
    args = given(op, case)

    made = results(op.reference(*args))

    assert all(x.double().isfinite().all() for x in made if x.is_floating_point())


def in_f64(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if DTYPE_NAME[value.dtype] in {"f32", "bf16"} else value
    return "f64" if name == "dtype" else value


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(op, case, dtype, id=f"{op.name}-{i}-{dtype}")
        for op in OPS.values()
        for i, case in enumerate(op.cases)
        for dtype in (("f32",) if op.name in ROUNDED_INSIDE else ("f32", "bf16"))
    ],
)
def test_results_are_those_in_f64_but_for_rounding(
    op: Op, case: tuple[Any, ...], dtype: str
) -> None:
    args = given(op, case, dtype)

    made = results(op.reference(*args))
    want = results(op.reference(*(in_f64(name, value) for name, value in named(op, args))))

    for x, y in zip(made, want, strict=True):
        kind = DTYPE_NAME[x.dtype]
        # Codes and scales are those of a result that was rounded to bf16 before.
        narrowest = dtype if kind == "f32" and op.name.endswith("_fp8") else kind
        mechanism = "elementwise" if kind == "f8e4m3" else mechanism_of(op)
        assert_close(x, y, dtype=narrowest, mechanism=mechanism)


@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_a_token_gets_the_same_result_whatever_stands_beside_it(name: str) -> None:
    op = OPS[name]
    args = given(op, op.cases[1])
    whole = results(op.reference(*args))

    for t in range(2):
        alone = [
            value[t : t + 1] if axis_of(op, key, value) else value for key, value in named(op, args)
        ]
        for x, y in zip(results(op.reference(*alone)), whole, strict=True):
            assert_close(x, y[t : t + 1], dtype=DTYPE_NAME[x.dtype], mechanism=mechanism_of(op))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_inputs_are_the_same_numbers_every_time(op: Op, case: tuple[Any, ...]) -> None:
    for a, b in zip(given(op, case), given(op, case), strict=True):
        assert torch.equal(bits(a), bits(b)) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("op", "case"), CASES)
def test_cost_covers_at_least_what_is_written(op: Op, case: tuple[Any, ...]) -> None:
    args = tuple(map(type_of, given(op, case, "bf16")))
    states = {t for name, t in named(op, args) if name in {"state", "cache"} or "pending" in name}

    cost = op.cost(*args)

    written = [t for t in typed(op.types(*args)) if t not in states]
    floor = 0.0
    for t in written:
        floor += TORCH_DTYPE[t.dtype].itemsize * torch.Size(t.bind({})).numel()
    assert cost.moved_bytes >= floor
    assert cost.flops >= 0
