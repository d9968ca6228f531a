"""Triton kernels, in Triton's interpreter, do what their ops' references do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lingc.op import OPS, type_of
from lingc.plugins import table  # noqa: F401 (registers the ops)
from lingc.targets.nvidia import H200_SXM
from tests.kernels.interpreter import interpreted

ROOT = Path(__file__).parents[2]


def _cases() -> list[tuple[str, int, str]]:
    """(op, number of the case, tactic) of every case that has a tactic in Triton."""
    found = []
    for op in OPS.values():
        for number, case in enumerate(op.cases):
            types = [type_of(value) for value in op.inputs(*case, dtype="bf16", device="cpu")]
            if op.refusal(H200_SXM, *types) is not None:
                continue
            found += [
                (op.name, number, one.name) for one in interpreted(op.tactics(H200_SXM, *types))
            ]
    return found


CASES = _cases()


@pytest.fixture(scope="module")
def problems() -> dict[tuple[str, int, str], str | None]:
    """What was wrong with each; the interpreter is chosen when Triton is imported."""
    asked = sorted({(name, number) for name, number, _ in CASES})
    done = subprocess.run(
        (sys.executable, "-m", "tests.kernels.interpreter"),
        input=json.dumps(asked),
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    answers: list[list[Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, number, tactic): found for name, number, tactic, found in answers}


@pytest.mark.parametrize(("name", "number", "tactic"), CASES)
def test_a_kernel_does_what_its_reference_does(
    name: str, number: int, tactic: str, problems: dict[tuple[str, int, str], str | None]
) -> None:
    assert problems[name, number, tactic] is None
