"""The model in plain PyTorch as a side: one pass over each row."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from lingc.errors import IncompatibleError
from lingc.model.block import Block
from lingc.model.model import LingModel
from lingc.model.moe import MoE
from lingc.parity.experts import Routing
from lingc.parity.side import F32, STATE_POSITIONS, Choice, Mode, Scores, Tokens


class EagerSide:
    """Implements `lingc.parity.side.Side` with a module.

    Every mode but draft means the same one pass, so its result is kept for the modes that follow.

    Args:
        module: The model, in any dtype.
        name: What to call it.
    """

    def __init__(self, module: LingModel, name: str) -> None:
        self.module: LingModel | None = module
        self.name = name
        self.vocab = module.config.vocab_size
        self.routing = routing(module)
        self._kept: tuple[object, list[Scores]] | None = None

    def score(self, rows: Sequence[Tokens], mode: Mode) -> list[Scores]:
        key = (mode == "draft", tuple(map(tuple, rows)))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode():
                self._kept = key, [self._row(row, mode) for row in rows]
        return self._kept[1]

    def close(self) -> None:
        self.module = self._kept = None

    def _row(self, row: Tokens, mode: Mode) -> Scores:
        module = self.module
        assert module is not None, "the side is closed"
        taps = KeptTaps()
        ids = torch.tensor([list(row)])
        states: dict[tuple[int, int], F32] = {}
        if mode == "draft":
            if not module.has_mtp:
                raise IncompatibleError(f"{self.name} has no MTP layer to draft with")
            # The last token has no next one to be told.
            hidden = module.forward_hidden(ids[:, :-1], taps=taps)
            logits, _ = module.mtp(ids[:, 1:], hidden, taps=taps)
        else:
            logits = module.logits(_in_pieces(module, ids, taps, states))
        return Scores(
            logits=logits[0].float().numpy(),
            experts=_choices(module, taps),
            layers={
                int(name.split(".")[1]): taps[name][0].float().numpy()
                for name in taps
                if name.endswith(OUTPUT)
            },
            states=states,
        )


OUTPUT = ".output"


class KeptTaps(dict[str, Tensor]):
    """Taps that keep what routers say and what layers end with, of all pieces of a row."""

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name.endswith((".router.ids", ".router.logits", OUTPUT)):
            earlier = self.get(name)
            super().__setitem__(name, value if earlier is None else torch.cat((earlier, value), 1))


def _in_pieces(
    module: LingModel, ids: Tensor, taps: KeptTaps, states: dict[tuple[int, int], F32]
) -> Tensor:
    """Hidden states of a row, which stops where states are looked at."""
    length = ids.shape[1]
    ends = [*(end for end in STATE_POSITIONS if end < length), length]
    state, found = module.new_state(1), []
    for start, end in pairwise((0, *ends)):
        found.append(module.forward_hidden(ids[:, start:end], state, taps=taps))
        for layer, value in state.linear.items():
            states[layer, end] = value[0].float().numpy()
    return torch.cat(found, dim=1)


def routing(module: LingModel) -> Routing | None:
    """How the model chooses experts; None for one without."""
    config = module.config
    if config.first_k_dense_replace > config.num_hidden_layers:
        return None
    return Routing(
        groups=config.n_group,
        kept_groups=config.topk_group,
        top_k=config.num_experts_per_tok,
        experts=config.num_experts,
    )


def _choices(module: LingModel, taps: KeptTaps) -> dict[int, Choice]:
    found = {}
    for name in taps:
        if name.endswith(".ids"):
            stem = name.removesuffix(".ids")
            layer = int(stem.split(".")[1])
            gate = cast("MoE", cast("Block", module.model.layers[layer]).mlp).gate
            biased = torch.sigmoid(taps[f"{stem}.logits"][0]) + gate.expert_bias
            found[layer] = Choice(ids=taps[name][0].int().numpy(), biased=biased.float().numpy())
    return found
