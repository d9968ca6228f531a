"""Plugins launch what their tables say: `enqueue` by Triton's interpreter, against references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("precision", "step", "ops"),
    [
        (
            "bf16",
            "4 decode",
            {
                "decode_mixer", "mla_latent", "mla_query_rope", "mla_absorbed_attention", "router",
                "experts", "linear_f32",
            },
        ),
        pytest.param(
            "int4-all",
            "3 verify",
            {"verify_mixer", "int4_weight_experts", "int4_weight_linear", "router"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "fp8",
            "0 prefill",
            {"qk_norm_rope", "group_norm_gate", "fp8_linear", "fp8_experts", "mla_attention"},
            marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_enqueue_launches_what_the_reference_computes(
    precision: str, step: str, ops: set[str]
) -> None:
    done = subprocess.run(
        (sys.executable, "-m", "tests.tensorrt.interpreted"),
        input=json.dumps([precision, step]),
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(json.loads(line) for line in done.stdout.splitlines())

    assert ops <= {op for op, problem in found.items() if problem is None}
    assert {problem for problem in found.values() if problem} <= {"in CUDA C++"}
