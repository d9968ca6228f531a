"""The router's Triton kernels, in Triton's interpreter, make exact logits."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import torch
from lingc.kernels.triton_router import add_products, split_weight
from tests.kernels.interpreter import exact_rounding

exact_rounding()
torch.manual_seed(0)
tokens, width, experts, pitch = 35, 128, 12, 144
x = torch.randn(tokens, pitch).bfloat16()
weight = torch.randn(experts, width).bfloat16()
norm_weight = (1 + 0.1 * torch.randn(width)).bfloat16()
want = (x[:, :width].double() * norm_weight.double()) @ weight.double().T

parts = torch.full((2 * experts, width), torch.nan, dtype=torch.bfloat16)
split_weight[(experts, 2)](weight, norm_weight, parts, WIDTH=width, EXPERTS=experts, BLOCK=64)
halves = parts.double().unflatten(0, (2, -1)).sum(0)
assert torch.equal(halves, weight.double() * norm_weight.double())

for promoted in (0, 1):
    logits = torch.full((tokens, experts), torch.nan)
    # The interpreter multiplies bf16 wrongly; these are the same values.
    add_products[(2,)](
        x.float(), parts.float(), logits, tokens, pitch, WIDTH=width, EXPERTS=experts, ROWS=32,
        COLS=16, DEPTH=64, PROMOTED=promoted,
    )
    assert torch.allclose(logits.double(), want, rtol=1e-5, atol=1e-5)
"""


def test_products_with_both_halves_of_the_weight_are_the_logits() -> None:
    done = subprocess.run(
        (sys.executable, "-c", PROGRAM),
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )

    assert done.returncode == 0, done.stderr
