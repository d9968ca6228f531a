"""CUDA kernels, thread by thread on the CPU, do what their ops' references do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lingc.op import OPS, Op, type_of
from lingc.plugins import table  # noqa: F401 (registers the ops)
from tests.kernels.emulated import COMPILER, TARGET, problem, runs

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


def test_kernels_of_few_and_of_many_tokens_are_among_them() -> None:
    ran = {param.values[0].name for param in _work()}

    assert {"expert_up", "expert_down", "fused_linear"} <= ran
