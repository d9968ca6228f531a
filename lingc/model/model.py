"""The whole model: embedding, blocks, final norm, LM head, and the MTP layer beside them.

Parameter names are the checkpoint's, except that the routed experts of a layer are stacked:
`mlp.experts.gate_proj` holds `mlp.experts.{e}.gate_proj.weight` for every e.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lingc.errors import IncompatibleError, PromptError
from lingc.model.block import Block, Pass, State, Taps
from lingc.model.config import ModelConfig
from lingc.model.linear_attention import LinearAttention, new_linear_state
from lingc.model.mtp import MTP
from lingc.model.norm import RMSNorm, widen
from lingc.model.rope import rope_table

CHUNK = 64
"""Default tokens a chunk of the lightning form."""


class Decoder(nn.Module):
    """What the checkpoint calls `model`. The MTP layer, where there is one, is the last layer."""

    def __init__(self, config: ModelConfig, *, with_mtp: bool) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([*blocks, MTP(config)] if with_mtp else blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LingModel(nn.Module):
    """A Ling-2.6 model of any legal config.

    Build it on the meta device to have the modules without the weights, or with
    `lingc.model.load` to have both.

    Args:
        config: The architecture.
        with_mtp: Whether to have the MTP layer; by default as the config says. Some releases
            name one in the config and ship no weights for it.
    """

    linear_inv_freq: Tensor
    mla_inv_freq: Tensor

    def __init__(self, config: ModelConfig, *, with_mtp: bool | None = None) -> None:
        super().__init__()
        self.config = config
        self.has_mtp = config.has_mtp if with_mtp is None else with_mtp
        self.model = Decoder(config, with_mtp=self.has_mtp)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("linear_inv_freq", torch.empty(0), persistent=False)
        self.register_buffer("mla_inv_freq", torch.empty(0), persistent=False)
        self.reset_constants()

    def reset_constants(self) -> None:
        """Compute what follows from the config alone, for the weights' device and dtype."""
        like = widen(self.lm_head.weight[:0])
        for name, dim in (
            ("linear_inv_freq", self.config.rotary_dim),
            ("mla_inv_freq", self.config.qk_rope_head_dim),
        ):
            angles = self.config.inv_freq(dim).tolist()
            setattr(self, name, torch.tensor(angles, dtype=like.dtype, device=like.device))
        for module in self.modules():
            if isinstance(module, LinearAttention):
                module.reset_constants()

    def new_state(self, batch: int) -> State:
        """The state before the first token of `batch` sequences."""
        like = self.lm_head.weight
        layers = (*self.config.mla_layers, *([self.config.mtp_layer] if self.has_mtp else []))
        return State(
            length=0,
            linear={
                layer: new_linear_state(self.config, batch, like)
                for layer in self.config.linear_layers
            },
            cache={
                layer: widen(like).new_zeros(batch, 0, self.config.latent_dim) for layer in layers
            },
        )

    def forward(
        self,
        token_ids: Tensor,
        state: State | None = None,
        *,
        chunk: int = CHUNK,
        absorbed: bool | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab] of every token; the arguments are those of `forward_hidden`.

        FP32, also in a BF16 module; float64 in a float64 module.
        """
        hidden = self.forward_hidden(token_ids, state, chunk=chunk, absorbed=absorbed, taps=taps)
        return self.logits(hidden)

    def forward_hidden(
        self,
        token_ids: Tensor,
        state: State | None = None,
        *,
        chunk: int = CHUNK,
        absorbed: bool | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm.

        Args:
            token_ids: [B, T], whole numbers.
            state: What the tokens follow, and what then includes them; None for an empty one.
            chunk: Tokens a chunk of linear attention.
            absorbed: Which form of MLA; by default absorbed for single tokens. It changes
                rounding only.
            taps: Filled with `embedding`, `norm`, and for each layer l `layers.{l}.` `input`,
                `attention`, `mlp`, `output` [B, T, D], `router.logits`, `router.ids`,
                `router.weights` [B, T, .], and afterwards `state` or `cache`.

        Raises:
            PromptError: Token ids of another shape, or outside the vocabulary.
        """
        self._check(token_ids)
        state = self.new_state(token_ids.shape[0]) if state is None else state
        run = self._pass(
            token_ids, state, start=state.length, chunk=chunk, absorbed=absorbed, taps=taps
        )
        x = self.model.word_embeddings(token_ids.flatten())
        run.tap("embedding", x)
        for layer in range(self.config.num_hidden_layers):
            x = self.model.layers[layer](x, run)
        state.length += token_ids.shape[1]
        hidden: Tensor = self.model.norm(x)
        run.tap("norm", hidden)
        return hidden.view(*token_ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The LM head: [..., D] -> [..., vocab], at least FP32."""
        return widen(self.lm_head(hidden))

    def mtp(
        self,
        next_token_ids: Tensor,
        hidden: Tensor,
        state: State | None = None,
        *,
        absorbed: bool | None = None,
        taps: Taps | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draft the token after next.

        Args:
            next_token_ids: [B, T], the token after each row's.
            hidden: [B, T, D] of the rows, from `forward_hidden` or an earlier draft's second
                result.
            state: Its MTP rows are the rows before these, and then include them; None for none.
            absorbed: As for `forward_hidden`.
            taps: As for `forward_hidden`, for the MTP layer alone.

        Returns:
            Logits [B, T, vocab] and hidden states f [B, T, D].

        Raises:
            IncompatibleError: The model has no MTP layer.
            PromptError: Token ids of another shape, or outside the vocabulary.
        """
        if not self.has_mtp:
            raise IncompatibleError(
                "the model has no MTP layer",
                hint="generate without drafts, or use a release that ships the MTP weights",
            )
        self._check(next_token_ids)
        state = self.new_state(next_token_ids.shape[0]) if state is None else state
        rows = state.cache[self.config.mtp_layer].shape[1]
        run = self._pass(
            next_token_ids, state, start=rows, chunk=CHUNK, absorbed=absorbed, taps=taps
        )
        layer = cast("MTP", self.model.layers[self.config.mtp_layer])
        embedded = self.model.word_embeddings(next_token_ids.flatten())
        y = layer(layer.mix(embedded, hidden.flatten(0, 1)), run)
        f: Tensor = layer.final_layernorm(y).view(*next_token_ids.shape, -1)
        return self.logits(f), f

    def _pass(
        self,
        token_ids: Tensor,
        state: State,
        *,
        start: int,
        chunk: int,
        absorbed: bool | None,
        taps: Taps | None,
    ) -> Pass:
        batch, tokens = token_ids.shape
        positions = torch.arange(start, start + tokens, device=token_ids.device).repeat(batch)
        factor = self.config.rope_attention_factor
        return Pass(
            batch=batch,
            linear_rope=rope_table(positions, self.linear_inv_freq, factor),
            mla_rope=rope_table(positions, self.mla_inv_freq, factor),
            state=state,
            chunk=chunk,
            absorbed=tokens == 1 if absorbed is None else absorbed,
            taps=taps,
        )

    def _check(self, token_ids: Tensor) -> None:
        if token_ids.dim() != 2 or token_ids.is_floating_point() or token_ids.numel() == 0:
            raise PromptError(
                f"token ids have shape {tuple(token_ids.shape)} and dtype {token_ids.dtype}, "
                "not [B, T] whole numbers with at least one token"
            )
        least, most = token_ids.min().item(), token_ids.max().item()
        if least < 0 or most >= self.config.vocab_size:
            raise PromptError(
                f"token id {int(least if least < 0 else most)} is outside the vocabulary of "
                f"{self.config.vocab_size}",
                hint="the prompt was tokenized for another model",
            )
