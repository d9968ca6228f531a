"""CUDA kernels, thread by thread on the CPU, do what their ops' references do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lingc.kernels import gemm
from lingc.op import OPS, Op, type_of
from lingc.plugins import table  # noqa: F401 (registers the ops)
from tests.kernels.emulated import COMPILER, TARGET, problem, results, runs

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")


def _work() -> Iterator[Any]:
    """Every case with the first tactic that can be run; in long tests with the others."""
    for op in OPS.values():
        for number, case in enumerate(op.cases):
            types = [type_of(one) for one in op.inputs(*case, dtype="bf16", device="meta")]
            if op.refusal(TARGET, *types) is not None:
                continue
            found = [one for one in op.tactics(TARGET, *types) if runs(one)]
            for i, one in enumerate(found):
                marks = [pytest.mark.long] if i else []
                name = f"{op.name}-{number}-{one.name}"
                yield pytest.param(op, case, one.name, marks=marks, id=name)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are kept that were compiled for the CPU."""
    return tmp_path_factory.mktemp("emulated")


@pytest.mark.parametrize(("op", "case", "name"), list(_work()))
def test_a_tactic_does_what_the_reference_does(
    op: Op, case: tuple[Any, ...], name: str, libraries: Path
) -> None:
    arguments = op.inputs(*case, dtype="bf16", device="cpu")
    tactics = op.tactics(TARGET, *(type_of(value) for value in arguments))
    tactic = next(one for one in tactics if one.name == name)

    assert problem(op, arguments, tactic, libraries) is None


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("fused_linear", (300, 256, 128, "group_norm_gate", "none", "fp8", 0, 1)),
        ("expert_up", (300, 2, 5, 128, 128, "fp8", 0, 1, 2)),
        ("expert_down", (300, 2, 5, 128, 128, "fp8", 0, 1, 2)),
    ],
)
def test_tokens_that_pass_in_several_runs_have_the_same_bits(
    name: str, case: tuple[Any, ...], libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = OPS[name]
    arguments = op.inputs(*case, dtype="bf16", device="cpu")
    types = [type_of(value) for value in arguments]
    at_once = op.tactics(TARGET, *types)[0]
    monkeypatch.setattr(gemm, "MOST_BYTES", 1)
    by_runs = op.tactics(TARGET, *types)[0]

    want, got = (results(op, arguments, one, libraries) for one in (at_once, by_runs))

    assert len(by_runs.launches) == 2 * len(at_once.launches)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_int4_products_of_many_tokens_scale_with_their_rows(libraries: Path) -> None:
    op = OPS["fused_linear"]
    case = (70, 64, 256, "none", "none", "int4", 32, 0, 1, 0, "f32")
    x, *rest = op.inputs(*case, dtype="bf16", device="cpu")
    powers = 2.0 ** torch.linspace(-40, 40, len(x)).round()[:, None]
    tactic = op.tactics(TARGET, *map(type_of, (x, *rest)))[0]

    (want,) = results(op, (x, *rest), tactic, libraries)
    (got,) = results(op, ((x * powers).to(x.dtype), *rest), tactic, libraries)

    assert torch.equal(got, want * powers)


def test_kernels_of_few_and_of_many_tokens_are_among_them() -> None:
    ran = {param.values[0].name for param in _work()}

    assert {"expert_up", "expert_down", "fused_linear"} <= ran
