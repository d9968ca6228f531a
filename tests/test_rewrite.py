"""The rewrite engine: what a pattern matches, when a rule refuses, and what a replacement leaves.

Programs here are a few calls on [T, 8], written down by hand.
"""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from lingc.errors import StageError
from lingc.graph import Program, full_args, target_name
from lingc.plan import TensorType, WeightSpec
from lingc.plugins import add_rms_norm, quantize_fp8, rms_norm
from lingc.rewrite import NOT_MINE, Builder, Match, Rewrite, apply, either, sweep
from tests.programs import names, output

aten = torch.ops.aten
KIND = TensorType("f32", ("T", 8))


class Draft:
    """A program in the making."""

    def __init__(self) -> None:
        self.program = Program(phase="prefill", graph=fx.Graph(), outputs=("y",), updates=())

    def input(self, name: str) -> Any:
        return self.program.placeholder(name, "input", KIND)

    def weight(self, name: str) -> Any:
        spec = WeightSpec(name=name, type=TensorType("bf16", (8,)), sources=(name,))
        return self.program.weight(spec)

    def call(self, target: Any, *args: Any, layer: int = -1, **kwargs: Any) -> Any:
        node = self.program.graph.call_function(target, args, kwargs)
        node.meta.update(type=KIND, layer=layer, source=f"model.py:{len(self.program.calls())}")
        return node

    def returns(self, *results: fx.Node) -> Program:
        self.program.graph.output(results)
        self.program.outputs = tuple(f"y{i}" for i in range(len(results)))
        return self.program


def rule(*patterns: Callable[..., Any], **changes: Any) -> Rewrite:
    """A rule that puts `relu(x)` for every output, unless told otherwise."""

    def to_relu(build: Builder, match: Match, _context: Any) -> tuple[Any, ...]:
        relu = build.call(aten.relu.default, match["x"], type=KIND)
        return (relu,) * len(match.outputs)

    given = {"check": lambda _match, _context: None, "replacement": to_relu, **changes}
    return Rewrite(name="to_relu", patterns=patterns, **given)


def square(x: Any) -> Any:
    return aten.mul.Tensor(x, x)


# ---------------------------------------------------------------------------------------- matching


def scaled(x: Any, y: Any) -> Any:
    return aten.mul.Tensor(aten.sigmoid.default(x), y)


@pytest.mark.parametrize("swapped", [False, True])
def test_factors_and_terms_match_in_either_order(swapped: bool) -> None:  # noqa: FBT001
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    factors = [draft.call(aten.sigmoid.default, x), y]
    program = draft.returns(draft.call(aten.mul.Tensor, *(factors[::-1] if swapped else factors)))

    outcome = apply(program, rule(scaled), None)

    assert outcome.found == 1
    assert names(program) == ["aten.relu.default"]
    assert program.results()[0].args == (x,)


def test_a_difference_matches_in_its_own_order_alone() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    sigmoid = draft.call(aten.sigmoid.default, x)
    program = draft.returns(draft.call(aten.sub.Tensor, y, sigmoid))

    def pattern(x: Any, y: Any) -> Any:
        return aten.sub.Tensor(aten.sigmoid.default(x), y)

    assert apply(program, rule(pattern), None).found == 0


def test_a_name_that_stands_twice_means_one_value() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    same, other = draft.call(aten.mul.Tensor, x, x), draft.call(aten.mul.Tensor, x, y)
    program = draft.returns(same, other)

    outcome = apply(program, rule(square), None)

    assert outcome.found == 1
    assert names(program) == ["aten.relu.default", "aten.mul.Tensor"]


def test_a_name_with_an_underscore_means_anything_each_time() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    inner = draft.call(aten.reshape.default, x, [8, 2])
    program = draft.returns(
        draft.call(aten.mul.Tensor, draft.call(aten.reshape.default, inner, [16]), y)
    )

    def pattern(x: Any, _any: Any) -> Any:
        flat = aten.reshape.default(aten.reshape.default(x, _any), _any)
        return aten.mul.Tensor(flat, _any)

    assert apply(program, rule(pattern), None).found == 1


@pytest.mark.parametrize(("given", "fires"), [(1, 1), (1.0, 0), (True, 0), (2, 0)])
def test_a_literal_means_itself_and_its_type(given: object, fires: int) -> None:
    draft = Draft()
    program = draft.returns(draft.call(aten.select.int, draft.input("x"), 0, given))

    def pattern(x: Any) -> Any:
        return aten.select.int(x, 0, 1)

    assert apply(program, rule(pattern), None).found == fires


def test_a_default_that_is_left_out_matches_one_that_is_written() -> None:
    draft = Draft()
    x = draft.input("x")
    program = draft.returns(draft.call(aten.add.Tensor, x, x, alpha=1))

    def pattern(x: Any) -> Any:
        return aten.add.Tensor(x, x)

    assert apply(program, rule(pattern), None).found == 1


@pytest.mark.parametrize("casts", [0, 1])
def test_either_means_a_value_or_a_cast_of_it(casts: int) -> None:
    draft = Draft()
    x = y = draft.input("x")
    for _ in range(casts):
        y = draft.call(aten.to.dtype, y, torch.float32)
    program = draft.returns(draft.call(aten.sigmoid.default, y))

    def pattern(x: Any) -> Any:
        return aten.sigmoid.default(either(x))

    assert apply(program, rule(pattern), None).found == 1
    assert program.results()[0].args == (x,)


def test_lists_match_item_by_item() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    two = draft.call(aten.cat.default, [x, y], -1)
    three = draft.call(aten.cat.default, [x, y, y], -1)
    program = draft.returns(two, three)

    def pattern(x: Any, y: Any) -> Any:
        return aten.cat.default([x, y], -1)

    assert apply(program, rule(pattern), None).found == 1
    assert program.results()[1] is three


def test_the_first_spelling_that_fits_counts() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    program = draft.returns(draft.call(aten.mul.Tensor, x, y), draft.call(aten.mul.Tensor, x, x))
    seen = []

    def product(x: Any, y: Any) -> Any:
        return aten.mul.Tensor(x, y)

    def check(match: Match, _context: Any) -> str:
        seen.append(sorted(match.bound))
        return NOT_MINE

    apply(program, rule(square, product, check=check), None)

    assert seen == [["x", "y"], ["x"]]


# ------------------------------------------------------------------------------------ many outputs


def pair(x: Any) -> tuple[Any, Any]:
    return aten.sigmoid.default(x), aten.mul.Tensor(aten.tanh.default(x), x)


def test_other_outputs_are_found_from_the_last() -> None:
    draft = Draft()
    x = draft.input("x")
    sigmoid, tanh = draft.call(aten.sigmoid.default, x), draft.call(aten.tanh.default, x)
    between = draft.call(aten.neg.default, sigmoid)
    program = draft.returns(between, draft.call(aten.mul.Tensor, tanh, x))

    outcome = apply(program, rule(pair), None)

    program.graph.lint()
    assert outcome.found == 1
    assert names(program) == ["aten.relu.default", "aten.neg.default"]


def test_a_missing_output_is_no_match_but_a_near_one() -> None:
    draft = Draft()
    x = draft.input("x")
    tanh = draft.call(aten.tanh.default, x)
    program = draft.returns(draft.call(aten.mul.Tensor, tanh, x))

    outcome = apply(program, rule(pair), None)

    assert outcome.found == 0
    assert outcome.near_miss == (
        "no aten.sigmoid.default completes the pattern; "
        "in mul_tensor = aten.mul.Tensor (model.py:2)"
    )


def test_an_output_may_be_read_by_anybody() -> None:
    draft = Draft()
    x = draft.input("x")
    h = draft.call(aten.add.Tensor, x, x)
    program = draft.returns(draft.call(aten.sigmoid.default, h), h)

    def pattern(x: Any) -> tuple[Any, Any]:
        h = aten.add.Tensor(x, x)
        return h, aten.sigmoid.default(h)

    assert apply(program, rule(pattern), None).found == 1


def test_a_replacement_gives_one_value_an_output() -> None:
    draft = Draft()
    x = draft.input("x")
    program = draft.returns(draft.call(aten.mul.Tensor, x, x))
    wrong = rule(square, replacement=lambda _build, match, _context: (match["x"], match["x"]))

    with pytest.raises(AssertionError, match="to_relu: one value for each output"):
        apply(program, wrong, None)


# ---------------------------------------------------------------------------------------- refusing


def gated(x: Any) -> Any:
    return aten.mul.Tensor(aten.sigmoid.default(x), x)


def shared_sigmoid() -> Program:
    draft = Draft()
    x = draft.input("x")
    sigmoid = draft.call(aten.sigmoid.default, x, layer=3)
    return draft.returns(
        draft.call(aten.mul.Tensor, sigmoid, x, layer=3), draft.call(aten.neg.default, sigmoid)
    )


def test_refuses_a_step_between_that_somebody_else_reads() -> None:
    program = shared_sigmoid()

    outcome = apply(program, rule(gated), None)

    assert outcome.found == 0
    (refusal,) = outcome.refused
    assert refusal.reason == (
        "aten.sigmoid.default is also read by neg_default = aten.neg.default (model.py:3)"
    )
    assert refusal.place == "mul_tensor = aten.mul.Tensor (layer 3, model.py:2)"


def test_a_rule_may_compute_a_step_between_twice() -> None:
    program = shared_sigmoid()

    outcome = apply(program, rule(gated, shares=True), None)

    assert outcome.found == 1
    assert names(program) == ["aten.relu.default", "aten.sigmoid.default", "aten.neg.default"]


@pytest.mark.parametrize(
    ("again", "found"), [((aten.sigmoid.default,), 1), ((aten.mul.Tensor,), 0)]
)
def test_a_rule_names_what_it_may_compute_twice(again: tuple[Any, ...], found: int) -> None:
    program = shared_sigmoid()

    outcome = apply(program, rule(gated, again=again), None)

    assert outcome.found == found
    assert names(program).count("aten.sigmoid.default") == 1


def test_counts_a_refusal_with_its_reason_and_leaves_the_program() -> None:
    draft = Draft()
    x = draft.input("x")
    program = draft.returns(draft.call(aten.mul.Tensor, x, x))

    outcome = apply(program, rule(square, check=lambda _match, context: f"not {context}"), "today")

    assert (outcome.found, [r.reason for r in outcome.refused]) == (0, ["not today"])
    assert names(program) == ["aten.mul.Tensor"]


def test_what_belongs_to_another_rule_is_no_refusal() -> None:
    draft = Draft()
    x = draft.input("x")
    program = draft.returns(draft.call(aten.mul.Tensor, x, x))

    outcome = apply(program, rule(square, check=lambda _match, _context: NOT_MINE), None)

    assert (outcome.found, outcome.refused) == (0, [])


def test_tells_the_place_where_most_of_a_pattern_matched() -> None:
    draft = Draft()
    x = draft.input("x")
    nearly = draft.call(aten.sigmoid.default, draft.call(aten.tanh.default, x))
    far = draft.call(aten.mul.Tensor, draft.call(aten.neg.default, x), x)
    near = draft.call(aten.mul.Tensor, draft.call(aten.sigmoid.default, nearly), x)
    program = draft.returns(near, far)

    def pattern(x: Any) -> Any:
        twice = aten.sigmoid.default(aten.sigmoid.default(aten.neg.default(x)))
        return aten.mul.Tensor(twice, x)

    outcome = apply(program, rule(pattern), None)

    assert outcome.near_miss.startswith("expected aten.neg.default, found tanh_default")
    assert "model.py:1" in outcome.near_miss


# --------------------------------------------------------------------------------------- replacing


def test_keeps_every_value_ahead_of_its_readers() -> None:
    draft = Draft()
    x, y = draft.input("x"), draft.input("y")
    first = draft.call(aten.mul.Tensor, x, x)
    reader = draft.call(aten.neg.default, first)
    late = draft.call(aten.tanh.default, y)
    second = draft.call(aten.mul.Tensor, x, late)
    program = draft.returns(reader, second)

    def pattern(x: Any, y: Any) -> tuple[Any, Any]:
        return aten.mul.Tensor(x, x), aten.mul.Tensor(x, y)

    def replacement(build: Builder, match: Match, _context: Any) -> tuple[Any, Any]:
        both = build.call(aten.add.Tensor, match["x"], match["y"], type=KIND)
        return both, both

    assert apply(program, rule(pattern, replacement=replacement), None).found == 1

    program.graph.lint()
    assert names(program) == ["aten.tanh.default", "aten.add.Tensor", "aten.neg.default"]


def test_goes_over_a_program_until_nothing_fires_if_asked_to() -> None:
    def chain() -> Program:
        draft = Draft()
        x = draft.input("x")
        for _ in range(4):
            x = draft.call(aten.neg.default, x)
        return draft.returns(x)

    def twice(x: Any) -> Any:
        return aten.neg.default(aten.neg.default(x))

    def once(build: Builder, match: Match, _context: Any) -> tuple[Any, ...]:
        return (build.call(aten.neg.default, match["x"], type=KIND),)

    one, many = chain(), chain()
    assert apply(one, rule(twice, replacement=once, shares=True), None).found == 3
    assert apply(many, rule(twice, replacement=once, repeat=True), None).found == 3
    assert names(many) == ["aten.neg.default"]


def test_a_fused_op_has_the_types_that_it_says() -> None:
    draft = Draft()
    x, residual, weight = draft.input("x"), draft.input("residual"), draft.weight("w")
    program = draft.returns(x)
    build = Builder(program, x)

    with program.graph.inserting_before(output(program)):
        call = build.call(add_rms_norm.OP.overload, x, residual, weight, 1e-6)
        y, h = build.items(call)

    assert call.meta["type"] == (KIND, KIND)
    assert (y.args, h.args) == ((call, 0), (call, 1))
    assert build.items(call) == (y, h)


def test_a_call_that_is_needed_twice_is_made_once() -> None:
    draft = Draft()
    x = draft.input("x")
    program = draft.returns(x)
    build = Builder(program, x)

    with program.graph.inserting_before(output(program)):
        first = build.once(quantize_fp8.OP.overload, x)
        second = build.once(quantize_fp8.OP.overload, x)
        norm = build.call(rms_norm.OP.overload, x, draft.weight("w"), 1e-6)
        other = build.once(quantize_fp8.OP.overload, norm)

    assert first is second
    assert other is not first


def test_sweeps_what_nobody_reads_but_not_what_the_caller_gives() -> None:
    draft = Draft()
    x, unread = draft.input("x"), draft.input("unread")
    weight = draft.weight("w")
    draft.call(aten.mul.Tensor, draft.call(aten.neg.default, x), weight)
    program = draft.returns(x)

    assert sweep(program) == 3

    assert program.calls() == []
    assert program.weights == {}
    assert program.placeholders("input") == [x, unread]


def test_two_weights_of_one_name_must_be_made_alike() -> None:
    draft = Draft()
    first = draft.weight("w")
    assert draft.weight("w") is first

    other = WeightSpec(name="w", type=TensorType("f32", (8,)), sources=("w",))
    with pytest.raises(StageError, match="two different weights are called 'w'"):
        draft.program.weight(other)


def test_an_argument_that_is_left_out_has_its_default() -> None:
    draft = Draft()
    x = draft.input("x")
    item = draft.call(operator.getitem, x, 1)

    assert full_args(draft.call(aten.slice.Tensor, x, 1)) == (x, 1, None, None, 1)
    assert full_args(draft.call(aten.sort.stable, x, stable=True)) == (x, True, -1, False)
    assert full_args(item) == (x, 1)
    assert target_name(item) == "getitem"
