"""Eager beside a backend: the same tokens, call by call, from the same states.

A call of a phase names its sequences by slot and says where their tokens stand, so what a slot
holds is known without the runtime's table: position 0 begins anew, and `accepted` says how many of
a slot's last verified tokens are to be believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lingc.model.block import State
from lingc.model.model import LingModel
from lingc.parity.bisect.watch import INPUT, watched
from lingc.runtime.backend import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What eager says of one call.

    Attributes:
        values: Name of `lingc.parity.bisect.watch` -> value, packed: [T, ...].
        sources: The same names -> line of the model.
        states: Linear layer -> slot -> state [H, K, V] as the phase leaves it.
        lengths: Slot -> its tokens in this call.
    """

    values: Mapping[str, Tensor]
    sources: Mapping[str, str]
    states: Mapping[int, Mapping[int, Tensor]]
    lengths: Mapping[int, int]


@dataclass(slots=True)
class _Sequence:
    """What a slot holds: eager's state, verified tokens that wait, and the last hidden states."""

    state: State
    waiting: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(slots=True)
class Lockstep:
    """Runs the model as a backend is run.

    Args:
        module: The model.
    """

    module: LingModel
    _slots: dict[int, _Sequence] = field(default_factory=dict)
    _pages: dict[int, int] = field(default_factory=dict)

    def run(self, phase: str, inputs: Mapping[str, Array]) -> Told:
        """One call; its sequences must have tokens, and no padding stand among them."""
        ids, offsets = inputs["token_ids"], inputs["offsets"]
        slots = self._slots_of(inputs)
        parts: dict[str, list[Tensor]] = {}
        sources: dict[str, str] = {}

        def visit(name: str, value: Tensor, source: str) -> Tensor:
            flat = value.flatten(0, 1) if name.startswith("lm_head") else value
            parts.setdefault(name, []).append(flat)
            sources[name] = source
            return value

        states: dict[int, dict[int, Tensor]] = {}
        with torch.inference_mode():
            for index, slot in enumerate(slots):
                tokens = torch.from_numpy(ids[offsets[index] : offsets[index + 1]]).long()
                first = int(inputs["positions"][offsets[index]])
                accepted = int(inputs["accepted"][index]) if "accepted" in inputs else 0
                held = self._begin(slot, first, accepted, phase)
                with watched(self.module, visit):
                    self._feed(held, phase, tokens[None])
                for layer, state in held.state.linear.items():
                    states.setdefault(layer, {})[slot] = state[0]
        return Told(
            values={name: torch.cat(found) for name, found in parts.items()},
            sources=sources,
            states=states,
            lengths=dict(zip(slots, np.diff(offsets).tolist(), strict=True)),
        )

    def _slots_of(self, inputs: Mapping[str, Array]) -> list[int]:
        """The slots of a call; a draft, which has no linear state, is known by its pages."""
        first_pages = inputs["page_table"][:, 0].tolist()
        if "slots" not in inputs:
            return [self._pages[page] for page in first_pages]
        slots: list[int] = inputs["slots"].tolist()
        self._pages.update(zip(first_pages, slots, strict=True))
        return slots

    def _begin(self, slot: int, first: int, accepted: int, phase: str) -> _Sequence:
        if phase == "draft":
            return self._slots[slot]
        if first == 0:
            self._slots[slot] = _Sequence(self.module.new_state(1))
        held = self._slots[slot]
        if held.waiting is not None and accepted:
            self.module.forward_hidden(held.waiting[:, :accepted], held.state)
        held.waiting = None
        assert held.state.length == first, "a call goes on where the slot's last one ended"
        return held

    def _feed(self, held: _Sequence, phase: str, tokens: Tensor) -> None:
        if phase == "draft":
            self.module.mtp(tokens, cast("Tensor", held.hidden), held.state)
        elif phase == "verify":
            # The tokens wait: what they make of the state is forgotten until some are accepted.
            self.module(tokens, held.state.copy())
            held.waiting = tokens
        else:
            held.hidden = self.module.forward_hidden(tokens, held.state)
            self.module.logits(held.hidden)


def given_to(name: str) -> str:
    """Name of what a module is given."""
    return f"{name}{INPUT}"
