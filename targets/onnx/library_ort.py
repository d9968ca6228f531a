"""The maths of the functions with the ops of ONNX Runtime's CPU provider where they are faster."""

from math import prod
from typing import Any

import numpy as np

from lingc.targets.onnx.body import CONTRIB, OPSET, Value
from lingc.targets.onnx.library_standard import Standard
from lingc.targets.onnx.stack import Stack, few_experts, grouped_experts

_UNROUTED = -1e30
_LEAST_WEIGHT = 1e-37
_SWIGLU = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,  # gate and up rows interleaved, the only layout it has on a CPU
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_limit": 3e38,
}
GROUPED_EXPERTS = 64
"""Up to so many experts, many tokens are gathered for each and multiplied at once: with few tokens
an expert, most of that would be padding."""

_FP32_ACTIVATIONS = 1
"""`accuracy_level` that keeps the activations in FP32; level 4 would round them to 8 bits."""


def block_is_supported(group: int) -> bool:
    """Whether the 4-bit ops take blocks of this size.

    >>> [block_is_supported(g) for g in (8, 16, 32, 48, 128)]
    [False, True, True, False, True]
    """
    return group >= 16 and group & (group - 1) == 0


class Ort(Standard):
    """Ops of the default domain and of ONNX Runtime's own."""

    interleaved = True
    domains = (("", OPSET), (CONTRIB, 1))

    # ----------------------------------------------------------------------------------- matrices

    def int4_linear(self, x: Value, packed: Value, scales: Value, group: int) -> Value:
        rows, width = packed.size(0), x.size(-1)
        if not block_is_supported(group) or width % group:
            return super().int4_linear(x, self._flat(packed), scales, group)
        attrs = {
            "K": width,
            "N": rows,
            "bits": 4,
            "block_size": group,
            "accuracy_level": _FP32_ACTIVATIONS,
        }
        return self._contrib("MatMulNBits", x, packed, scales, **attrs)

    def _flat(self, packed: Value) -> Value:
        """Bytes [N, P], also where they lie by groups."""
        rows, *rest = (packed.size(axis) for axis in range(len(packed.shape)))
        made = packed.reshape(rows, prod(rest))
        return Value(made.name, self.body, packed.dtype, (rows, prod(rest)))

    def by_head(self, x: Value, y: Value) -> Value:
        return self._product(x, y, transBatchA=1)

    def scores(self, q: Value, k: Value, scale: float) -> Value:
        return self._product(q, k, transBatchA=1, transBatchB=1, transB=1, alpha=scale)

    def mixed(self, p: Value, v: Value) -> Value:
        return self._product(p, v, transBatchB=1)

    def shared_scores(self, q: Value, k: Value, scale: float) -> Value:
        return self._product(q, k, transB=1, alpha=scale)

    def from_latent(self, o: Value, w_v: Value) -> Value:
        return self._product(o, w_v, transBatchA=1, transB=1).transpose(1, 0, 2)

    def by_each(self, x: Value, weights: Value, *, rank: int) -> Value:
        del rank
        return self._product(x, weights, transB=1)

    # ------------------------------------------------------------------------------- norm and gate

    def add_rms_norm(
        self, x: Value, residual: Value, weight: Value, eps: float
    ) -> tuple[Value, Value]:
        kind = f"{CONTRIB}::SkipSimplifiedLayerNormalization"
        made = self.body.ops(kind, 4, x, residual, weight, attrs={"epsilon": eps})
        return made[0], made[3]

    # ----------------------------------------------------------------------------------- lightning

    def recur(
        self,
        q: Value | None,
        k: Value,
        v: Value,
        rate: Value,
        start: Value,
        *,
        counts: Value | None = None,
        span: Value | None = None,
    ) -> tuple[Value, Value]:
        heads = start.size(1)
        if counts is not None:
            decay = counts.unsqueeze(2) * -rate
        else:
            assert span is not None, "all tokens count, of an unknown number"
            decay = self.body.op("Expand", -rate, self.body.sizes([span, heads]))
        made = self.body.ops(
            f"{CONTRIB}::LinearAttention",
            2,
            *(k if q is None else q, k, v, start, decay),
            attrs={
                "update_rule": "gated",
                "scale": float(start.size(2) ** -0.5),
                "q_num_heads": heads,
                "kv_num_heads": heads,
            },
        )
        return made[0], made[1]

    # ------------------------------------------------------------------------------------- experts

    def experts(self, x: Value, ids: Value, weights: Value, gate_up: Stack, down: Stack) -> Value:
        if self._has_4_bit_op(gate_up) and self._has_4_bit_op(down):
            return self._mixture_4_bit(x, ids, weights, gate_up, down)
        # `MoE` gives each thread a run of experts, so that a token whose experts are neighbours
        # has one thread. Copied side by side they are read by all.
        if x.shape[0] == 1 or (self.few_tokens and gate_up.values.dtype != "f32"):
            return few_experts(self, x, ids, weights, gate_up, down)
        if self.many_tokens and gate_up.experts <= GROUPED_EXPERTS:
            return grouped_experts(self, x, ids, weights, gate_up, down)
        return self._mixture(x, ids, weights, gate_up, down)

    def _mixture(self, x: Value, ids: Value, weights: Value, gate_up: Stack, down: Stack) -> Value:
        # The op takes a softmax of the chosen logits: the logarithms of the weights give the
        # weights back, divided by their sum.
        logits = self.body.op("Log", self.body.op("Max", weights, _LEAST_WEIGHT))
        routed = self._by_expert(ids, logits, gate_up.experts, elsewhere=_UNROUTED)
        mixed = self._contrib(
            "MoE",
            *(x, routed, gate_up.whole(self, x), None, down.whole(self, x)),
            k=ids.size(1),
            normalize_routing_weights=1,
            **_SWIGLU,
        )
        return mixed * weights.sum(1, keep=True)

    def _mixture_4_bit(
        self, x: Value, ids: Value, weights: Value, gate_up: Stack, down: Stack
    ) -> Value:
        routed = self._by_expert(ids, weights, gate_up.experts, elsewhere=0.0)
        first = (gate_up.values, gate_up.scales, None)
        second = (down.values, down.scales, None)
        return self._contrib(
            "QMoE",
            *(x, routed, *first, *second, *[None] * 6, routed),
            k=ids.size(1),
            normalize_routing_weights=0,
            expert_weight_bits=4,
            block_size=gate_up.group,
            accuracy_level=_FP32_ACTIVATIONS,
            **_SWIGLU,
        )

    def _by_expert(self, ids: Value, values: Value, experts: int, *, elsewhere: float) -> Value:
        """Values [T, k] at the columns `ids` of [T, experts]."""
        shape = self.body.sizes([ids.length(0), experts])
        empty = self.body.full(shape, np.array([elsewhere], np.float32))
        return self.body.op("ScatterElements", empty, ids, values, attrs={"axis": 1})

    def _has_4_bit_op(self, stack: Stack) -> bool:
        return block_is_supported(stack.group) and stack.width % stack.group == 0

    def _product(self, x: Value, y: Value, **attrs: float) -> Value:
        return self._contrib("FusedMatMul", x, y, **attrs)

    def _contrib(self, kind: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.body.op(f"{CONTRIB}::{kind}", *inputs, attrs=attrs)
