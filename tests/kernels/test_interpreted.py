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
from tests.kernels.interpreter import TARGETS, interpreted

ROOT = Path(__file__).parents[2]


def _cases() -> list[tuple[str, int, str, str]]:
    """(op, number of the case, target, tactic) of every case that has a tactic in Triton."""
    found = []
    for op in OPS.values():
        for number, case in enumerate(op.cases):
            types = [type_of(value) for value in op.inputs(*case, dtype="bf16", device="cpu")]
            for name, target in TARGETS.items():
                if op.refusal(target, *types) is None:
                    ways = interpreted(op.tactics(target, *types))
                    found += [(op.name, number, name, one.name) for one in ways]
    seen = {(op, number, tactic): target for op, number, target, tactic in reversed(found)}
    return [one for one in found if seen[one[0], one[1], one[3]] == one[2]]


CASES = _cases()


@pytest.fixture(scope="module")
def problems() -> dict[tuple[str, int, str, str], str | None]:
    """What was wrong with each; the interpreter is chosen when Triton is imported."""
    asked = sorted({(name, number, target) for name, number, target, _ in CASES})
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
    return {(answer[0], answer[1], answer[2], answer[3]): answer[4] for answer in answers}


@pytest.mark.parametrize(("name", "number", "target", "tactic"), CASES)
def test_a_kernel_does_what_its_reference_does(
    name: str,
    number: int,
    target: str,
    tactic: str,
    problems: dict[tuple[str, int, str, str], str | None],
) -> None:
    assert problems[name, number, target, tactic] is None
