"""Two checkpoints, both run by eager: part by part, the second fed the values of the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lingc.checkpoint import Source
from lingc.model.loading import checkpoint_names
from lingc.model.model import LingModel
from lingc.parity.bisect.finding import Finding, WrongWeight
from lingc.parity.bisect.judge import Judged, judge, judge_experts, judge_weights
from lingc.parity.bisect.watch import INPUT, watched
from lingc.parity.eager import routing
from lingc.parity.side import Tokens
from lingc.plan import TensorType

COMPARED = "checkpoint against checkpoint"

LIMITS: Mapping[str, float] = {
    "plain": 1e-4, "fp8_block": 0.08, "fp8_tensor": 0.08, "int4_group": 0.3,
}  # fmt: skip
"""What a product may be off by the narrower of its two matrices: a code is within 2^-4 of a value
in FP8, and within a seventh of the largest of its group in INT4; sums differ by a third of it."""

_F32 = TensorType("f32", ("T",))


@dataclass(slots=True)
class CheckpointWalk:
    """Compares every part of the model that leaves a value.

    Args:
        reference: The one that is believed, and what its weights are read from.
        other: The suspect, likewise.
    """

    reference: tuple[LingModel, Source]
    other: tuple[LingModel, Source]
    judged: int = 0
    calls: int = 0

    def score(self, rows: Sequence[Tokens]) -> Finding | None:
        """The first part that gives something else, in the order of the model."""
        for row in rows:
            faults = self._row(row)
            if faults:
                return self._finding(faults)
            self.calls += 1
        return None

    def _row(self, row: Tokens) -> list[tuple[str, str, Judged]]:
        # The MTP layer asks for embeddings and logits too, after the main layers did.
        told: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        faults: list[tuple[str, str, Judged]] = []
        is_draft = False

        def keep(name: str, value: Tensor, _source: str) -> Tensor:
            told[is_draft][name] = value
            return value

        def hold(name: str, value: Tensor, source: str) -> Tensor:
            judged = self._judge(name, value, told[is_draft])
            self.judged += 1
            if not judged.ok:
                faults.append((name, source, judged))
            return told[is_draft][name]

        models = (self.reference[0], self.other[0])
        with torch.inference_mode():
            states = []
            for module, visit in zip(models, (keep, hold), strict=True):
                state = module.new_state(1)
                with watched(module, visit):
                    hidden = module.forward_hidden(torch.tensor([list(row)]), state)
                    module.logits(hidden)
                    is_draft = all(model.has_mtp for model in models) and len(row) > 1
                    if is_draft:
                        module.mtp(torch.tensor([list(row[1:])]), hidden[:, :-1], state)
                    is_draft = False
                states.append(state)
        first, second = states
        for layer, want in first.linear.items():
            judged = judge(second.linear[layer][0], want[0], _F32, LIMITS["plain"])
            if not judged.ok:
                faults.append((f"model.layers.{layer}.attention.state", "", judged))
        return faults

    def _judge(self, name: str, value: Tensor, told: Mapping[str, Tensor]) -> Judged:
        want = told[name]
        stem, _, leaf = name.rpartition(".")
        if leaf == "ids":
            module = self.reference[0]
            how = routing(module)
            assert how is not None, "a model with a router has experts"
            bias = module.get_parameter(f"{stem}.expert_bias")
            return judge_experts(value, want, torch.sigmoid(told[f"{stem}.logits"]) + bias, how)
        limit = self.limit(name)
        if leaf == "weights":
            ids = told[f"{stem}.ids"]  # both have those by now
            return judge_weights(value, ids, want, ids, limit=limit)
        if value.dim() == 3 and value.shape[0] == 1:
            value, want = value[0], want[0]
        return judge(value, want, _F32, limit)

    def limit(self, name: str) -> float:
        """By how the two store what a part multiplies by."""
        kinds = {
            source.kind(tensor)
            for _, source in (self.reference, self.other)
            for tensor in self._tensors(name)
            if tensor in source.names
        }
        return max((LIMITS[kind] for kind in kinds), default=LIMITS["plain"])

    def _tensors(self, name: str) -> tuple[str, ...]:
        if name.endswith(INPUT):
            # What goes between the two halves of a dense or shared expert's feed-forward.
            return ()
        if name.endswith(".mlp.experts"):
            config = self.reference[1].config
            stacks = (f"{name}.{x}" for x in ("gate_proj", "up_proj", "down_proj"))
            return tuple(tensor for stack in stacks for tensor in checkpoint_names(stack, config))
        if name.endswith(".mlp.gate.logits"):
            return (f"{name.removesuffix('.logits')}.weight",)
        return (f"{name}.weight",)

    def _finding(self, faults: Sequence[tuple[str, str, Judged]]) -> Finding:
        name, source, judged = faults[0]
        parts = name.split(".")
        layer = int(parts[2]) if parts[1:2] == ["layers"] else -1
        module = self.reference[0]
        owner = name.removesuffix(INPUT)
        known = dict(module.named_modules())
        while owner not in known:
            owner = owner.rpartition(".")[0]
        return Finding(
            compared=COMPARED, tensor=name, op=type(known[owner]).__name__, layer=layer,
            source=source, phase="prefill", call=self.calls, error=judged.error,
            limit=judged.limit, rows=judged.rows, bad_rows=judged.bad_rows,
            elements=judged.elements, weights=tuple(self._wrong(name)),
            others=tuple((n, "", j.error) for n, _, j in faults[1:]),
        )  # fmt: skip

    def _wrong(self, name: str) -> list[WrongWeight]:
        """Tensors of the part that differ by more than their storage explains, the worst first."""
        (_, ours), (_, theirs) = self.reference, self.other
        found: list[tuple[float, WrongWeight]] = []
        for tensor in self._tensors(name):
            if tensor not in ours.names or tensor not in theirs.names:
                continue
            want, got = ours.dense(tensor), theirs.dense(tensor)
            error = float(((got - want) ** 2).sum() ** 0.5 / max((want**2).sum() ** 0.5, 1e-300))
            kinds = (ours.kind(tensor), theirs.kind(tensor))
            if error <= max(LIMITS[kind] for kind in kinds):
                continue
            wrong = got != want
            at = tuple(int(i) for i in torch.from_numpy(wrong).nonzero()[0].tolist())
            one = WrongWeight(
                name=tensor, sources=(tensor,), elements=want.size, wrong=int(wrong.sum()),
                experts=(), at=at, got=float(got[at]), want=float(want[at]),
            )  # fmt: skip
            found.append((error, one))
        return [one for _, one in sorted(found, key=lambda pair: -pair[0])[:4]]
