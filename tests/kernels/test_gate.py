"""Which arguments the gate of the kernels changes to see whether rows depend on each other."""

import pytest

from lingc.bench.kernels import row_arguments
from lingc.op import type_of
from lingc.plan import TensorType
from lingc.plugins.table import OPS


@pytest.mark.parametrize(
    ("name", "case", "changed"),
    [
        # As many tokens as heads: weights by head have as many rows, which every token needs.
        ("mla_latent_attention", ((1,) * 4, (3,) * 4, 4, 128, 32, 128, 512, 16), ["a", "q"]),
        ("mla_absorbed_attention", None, ["q"]),
        ("expert_up", (16, 2, 4, 128, 256, "fp8", 0, 1), ["x"]),
    ],
)
def test_rows_of_activations_change_and_weights_stay(
    name: str, case: tuple[object, ...] | None, changed: list[str]
) -> None:
    op = OPS[name]
    for one in op.cases if case is None else (case,):
        arguments = op.inputs(*one, dtype="bf16", device="cpu")
        made = op.types(*(type_of(value) for value in arguments))
        rows = (made if isinstance(made, TensorType) else made[0]).bind({})[0]
        assert row_arguments(op, arguments, rows) == changed
