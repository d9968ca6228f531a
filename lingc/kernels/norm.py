"""Launch of `norm.cu`: a block for each of few rows, beside the kernel before it."""

from lingc.kernel import Kernel, Launch, Tactic, Tensor
from lingc.math import stored_bytes
from lingc.plan import TensorType

FEW = 64
"""Rows up to which a launch is mostly waiting."""

_CHANNELS = 8
"""Of one load."""


def tactics(x: TensorType, weight: TensorType, eps: float, *, dependent: bool) -> list[Tactic]:
    """RMS norm of x [T, D] to `out`; none where the rows are many or not whole loads."""
    shape = x.bind({})
    if len(shape) != 2 or shape[0] > FEW or shape[1] % _CHANNELS:
        return []
    tokens, width = shape
    warps = min(16, -(-width // (32 * _CHANNELS)))
    pieces = -(-width // (32 * _CHANNELS * warps))
    kernel = Kernel(
        language="cuda",
        source="kernels/norm.cu",
        entry="norm_few",
        arguments=(("x", "*bf16"), ("weight", "*bf16"), ("y", "*bf16"), ("eps", "f32")),
        constants=(("WIDTH", width), ("THREADS", 32 * warps), ("PIECES", pieces)),
        warps=warps,
    )
    launch = Launch(
        kernel=kernel,
        grid=(tokens, 1, 1),
        operands=(Tensor("x"), Tensor("weight"), Tensor("out"), eps),
        dependent=dependent,
        moved_bytes=stored_bytes(x, x, weight),
        flops=4.0 * tokens * width,
        blocks_per_sm=2,
    )
    return [Tactic(name=f"few.w{warps}", launches=(launch,), config={"warps": warps})]
