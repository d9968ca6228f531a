"""The attention of a layer with weights that are given, and gradients inside of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lingc.model.config import ModelConfig
from lingc.model.linear_attention import LinearAttention, lightning, new_linear_state
from lingc.model.mla import MLA
from lingc.model.model import CHUNK
from lingc.model.rope import rope_table


def attention_names(config: ModelConfig, layer: int) -> list[str]:
    """What of a layer's attention has a weight, but `dense`."""
    if not config.is_mla(layer):
        return ["query_key_value", "query_layernorm", "key_layernorm", "g_proj", "g_norm"]
    first = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    return [*first, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"]


class Attention:
    """The attention of a layer, sample by sample, from an empty state.

    Args:
        config: Of the model.
        layer: Its number; the MTP layer's is the number of main layers.
        weights: By their names below `attention`, f32; `dense` only where `output` is wanted.
    """

    def __init__(self, config: ModelConfig, layer: int, weights: Mapping[str, Tensor]) -> None:
        self._config = config
        with torch.device("meta"):
            self._module = MLA(config, layer) if config.is_mla(layer) else None
            self._linear = LinearAttention(config, layer) if self._module is None else None
        module: nn.Module | None = self._module or self._linear
        assert module is not None
        setattr(module, "dense", nn.Identity())  # noqa: B010 what `finish` ends with
        for name in [name for name, _ in module.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(weights[name], requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, value)
        self._named = module
        self._dense = weights.get("dense.weight")
        self._like = next(iter(weights.values()))
        if self._linear is not None:
            rates = config.decay(layer).tolist()
            self._linear.decay = torch.tensor(rates, device=self._like.device)
        dim = config.rotary_dim if self._module is None else config.qk_rope_head_dim
        self._inv_freq = torch.tensor(config.inv_freq(dim).tolist(), device=self._like.device)

    def output(self, n: Tensor) -> Tensor:
        """What the residual stream gains: [T, D] of the normed inputs [T, D] of one sample."""
        assert self._dense is not None, "given where this is wanted"
        return nn.functional.linear(self.mixed(n), self._dense)

    def slopes(self, n: Tensor, behind: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Gradients of what some projections of the inputs give, f32 [T, .] each.

        Args:
            n: Normed inputs of one sample, f32 [T, D].
            behind: Gradient of `output`, f32 [T, D].
            names: Of the projections.
        """
        given: dict[str, Tensor] = {}
        hooks = [
            self._named.get_submodule(name).register_forward_hook(
                lambda _module, _args, made, name=name: given.update({name: made})
            )
            for name in names
        ]
        with torch.enable_grad():
            made = self.output(n.detach().requires_grad_())
        for hook in hooks:
            hook.remove()
        return list(torch.autograd.grad(made, [given[name] for name in names], behind))

    def mixed(self, n: Tensor) -> Tensor:
        """Input of `dense`: [T, H * V] of the normed inputs [T, D] of one sample."""
        factor = self._config.rope_attention_factor
        positions = torch.arange(n.shape[0], device=n.device)
        cos, sin = rope_table(positions, self._inv_freq, factor)
        if self._linear is None:
            assert self._module is not None
            q, latent = self._module.latent(n, cos, sin)
            o = self._module.attend(q.unsqueeze(0), latent.unsqueeze(0), absorbed=False)
            return self._module.finish(o.flatten(0, 1))
        q, k, v = (x.unsqueeze(0) for x in self._linear.project(n, cos, sin))
        state = new_linear_state(self._config, 1, n)
        o, _ = lightning(q, k, v, self._linear.decay, state, chunk=CHUNK)
        return self._linear.finish(o.flatten(0, 1).flatten(1), n)
