"""Match, check, replace, report: the only code that edits a program.

A rule says what it looks for as a function of ATen calls (`pattern`), whether it may fire
(`check`, which answers with a reason or None) and what it puts there (`replacement`). How often it
must fire follows from the model's config (`expected`); `lingc.pipeline` compares.

Patterns. Parameters bind to any value, the same name twice to the same value; a name that begins
with an underscore binds to anything each time. Addition and multiplication match in either order.
`either(x)` matches `x` itself or a cast of it. A pattern with several outputs returns a tuple.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from lingc.graph import (
    Program,
    Value,
    full_args,
    is_weight,
    target_name,
    tensor_type,
    type_of,
    where,
)
from lingc.op import OPS
from lingc.plan import TensorType, WeightSpec

aten = torch.ops.aten

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
CASTS = {aten.to.dtype, aten._to_copy.default}

NOT_MINE = "not mine"
"""Answer of a check where the match belongs to another rule: neither fired nor refused."""

REACH = 6
"""How many calls behind a pattern's inputs and nodes its other outputs are looked for."""

Pattern = Callable[..., Any]


@dataclass(slots=True)
class Match:
    """Where a pattern was found.

    Attributes:
        bound: Pattern name -> node or literal.
        nodes: The nodes of the pattern, inputs left out.
        outputs: The nodes that the replacement stands in for, in the pattern's order.
    """

    bound: dict[str, Value]
    nodes: dict[fx.Node, fx.Node]  # pattern node -> program node
    outputs: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def type(self, name: str) -> TensorType:
        """Type of the tensor bound to `name`."""
        return tensor_type(self.bound[name])

    def weight(self, name: str) -> WeightSpec:
        """The weight bound to `name`."""
        spec: WeightSpec = self.bound[name].meta["weight"]
        return spec

    def is_weight(self, name: str) -> bool:
        """Whether `name` is bound to a weight."""
        return is_weight(self.bound[name])


class Builder:
    """What a replacement may do: call ops and name weights."""

    def __init__(self, program: Program, like: fx.Node) -> None:
        self.program = program
        self.like = like

    def call(self, overload: Any, *args: Value, type: Any = None) -> fx.Node:  # noqa: A002
        """Call an op; its type follows from the op's rule, or is given for an ATen op."""
        node: fx.Node = self.program.graph.call_function(overload, args)
        name = overload._schema.name.removeprefix("lingc::")
        node.meta["type"] = OPS[name].types(*(type_of(a) for a in args)) if type is None else type
        node.meta["layer"] = self.like.meta.get("layer", -1)
        node.meta["source"] = self.like.meta.get("source", "")
        return node

    def once(self, overload: Any, *args: Value) -> fx.Node:
        """A call that another match may have made already; then that one."""
        first: fx.Node = args[0]
        for user in first.users:
            if user.target is overload and tuple(user.args) == args:
                return user
        return self.call(overload, *args)

    def items(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The results of a call with several."""
        known = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        made = []
        for i, item in enumerate(node.meta["type"]):
            get = known.get(i)
            if get is None:
                get = self.program.graph.call_function(operator.getitem, (node, i))
                get.meta.update(node.meta, type=item)
            made.append(get)
        return tuple(made)

    def slice(self, x: fx.Node, axis: int, start: int, end: int) -> fx.Node:
        """`x[..., start:end, ...]` along one axis of known size."""
        whole = tensor_type(x)
        shape = (*whole.shape[:axis], end - start, *whole.shape[axis + 1 :])
        kind = TensorType(whole.dtype, shape)
        return self.call(aten.slice.Tensor, x, axis, start, end, type=kind)

    def cat(self, first: fx.Node, second: fx.Node) -> fx.Node:
        """Two matrices side by side, along axis 1 of known sizes."""
        a, b = tensor_type(first), tensor_type(second)
        left, right = a.shape[1], b.shape[1]
        assert isinstance(left, int), "the first matrix has a symbolic width"
        assert isinstance(right, int), "the second matrix has a symbolic width"
        kind = TensorType(a.dtype, (a.shape[0], left + right))
        return self.call(aten.cat.default, [first, second], 1, type=kind)

    def weight(self, spec: WeightSpec) -> fx.Node:
        """The placeholder of a weight."""
        return self.program.weight(spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """One rewrite.

    Attributes:
        name: `<verb>_<object>`, also the file's name.
        patterns: Spellings of what is looked for; the first that matches at a node counts.
        check: `check(match, context)` -> a reason not to fire, `NOT_MINE`, or None.
        replacement: `replacement(builder, match, context)` -> the new value of each output.
        expected: `expected(context)` -> how often it must fire, or None where that does not
            follow from the config (cleaning up).
        shares: Whether inner nodes may have readers outside the match (they are then computed
            twice, which is only right for views and casts).
        again: Ops that may be computed twice all the same: cheap beside what they feed.
        repeat: Whether to go over the program again until nothing fires.
    """

    name: str
    patterns: tuple[Pattern, ...]
    check: Callable[[Match, Any], str | None]
    replacement: Callable[[Builder, Match, Any], tuple[Value, ...]]
    expected: Callable[[Any], int | None] = lambda _context: None
    shares: bool = False
    again: tuple[Any, ...] = ()
    repeat: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A place where a rule matched and did not fire."""

    rule: str
    reason: str
    place: str


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one rule did to one program.

    Attributes:
        near_miss: Where most of a pattern matched and the rest did not, and what stood in its way.
        near_depth: How many calls of the pattern matched there.
    """

    rule: str
    found: int = 0
    refused: list[Refusal] = field(default_factory=list)
    near_miss: str = ""
    near_depth: int = 0


def either(x: Any) -> Any:
    """In a pattern: `x`, or a cast of it."""
    return x.tracer.create_proxy("call_function", either, (x,), {})


# ---------------------------------------------------------------------------------------- matching


@cache
def _outputs(pattern: Pattern) -> tuple[fx.Node, ...]:
    """The outputs of the pattern's graph."""
    (output,) = (n for n in fx.Tracer().trace(pattern).nodes if n.op == "output")
    outputs = output.args[0]
    if isinstance(outputs, fx.Node):
        return (outputs,)
    assert isinstance(outputs, tuple)
    return outputs


class _Matcher:
    """One attempt at one place, with the near-miss it ended in."""

    def __init__(self) -> None:
        self.miss_depth = 0
        self.miss = ""
        self.within: fx.Node | None = None  # the call whose arguments are being matched

    def value(self, pattern: Value, value: Value, match: Match) -> Match | None:
        """`match` extended so that `pattern` stands for `value`, or None."""
        if isinstance(pattern, fx.Node):
            return self._node(pattern, value, match)
        if isinstance(pattern, list | tuple):
            if not isinstance(value, list | tuple) or len(pattern) != len(value):
                self.missed(match, f"expected {len(pattern)} values, found {_show(value)}")
                return None
            return self._sequence(pattern, value, match)
        if _same(pattern, value):
            return match
        self.missed(match, f"expected {pattern!r}, found {_show(value)}")
        return None

    def missed(self, match: Match, what: str) -> None:
        """Note what stood in the way, if no attempt came further."""
        if len(match.nodes) > self.miss_depth:
            self.miss_depth = len(match.nodes)
            self.miss = f"{what}; in {where(self.within or max(match.nodes.values()))}"

    def _sequence(
        self, patterns: Sequence[Value], values: Sequence[Value], match: Match
    ) -> Match | None:
        found: Match | None = match
        for pattern, value in zip(patterns, values, strict=True):
            if found is None:
                return None
            found = self.value(pattern, value, found)
        return found

    def _node(self, pattern: fx.Node, value: Value, match: Match) -> Match | None:
        if pattern.op == "placeholder":
            return self._bind(str(pattern.target), value, match)
        if pattern in match.nodes:
            if match.nodes[pattern] is value:
                return match
            self.missed(match, f"expected {match.nodes[pattern]}, found {_show(value)}")
            return None
        if pattern.target is either:
            cast = isinstance(value, fx.Node) and value.target in CASTS
            through = self.value(pattern.args[0], value.args[0], match) if cast else None
            return through or self.value(pattern.args[0], value, match)
        if not isinstance(value, fx.Node) or value.target != pattern.target:
            self.missed(match, f"expected {target_name(pattern)}, found {_show(value)}")
            return None
        extended = Match(match.bound, {**match.nodes, pattern: value})
        wanted, given = full_args(pattern), full_args(value)
        outer, self.within = self.within, value
        found = self._sequence(wanted, given, extended)
        if found is None and pattern.target in COMMUTATIVE:
            swapped = (given[1], given[0], *given[2:])
            found = self._sequence(wanted, swapped, extended)
        self.within = outer
        return found

    def _bind(self, name: str, value: Value, match: Match) -> Match | None:
        if name.startswith("_"):
            return match
        if name not in match.bound:
            return Match({**match.bound, name: value}, match.nodes)
        if _same(match.bound[name], value):
            return match
        both = f"{_show(match.bound[name])} and {_show(value)}"
        self.missed(match, f"{name} would be both {both}")
        return None


def _show(value: Value) -> str:
    return where(value) if isinstance(value, fx.Node) else repr(value)


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _complete(matcher: _Matcher, outputs: tuple[fx.Node, ...], match: Match) -> Match | None:
    """Extend a match of the last output to all of them."""
    for wanted in outputs:
        if wanted in match.nodes:
            continue
        extended = next(
            (
                extended
                for candidate in _candidates(wanted, match)
                if (extended := matcher.value(wanted, candidate, match)) is not None
            ),
            None,
        )
        if extended is None:
            matcher.missed(match, f"no {target_name(wanted)} completes the pattern")
            return None
        match = extended
    match.outputs = tuple(match.nodes[node] for node in outputs)
    return match


def _candidates(wanted: fx.Node, match: Match) -> list[fx.Node]:
    """Calls of the wanted op near the match, in order."""
    taken = set(match.nodes.values())
    near: set[fx.Node] = set()
    for node in [*match.nodes.values(), *match.bound.values()]:
        if isinstance(node, fx.Node) and not is_weight(node):
            near.update(_downstream(node, depth=REACH))
    return sorted(node for node in near - taken if node.target == wanted.target)


def _downstream(node: fx.Node, *, depth: int) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    frontier = [node]
    for _ in range(depth):
        frontier = [user for n in frontier for user in n.users if user not in reached]
        reached.update(frontier)
    return reached


def find(rule: Rewrite, node: fx.Node, outcome: Outcome) -> Match | None:
    """The first spelling of `rule` that ends at `node`."""
    for pattern in rule.patterns:
        outputs = _outputs(pattern)
        if node.target != outputs[-1].target:
            continue
        matcher = _Matcher()
        match = matcher.value(outputs[-1], node, Match({}, {}))
        match = match and _complete(matcher, outputs, match)
        if match is not None:
            return match
        if matcher.miss_depth > outcome.near_depth:
            outcome.near_depth, outcome.near_miss = matcher.miss_depth, matcher.miss
    return None


# --------------------------------------------------------------------------------------- replacing


def apply(program: Program, rule: Rewrite, context: Any) -> Outcome:
    """Apply one rule wherever it matches, in program order, and say what happened."""
    outcome = Outcome(rule=rule.name)
    while True:
        erased: set[fx.Node] = set()
        refused: list[Refusal] = []
        fired = 0
        for node in program.calls():
            match = None if node in erased else find(rule, node, outcome)
            if match is None:
                continue
            reason = rule.check(match, context) or _shared(rule, match)
            if reason is None:
                erased |= _replace(program, rule, context, match)
                fired += 1
            elif reason != NOT_MINE:
                refused.append(Refusal(rule=rule.name, reason=reason, place=where(node)))
        outcome.found += fired
        outcome.refused = refused  # of the last time round: what stays refused
        if not fired or not rule.repeat:
            break
    sweep(program)
    return outcome


def _shared(rule: Rewrite, match: Match) -> str | None:
    """Why inner nodes forbid the match: somebody else reads them."""
    if rule.shares:
        return None
    inner = set(match.nodes.values())
    for node in sorted(inner - set(match.outputs)):
        if _is_again(rule, node):
            continue
        outside = [user for user in node.users if user not in inner]
        if outside:
            return f"{target_name(node)} is also read by {where(outside[0])}"
    return None


def _is_again(rule: Rewrite, node: fx.Node) -> bool:
    """Whether a call, or the call that it is a result of, may be computed twice."""
    made = node.args[0] if node.target is operator.getitem else node
    return isinstance(made, fx.Node) and made.target in rule.again


def _replace(program: Program, rule: Rewrite, context: Any, match: Match) -> set[fx.Node]:
    """Put the replacement in place; return what was erased."""
    inputs = [v for v in _flat(match.bound.values()) if isinstance(v, fx.Node)]
    last_input = max((n for n in inputs if n.op != "placeholder"), default=None)
    first_call = next(n for n in program.graph.nodes if n.op != "placeholder")
    builder = Builder(program, match.outputs[-1])
    before = set(program.graph.nodes)
    with program.graph.inserting_before(last_input.next if last_input else first_call):
        values = rule.replacement(builder, match, context)
    assert len(values) == len(match.outputs), f"{rule.name}: one value for each output"
    made = [n for n in program.graph.nodes if n not in before]
    for old, new in zip(match.outputs, values, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in made)
    erased = set()
    for node in sorted(set(match.nodes.values()), reverse=True):
        if not node.users:
            program.graph.erase_node(node)
            erased.add(node)
    late = any(needed > node for node in made for needed in node.all_input_nodes)
    if late or any(user < node for node in made for user in node.users):
        _sort(program)
    return erased


def _flat(values: Any) -> list[Value]:
    flat: list[Value] = []
    for value in values:
        flat.extend(_flat(value) if isinstance(value, list | tuple) else [value])
    return flat


def _sort(program: Program) -> None:
    """Restore dependency order, moving as little as possible."""
    done: set[fx.Node] = set()
    for node in list(program.graph.nodes):
        _place(node, done)


def _place(node: fx.Node, done: set[fx.Node]) -> None:
    if node in done:
        return
    done.add(node)
    for needed in sorted(node.all_input_nodes):
        if needed > node:
            node.prepend(needed)
            done.discard(needed)
            _place(needed, done)


def sweep(program: Program) -> int:
    """Remove calls that nobody reads, and weights and constants likewise; return how many."""
    removed = 0
    for node in reversed(list(program.graph.nodes)):
        role = node.meta.get("role") if node.op == "placeholder" else None
        unread = node.op == "call_function" or role in ("weight", "constant")
        if unread and not node.users:
            if role == "weight":
                del program.weights[node.meta["weight"].name]
            program.graph.erase_node(node)
            removed += 1
    return removed
