"""One decoder block, the pass it takes part in, and the state that a pass leaves behind."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lingc.model.config import ModelConfig
from lingc.model.linear_attention import LinearAttention, lightning
from lingc.model.mla import MLA
from lingc.model.moe import MLP, MoE
from lingc.model.norm import RMSNorm

Taps = dict[str, Tensor]
"""Where a pass leaves intermediate results, by name: see `LingModel.forward_hidden`."""


@dataclass(slots=True)
class State:
    """Everything that later tokens of B sequences need of the earlier ones.

    A pass replaces the tensors and never writes into them, so a `copy` is cheap and stays what it
    was: that is how drafted tokens are taken back.

    Attributes:
        length: Tokens that the main layers have seen.
        linear: Linear layer -> [B, H, K, V], FP32 or float64.
        cache: MLA layer -> [B, rows, c + r]; the MTP layer counts its own rows.
    """

    length: int
    linear: dict[int, Tensor]
    cache: dict[int, Tensor]

    def copy(self) -> "State":
        """A state that goes its own way from here."""
        return State(self.length, dict(self.linear), dict(self.cache))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a block needs beside the activations.

    Attributes:
        batch: Sequences; activations hold batch * T flattened tokens.
        linear_rope: Cosines and sines for linear layers, [batch * T, R/2] each.
        mla_rope: The same for MLA layers.
        state: Read and updated.
        chunk: Tokens a chunk of the lightning form.
        absorbed: Which form of MLA.
        taps: Where to leave intermediate results, or None.
    """

    batch: int
    linear_rope: tuple[Tensor, Tensor]
    mla_rope: tuple[Tensor, Tensor]
    state: State
    chunk: int
    absorbed: bool
    taps: Taps | None

    def tap(self, name: str, value: Tensor) -> None:
        """Leave [batch * T, ...] under a name, as [batch, T, ...]."""
        if self.taps is not None:
            self.taps[name] = value.unflatten(0, (self.batch, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(.)); which attention and mlp follows the layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention: LinearAttention | MLA
        if config.is_mla(layer):
            self.attention = MLA(config, layer)
        else:
            self.attention = LinearAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | MoE
        if config.is_dense(layer):
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = MoE(config)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """Residual stream [batch * T, D] in and out."""
        name = f"layers.{self.layer}"
        run.tap(f"{name}.input", x)
        attended = self._attend(self.input_layernorm(x), run)
        run.tap(f"{name}.attention", attended)
        x = x + attended
        fed = self._feed(self.post_attention_layernorm(x), run)
        run.tap(f"{name}.mlp", fed)
        x = x + fed
        run.tap(f"{name}.output", x)
        return x

    def _attend(self, n: Tensor, run: Pass) -> Tensor:
        if isinstance(self.attention, LinearAttention):
            return self._linear(self.attention, n, run)
        q, latent = self.attention.latent(n, *run.mla_rope)
        earlier = run.state.cache[self.layer]
        cache = torch.cat((earlier, latent.unflatten(0, (run.batch, -1))), dim=1)
        run.state.cache[self.layer] = cache
        if run.taps is not None:
            run.taps[f"layers.{self.layer}.cache"] = cache
        o = self.attention.attend(q.unflatten(0, (run.batch, -1)), cache, absorbed=run.absorbed)
        return self.attention.finish(o.flatten(0, 1).to(n.dtype))

    def _linear(self, attention: LinearAttention, n: Tensor, run: Pass) -> Tensor:
        q, k, v = (x.unflatten(0, (run.batch, -1)) for x in attention.project(n, *run.linear_rope))
        earlier = run.state.linear[self.layer]
        o, state = lightning(q, k, v, attention.decay, earlier, chunk=run.chunk)
        run.state.linear[self.layer] = state
        if run.taps is not None:
            run.taps[f"layers.{self.layer}.state"] = state
        return attention.finish(o.flatten(0, 1).to(n.dtype), n)

    def _feed(self, n: Tensor, run: Pass) -> Tensor:
        if isinstance(self.mlp, MLP):
            dense: Tensor = self.mlp(n)
            return dense
        logits = self.mlp.gate.logits(n)
        ids, weights = self.mlp.gate.select(logits)
        name = f"layers.{self.layer}.router"
        run.tap(f"{name}.logits", logits)
        run.tap(f"{name}.ids", ids)
        run.tap(f"{name}.weights", weights)
        return self.mlp.combine(n, ids, weights)
