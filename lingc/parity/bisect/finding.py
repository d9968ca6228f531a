"""What a bisection ends with: one tensor, what makes it, and how it is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lingc.checkpoint import Source
from lingc.errors import LingcError
from lingc.parity.bisect.judge import Element
from lingc.parity.bisect.walk import Fault
from lingc.plan import Plan, WeightSpec, refs
from lingc.quantize.formats import widen_bf16
from lingc.quantize.layouts import restore
from lingc.runtime.backend import Array
from lingc.weights import materialize


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongWeight:
    """A weight that is not what the checkpoint gives.

    Attributes:
        name: In the plan, or in the checkpoint.
        sources: Tensors of the checkpoint that it is made of.
        wrong: Elements, as stored, that differ.
        experts: Which of a stack they stand in; empty for a plain matrix.
        at: The first of them.
        got: As stored there.
        want: As the checkpoint gives it.
    """

    name: str
    sources: tuple[str, ...]
    elements: int
    wrong: int
    experts: tuple[int, ...]
    at: tuple[int, ...]
    got: float
    want: float

    def __str__(self) -> str:
        share = f"{self.wrong} of {self.elements} elements are not what the checkpoint gives"
        where = f" (expert {', '.join(map(str, self.experts[:8]))})" if self.experts else ""
        first = f"first at {list(self.at)}: {self.got:g}, must be {self.want:g}"
        return f"{self.name}: {share}{where}, {first}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first result that is not what it should be.

    Attributes:
        compared: Which walk found it: `plan against eager`.
        tensor: Its name.
        op: What makes it: an op of the plan, or a part of the model.
        source: Line of the model that it comes from.
        rows: Rows of the tensor; tokens, or heads of a state.
        bad_rows: How many are wrong.
        elements: The first wrong ones.
        weights: Of those that the step reads, the ones that the checkpoint gives otherwise.
        after: Steps since the last sound one that could not be judged by themselves.
        others: Further results of the call that are wrong by themselves: tensor, op, error.
    """

    compared: str
    tensor: str
    op: str
    layer: int
    source: str
    phase: str
    call: int
    error: float
    limit: float
    rows: int
    bad_rows: int
    elements: tuple[Element, ...]
    weights: tuple[WrongWeight, ...] = ()
    after: tuple[str, ...] = ()
    others: tuple[tuple[str, str, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """In JSON's types."""
        value = asdict(self)
        value["weights"] = [{**asdict(w), "text": str(w)} for w in self.weights]
        return value

    def lines(self) -> Sequence[str]:
        """For a terminal, the most important first."""
        where = f"layer {self.layer}" if self.layer >= 0 else "outside the layers"
        found = [
            f"first fault: {self.tensor}",
            f"  made by {self.op}, {where}, {self.source or 'no source line'}",
            f"  in {self.phase}, call {self.call}, {self.compared}",
        ]
        size = f"error {self.error:.3g} of a row, at most {self.limit:.3g} is due"
        found.append(f"  {size}; {self.bad_rows} of {self.rows} rows are wrong")
        found += [f"  at {list(e.at)}: {e.got!r}, must be {e.want!r}" for e in self.elements]
        found += [f"  weight {wrong}" for wrong in self.weights]
        if self.after:
            found.append(f"  or in what feeds it, not judged by itself: {', '.join(self.after)}")
        if self.others:
            shown = ", ".join(f"{tensor} ({op})" for tensor, op, _ in self.others[:6])
            more = f" and {len(self.others) - 6} more" if len(self.others) > 6 else ""
            found.append(f"  wrong by themselves too: {shown}{more}")
        return found


def finding(compared: str, faults: Sequence[Fault], wrong: Sequence[WrongWeight] = ()) -> Finding:
    """The first fault of a call, with the others beside it."""
    first, *rest = faults
    step, judged = first.step, first.judged
    return Finding(
        compared=compared,
        tensor=first.output,
        op=step.op,
        layer=step.layer,
        source=step.source,
        phase=first.phase,
        call=first.call,
        error=judged.error,
        limit=judged.limit,
        rows=judged.rows,
        bad_rows=judged.bad_rows,
        elements=judged.elements,
        weights=tuple(wrong),
        after=tuple(f"{s.outputs[0]} ({s.op}, {s.source})" for s in first.unseen),
        others=tuple((f.output, f.step.op, f.judged.error) for f in rest),
    )


def wrong_weights(
    fault: Fault, plan: Plan, weights: Mapping[str, Array], checkpoint: Source
) -> list[WrongWeight]:
    """Of the weights that a faulty step reads, those that the checkpoint gives otherwise."""
    found = []
    for name in dict.fromkeys(refs(fault.step.args)):
        spec = plan.weights.get(name)
        if spec is None:
            continue
        try:
            made = materialize(spec, checkpoint, checkpoint.config)
        except LingcError:  # a record that names what is not there is the plan's fault
            continue
        wrong = _difference(spec, weights[name], made)
        if wrong is not None:
            found.append(wrong)
    return found


def _difference(spec: WeightSpec, packed: Array, made: Array) -> WrongWeight | None:
    got, want = (restore(spec.layout, np.asarray(x)) for x in (packed, made))
    if got.shape != want.shape:
        return None  # and the reference would have refused it
    wrong = got.view(f"u{got.itemsize}") != want.view(f"u{want.itemsize}")
    if not wrong.any():
        return None
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    experts: tuple[int, ...] = ()
    if spec.experts:
        experts = tuple(np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1)).tolist())
    return WrongWeight(
        name=spec.name,
        sources=spec.members()[experts[0] if experts else 0],
        elements=got.size,
        wrong=int(wrong.sum()),
        experts=experts,
        at=first,
        got=_number(got, first, spec),
        want=_number(want, first, spec),
    )


def _number(values: Array, at: tuple[int, ...], spec: WeightSpec) -> float:
    one = values[at]
    if spec.type.dtype == "bf16":
        return float(widen_bf16(np.asarray([one], np.uint16))[0])
    return float(one)
