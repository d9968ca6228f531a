"""Large results compared at some rows: those rows are what the whole reference makes."""

import pytest
import torch

from lingc.bench import kernels, sampled
from lingc.op import OPS
from lingc.plugins import table

assert table.OPS is OPS  # the table is filled by its import

CASES = (
    ("fused_linear", (300, 512, 512, "none", "swiglu", "fp8", 0, 1)),
    ("fused_linear", (600, 272, 128, "group_norm_gate", "none", "fp8", 0, 1)),
    ("expert_up", (90, 2, 4, 128, 256, "fp8", 0, 1)),
    ("expert_down", (90, 2, 4, 128, 256, "int4", 32, 1)),
    ("mla_attention", ((33, 1), 2, 16, 4, 16, 20, 16)),
    ("mla_attention", ((3, 0, 129, 1), 2, 32, 8, 16, 64, 8, (70, 2, 0, 130))),
)


def test_every_op_that_is_sampled_is_tested() -> None:
    assert {name for name, _ in CASES} == {op.name for op in OPS.values() if op.rows}


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=lambda one: one if isinstance(one, str) else ""
)
def test_rows_by_themselves_are_those_of_the_whole(name: str, case: tuple[object, ...]) -> None:
    op = OPS[name]
    arguments = op.inputs(*case, dtype="bf16", device="cpu")
    whole = op.reference(*kernels.wide_arguments(op, arguments))
    rows = torch.tensor([0, 3, 4, 17, len(whole) - 1])

    given = sampled.arguments_at(op, arguments, rows)

    some = op.reference(*kernels.wide_arguments(op, given))
    torch.testing.assert_close(some, whole[rows], rtol=1e-12, atol=1e-12)


def test_ends_of_a_step_and_of_its_parts_are_among_the_rows() -> None:
    op = OPS["fused_linear"]
    arguments = op.inputs(10_000, 16, 128, "none", "none", "bf16", 0, 0, dtype="bf16", device="cpu")

    rows = sampled.rows_of(op, arguments)

    assert rows is not None
    assert {0, 7, 4095, 4096, 8191, 8192, 9999} <= set(rows.tolist())
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 192 < len(rows) < 300


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y: y[4097:].fill_(float("nan")), "elements are NaN"),
        (lambda y: y[8184:].mul_(1.5), "of rows 0, 1, 2, …: y: "),
        (lambda y: y[:, 3].zero_(), "of rows 0, 1, 2, …: y: "),
    ],
    ids=["unwritten", "last tile", "a column"],
)
def test_a_large_result_that_is_wrong_is_seen(spoil: object, said: str) -> None:
    op = OPS["fused_linear"]
    arguments = op.inputs(8192, 32, 128, "none", "none", "bf16", 0, 1, dtype="bf16", device="cpu")
    right = op.reference(*arguments)
    assert kernels.problem_of(op, arguments, [right], similar=0.0) is None

    assert callable(spoil)
    spoil(right)

    problem = kernels.problem_of(op, arguments, [right], similar=0.0)
    assert problem is not None
    assert said in problem


def test_without_room_for_a_reference_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "check", full)

    assert kernels.faults_of(None, OPS["rms_norm"], (), (), {}, "x") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("format", "passes"), [("fp8", True), ("bf16", False)])
def test_codes_before_swiglu_are_held_to_what_experts_are(format: str, *, passes: bool) -> None:  # noqa: A002
    op = OPS["fused_linear"]
    case = (64, 512, 256, "rms_norm", "swiglu", format, 0, 0)
    given = op.inputs(*case, dtype="bf16", device="cpu")
    want = op.reference(*kernels.wide_arguments(op, given))
    assert isinstance(want, torch.Tensor)
    got = want.clone()
    got.view(-1)[want.abs().argmin()] += 0.019
    assert op.judge is not None

    found = op.judge(given, [got.bfloat16()], [want])

    assert float(want.abs().mean()) < 0.4  # more than twice 2 % of the mean, less than 0.02
    assert (found is None) == passes
