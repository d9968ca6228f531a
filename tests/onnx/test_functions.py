"""The function of every op, in both libraries, gives what the op's reference gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lingc.compare import Mechanism, assert_close
from lingc.op import Op
from lingc.plugins.table import OPS
from lingc.targets.onnx.functions import FUNCTIONS

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
SCRATCH = {"state", "pending_k", "pending_v", "cache"}
"""Results whose last row is scratch."""

CASES = [
    pytest.param(OPS[name], case, id=f"{name}-{i}")
    for name in FUNCTIONS
    for i, case in enumerate(OPS[name].cases)
]


def mechanism(op: str) -> Mechanism:
    if op in MECHANISMS:
        return MECHANISMS[op]
    if op.endswith("experts"):
        return "experts"
    return "gemm" if "linear" in op else "elementwise"


def results(op: Op) -> list[str]:
    """Names of the results, in the schema."""
    made = op.schema.partition("->")[2].strip(" ()")
    return [part.split()[1] if " " in part.strip() else "y" for part in made.split(",")]


def check(op: Op, got: list[Tensor], want: tuple[Tensor, ...]) -> None:
    for name, found, expected in zip(results(op), got, want, strict=True):
        rows = slice(0, -1) if name in SCRATCH else slice(None)
        kind = mechanism(op.name)
        dtype = {torch.float32: "f32", torch.float8_e4m3fn: "f8e4m3", torch.int32: "i32"}[expected.dtype]
        if dtype == "f8e4m3": kind = "elementwise"
        assert_close(found[rows], expected[rows], dtype=dtype, mechanism=kind)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_every_op_has_a_function_but_the_structural_one() -> None:
    assert OPS.keys() - FUNCTIONS.keys() == {"expert_dispatch"}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("widen", ["load", "step"])
@pytest.mark.parametrize("library", ["ort", "standard"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_function_equals_reference(
    op: Op, case: tuple[Any, ...], library: str, widen: str, phase: str, run_op: Callable[..., Any]
) -> None:
    args = op.inputs(*case, dtype="f32", device="cpu")
    want = as_tuple(op.reference(*args))

    got = run_op(op.name, args, len(want), library=library, widen=widen, phase=phase)

    check(op, got, want)
