"""One arithmetic for each op, whatever the batch: what `--batch-invariant` asks for.

Tactics are fast because they suit their sizes, and add up in an order that suits them too. So a
request's last bits would change with how many others run beside it. Here each kind of call gets
one arithmetic (`lingc.kernel.Tactic.arithmetic`) in all buckets of its family:

    steps    decode, verify and rounds of drafts, which so agree with each other as well
    prompts  prefill

Of those that are offered in every bucket it is the one that loses least on average, by the model
of time. The draft layer is left alone: what it guesses decides how many tokens a round keeps, and
not which.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lingc.errors import InputError
from lingc.op import Op
from lingc.plan import Arg, Program, Ref, Size, Step, TensorType
from lingc.targets.cuda.tactics import Choice, key, offered, rank
from lingc.targets.spec import Target

FAMILIES: Mapping[str, str] = {
    "decode": "steps", "verify": "steps", "round": "steps", "prefill": "prompts",
}  # fmt: skip
"""Phase -> family. Of a phase that is not here the batch is free to choose."""

Kind = tuple[str, str, str]
"""Family, op, and its arguments with every size that a bucket sets left open."""


def kind_of(phase: str, op: Op, step: Step, program: Program) -> Kind | None:
    """What calls have in common that must add up alike; None where nothing must."""
    family = FAMILIES.get(phase)
    if family is None:
        return None
    return family, op.name, key([_open(arg, program) for arg in step.args])


@dataclass(slots=True)
class Pins:
    """The arithmetic of each kind of call; `see` every call of every bucket first."""

    target: Target
    _seen: dict[Kind, dict[str, list[Choice]]] = field(default_factory=dict)
    _settled: dict[Kind, Hashable] = field(default_factory=dict)

    def see(self, kind: Kind, op: Op, arguments: Sequence[Any]) -> None:
        """Note what is offered for known sizes.

        Raises:
            InputError: The op has no kernel for them, with its reason.
        """
        known = self._seen.setdefault(kind, {})
        if (name := key(arguments)) not in known:
            tactics = offered(op, self.target, arguments, invariant=True)
            known[name] = rank(tactics, self.target)

    def choose(self, kind: Kind, arguments: Sequence[Any]) -> Choice:
        """The fastest tactic of the settled arithmetic.

        Raises:
            InputError: No arithmetic is offered for all sizes that were seen.
        """
        if kind not in self._settled:
            self._settled[kind] = _settle(kind, self._seen[kind].values())
        wanted = self._settled[kind]
        ranked = self._seen[kind][key(arguments)]
        return next(choice for choice in ranked if choice.tactic.arithmetic == wanted)


def _settle(kind: Kind, every: Iterable[Sequence[Choice]]) -> Hashable:
    losses: list[dict[Hashable, float]] = []
    for ranked in every:
        found: dict[Hashable, float] = {}
        for choice in ranked:
            if (one := choice.tactic.arithmetic) is not None:
                found.setdefault(one, choice.seconds / max(ranked[0].seconds, 1e-12))
        losses.append(found)
    common = [one for one in losses[0] if all(one in found for found in losses)]
    if not common:
        family, op, sizes = kind
        raise InputError(
            f"{op} of {sizes} has no kernel that adds up alike in all {family} of an engine",
            hint="build without --batch-invariant",
        )
    return min(common, key=lambda one: sum(found[one] for found in losses))


def _open(arg: Arg, program: Program) -> Any:
    match arg:
        case Ref(name):
            kind = program.types[name]
            shape = tuple("*" if isinstance(dim, str) else dim for dim in kind.shape)
            return TensorType(kind.dtype, shape)
        case Size():
            return "*"
        case tuple():
            return [_open(item, program) for item in arg]
    return arg
