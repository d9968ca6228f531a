"""The maths of the functions in standard ONNX ops alone, for any consumer.

A library is what the functions of `functions.py` are written in. `library_ort.py` replaces the
parts that ONNX Runtime has faster ops for. All arithmetic is in f32.
"""

from collections.abc import Sequence

import numpy as np

from lingc.targets.onnx.body import OPSET, Body, Value
from lingc.targets.onnx.stack import Stack, few_experts, grouped_experts

FAR = 1e30
"""A lag or score so large that its exponential is nothing; finite, so that 0 times it is 0."""

LEAST_RATE = 1e-20
"""Times `FAR` it is still far; a slower decay than this is none in f32."""


class Standard:
    """Ops of the default domain.

    Args:
        body: Where the nodes go.
        few_tokens: Whether the phase has a token or a few for each sequence, so that experts are
            better fetched for each token than tokens for each expert.
        many_tokens: Whether the phase has many tokens at once.
        single: Whether every sequence has one token.
        settled: Whether the linear states are given as those of the sequences, in their order,
            all of which go on and have no accepted tokens to commit.
    """

    interleaved = False
    """Whether stacked gate and up rows lie interleaved."""

    domains: Sequence[tuple[str, int]] = (("", OPSET),)

    def __init__(
        self,
        body: Body,
        *,
        few_tokens: bool,
        many_tokens: bool = False,
        single: bool = False,
        settled: bool = False,
    ) -> None:
        self.body = body
        self.few_tokens = few_tokens
        self.many_tokens = many_tokens
        self.single = single
        self.settled = settled

    # ----------------------------------------------------------------------------------- matrices

    def by_blocks(
        self, values: Value, scales: Value, *, width: int, rank: int, block: int = 128
    ) -> Value:
        """Values [..., width] times scales [..., ceil(width / block)]."""
        if width % block == 0:
            kept = [0] * (rank - 1)
            blocked = values.reshape(*kept, width // block, block) * scales.unsqueeze(rank)
            return blocked.reshape(*kept, width)
        return values * scales.gather(np.arange(width) // block, axis=rank - 1)

    def wide(self, weight: Value, after: Value, scales: Value | None = None) -> Value:
        """A weight in f32: cast, and multiplied by its row scales where it has some.

        Not before `after` is there, with what the weight is to be multiplied.
        """
        values = self.waiting(weight, after).cast("f32")
        if scales is None:
            return values
        return self.by_blocks(values, scales, width=weight.size(-1), rank=len(weight.shape))

    def waiting(self, weight: Value, after: Value) -> Value:
        """A weight that must be widened, not before `after` is there.

        Nothing else would keep an engine from widening the weights of all layers first, and so
        from holding all of them at once. A weight is reshaped to the shape that it has, which is
        no copy, by a shape that is computed from `after`.
        """
        if weight.dtype == "f32":
            return weight
        sizes = self.body.ints([weight.size(axis) for axis in range(len(weight.shape))])
        one = self.body.op("Min", after.length(0), 1)
        same = self.body.op("Reshape", weight, sizes * one)
        return Value(same.name, self.body, weight.dtype, weight.shape)

    def nibbles(self, packed: Value, scales: Value, *, width: int, group: int, rank: int) -> Value:
        """Values [..., width] of bytes of two nibbles, the low one first, and their scales."""
        low = self.body.op("BitwiseAnd", packed, np.array(15, np.uint8))
        shift = np.array(4, np.uint8)
        high = self.body.op("BitShift", packed, shift, attrs={"direction": "RIGHT"})
        pairs = self.body.concat([low.unsqueeze(rank), high.unsqueeze(rank)], rank)
        codes = pairs.reshape(*[0] * (rank - 1), -1).slice(rank - 1, 0, width)
        return self.by_blocks(codes.cast("f32") - 8.0, scales, width=width, rank=rank, block=group)

    def linear(self, x: Value, weight: Value) -> Value:
        """Rows x [T, D] times weight [N, D] transposed."""
        return self.body.op("Gemm", x, weight, attrs={"transB": 1})

    def int4_linear(self, x: Value, packed: Value, scales: Value, group: int) -> Value:
        """Rows x [T, D] times a matrix of nibbles in bytes [N, P] transposed."""
        width = x.size(-1)
        codes = self.waiting(packed, x)
        return self.linear(x, self.nibbles(codes, scales, width=width, group=group, rank=2))

    def by_head(self, x: Value, y: Value) -> Value:
        """Product of x [T, H, a] and y [H, a, c], as [H, T, c]."""
        return x.transpose(1, 0, 2) @ y

    def scores(self, q: Value, k: Value, scale: float) -> Value:
        """Product of q [T, H, a] and k [S, H, a] transposed, as [H, T, S]."""
        return (q.transpose(1, 0, 2) @ k.transpose(1, 2, 0)) * scale

    def mixed(self, p: Value, v: Value) -> Value:
        """Product of p [H, T, S] and v [S, H, a], as [H, T, a]."""
        return p @ v.transpose(1, 0, 2)

    def shared_scores(self, q: Value, k: Value, scale: float) -> Value:
        """Product of q [B, n, a] and k [B, S, a] transposed."""
        return (q @ k.transpose(0, 2, 1)) * scale

    def from_latent(self, o: Value, w_v: Value) -> Value:
        """Product of o [T, H, c] and w_v [H, V, c] transposed, as [T, H, V]."""
        # The weight stays as it is: folding its transpose would make a copy of it.
        return (w_v @ o.transpose(1, 2, 0)).transpose(2, 0, 1)

    def by_each(self, x: Value, weights: Value, *, rank: int) -> Value:
        """Rows x [..., n, a] times matrices [..., m, a] transposed, as [..., n, m]."""
        axes = [*range(rank - 2), rank - 1, rank - 2]
        # What is computed is transposed, the weights are not.
        return (weights @ x.transpose(*axes)).transpose(*axes)

    # -------------------------------------------------------------------------------- norm and gate

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """Norm over the last axis."""
        attrs = {"epsilon": eps, "axis": -1}
        return self.body.op("RMSNormalization", x, weight, attrs=attrs)

    def rms_norm_of_parts(self, x: Value, weight: Value, eps: float, *, width: int) -> Value:
        """Norm over the last axis, of that width; `weight` has the last two axes of x.

        The op's own scale may have no more axes than are normed. ONNX Runtime takes two on a CPU,
        three times slower than with a product behind, and on a GPU the first row for all of them.
        """
        plain = self.body.value(np.ones(width, np.float32))
        return self.rms_norm(x, plain, eps) * weight

    def add_rms_norm(
        self, x: Value, residual: Value, weight: Value, eps: float
    ) -> tuple[Value, Value]:
        h = x + residual
        return self.rms_norm(h, weight, eps), h

    def silu_mul(self, gate: Value, up: Value) -> Value:
        return gate * self.body.op("Sigmoid", gate) * up

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
        """Lightning attention of n tokens of each sequence, and the states after them.

        Args:
            q: [B, n, H K], or None where only the states are wanted.
            k: [B, n, H K], zero for tokens that do not count.
            v: [B, n, H V].
            rate: Decay rates [H].
            start: States [B, H, K, V], with H, K and V as numbers.
            counts: f32 [B, n]: 1 for tokens that count, 0 for those that must leave no trace.
                None where all do.
            span: The shape B, n, for a library that needs it where all count.
        """
        del span
        body = self.body
        heads, key, value = (start.size(axis) for axis in (1, 2, 3))
        ks = k.reshape(0, 0, heads, key).transpose(0, 2, 1, 3)
        vs = v.reshape(0, 0, heads, value).transpose(0, 2, 1, 3)
        fall = -body.op("Max", rate, LEAST_RATE).reshape(1, heads, 1, 1)
        order = body.count_to(k.length(1))
        if counts is None:
            seen = (order.cast("f32") + 1.0).unsqueeze(0)
        else:
            seen = body.op("CumSum", counts, 1)
        whole = seen.slice(1, -1)

        def decayed(lag: Value) -> Value:
            return body.op("Exp", lag.unsqueeze(1, 3) * fall)

        added = (ks * decayed(whole - seen)).transpose(0, 1, 3, 2) @ vs
        end = decayed(whole) * start + added
        if q is None:
            return end, end
        qs = q.reshape(0, 0, heads, key).transpose(0, 2, 1, 3)
        causal = body.op("GreaterOrEqual", order.unsqueeze(1), order)
        lag = body.where(causal, seen.unsqueeze(2) - seen.unsqueeze(1), FAR)
        within = body.op("Exp", lag.unsqueeze(1) * fall) * (qs @ ks.transpose(0, 1, 3, 2))
        # Scaled last. Were q scaled, a product by one number would be read by a matrix product and
        # by a product with what may be one number too (one head, one token), and of these ONNX
        # Runtime's MatMulScaleFusion makes a model that reads the first after removing it.
        o = (within @ vs + (qs * decayed(seen)) @ start) * float(key**-0.5)
        return o.transpose(0, 2, 1, 3).reshape(0, 0, heads * value), end

    # ------------------------------------------------------------------------------------- experts

    def experts(self, x: Value, ids: Value, weights: Value, gate_up: Stack, down: Stack) -> Value:
        """Weighted sum of the chosen experts of each token, [T, D]."""
        run = few_experts if self.few_tokens else grouped_experts
        return run(self, x, ids, weights, gate_up, down)
