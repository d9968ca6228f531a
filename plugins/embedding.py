"""Rows of the embedding table.

    y[t, d] = weight[token_ids[t], d]

Shapes: token_ids i32 or i64 [T]; weight [vocab, D]; y [T, D] of the activation dtype named by
`dtype`. T symbolic.

Rounding: from the stored dtype to `dtype`.

Source: inclusionAI/Ling-V2.5:models/modeling_bailing_moe_v2_5.py; rows are not scaled.
"""

from torch import Tensor

from lingc.math import stored_bytes
from lingc.op import TORCH_DTYPE, Cost, define
from lingc.plan import TensorType
from lingc.samples import Samples


def reference(token_ids: Tensor, weight: Tensor, dtype: str) -> Tensor:
    return weight[token_ids.long()].to(TORCH_DTYPE[dtype])


def types(token_ids: TensorType, weight: TensorType, dtype: str) -> TensorType:
    return TensorType(dtype, (*token_ids.shape, weight.shape[1]))


def cost(token_ids: TensorType, weight: TensorType, dtype: str) -> Cost:
    made = types(token_ids, weight, dtype)
    read = TensorType(weight.dtype, made.shape)
    return Cost(flops=0.0, moved_bytes=stored_bytes(token_ids, read, made))


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
    cases=((1, 3, 4), (7, 11, 33)),
)
