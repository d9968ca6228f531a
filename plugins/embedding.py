"""Rows of the embedding table.

    y[t, d] = weight[token_ids[t], d]

Shapes: token_ids i32 or i64 [T]; weight [vocab, D]; y [T, D] of the activation dtype named by
`dtype`. T symbolic. Kernels give zeros for an id that the table does not have, which is padding.

Rounding: from the stored dtype to `dtype`.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py; rows are not scaled.
"""

from collections.abc import Sequence

from torch import Tensor

from lingc.kernel import Kernel, Launch, Tactic
from lingc.kernel import Tensor as Operand
from lingc.math import stored_bytes
from lingc.op import TORCH_DTYPE, Benchmark, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples
from lingc.targets.spec import Target


def reference(token_ids: Tensor, weight: Tensor, dtype: str) -> Tensor:
    return weight[token_ids.long()].to(TORCH_DTYPE[dtype])


def types(token_ids: TensorType, weight: TensorType, dtype: str) -> TensorType:
    return TensorType(dtype, (*token_ids.shape, weight.shape[1]))


def cost(token_ids: TensorType, weight: TensorType, dtype: str) -> Cost:
    made = types(token_ids, weight, dtype)
    read = TensorType(weight.dtype, made.shape)
    return Cost(flops=0.0, moved_bytes=stored_bytes(token_ids, read, made))


def refusal(_target: Target, token_ids: TensorType, weight: TensorType, dtype: str) -> str | None:
    if token_ids.dtype != "i32":
        return f"token_ids are {token_ids.dtype}, not i32"
    if weight.dtype != "bf16" or dtype != "bf16":
        return f"rows of {weight.dtype} are wanted in {dtype}; the kernel copies bf16"
    _, width = weight.bind({})
    return None if width % 8 == 0 else f"rows of {width} elements are not a multiple of 8"


def tactics(
    target: Target, token_ids: TensorType, weight: TensorType, dtype: str
) -> Sequence[Tactic]:
    if refusal(target, token_ids, weight, dtype) is not None:
        return ()
    (tokens,), (rows, width) = token_ids.bind({}), weight.bind({})
    warps = min(4, -(-width // 256))
    kernel = Kernel(
        language="cuda",
        source="kernels/embedding.cu",
        entry="embedding",
        arguments=(("token_ids", "*i32"), ("weight", "*bf16"), ("y", "*bf16")),
        constants=(("WIDTH", width), ("ROWS", rows), ("THREADS", 32 * warps)),
        warps=warps,
    )
    launch = Launch(
        kernel=kernel,
        grid=(tokens, 1, 1),
        operands=(Operand("token_ids"), Operand("weight"), Operand("out")),
        dependent=(target.compute_capability or (0, 0)) >= (9, 0),
        moved_bytes=cost(token_ids, weight, dtype).moved_bytes,
        blocks_per_sm=8,
    )
    return (Tactic(name=f"row.warps{warps}", launches=(launch,), config={"warps": warps}),)


def inputs(
    tokens: int, vocabulary: int, width: int, *, dtype: str, device: str
) -> tuple[Tensor | str, ...]:
    some = Samples(dtype=dtype, device=device)
    return some.below(vocabulary, tokens), some.weight(vocabulary, width), dtype


OP = define(
    "embedding(Tensor token_ids, Tensor weight, str dtype) -> Tensor",
    reference=reference,
    types=types,
    cost=cost,
    inputs=inputs,
    refusal=refusal,
    tactics=tactics,
    cases=((1, 3, 4), (7, 11, 33), (3, 5, 8), (17, 40, 1000), (127, 9, 4096)),
    benchmarks=(
        Benchmark(
            name="157184 x 4096",
            case=lambda tokens: (tokens, 157_184, 4096),
            tokens=(1, 8, 32, 8192),
        ),
    ),
)
