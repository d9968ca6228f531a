"""The watch on an interpreted plan tells which experts its router steps chose, and by what."""

import numpy as np
import pytest

from lingc.interpret import InterpreterBackend
from lingc.parity.experts import Routing, gap
from lingc.parity.interpreted import PlanWatch
from lingc.plan import Plan, Program, Ref, Step, TensorType, WeightSpec
from lingc.runtime import Limits

TOKENS, WIDTH, EXPERTS = 5, 8, 6
NAMES = ("x", "router.weight", "router.bias", "norm")
EPS = 1e-6


def routed_plan(op: str) -> Plan:
    """Doubles x, and routes the result, by `norm_router` with a norm before."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "x": ("T", WIDTH), "h": ("T", WIDTH), "ids": ("T", 2), "weights": ("T", 2),
        "router.weight": (EXPERTS, WIDTH), "router.bias": (EXPERTS,), "norm": (WIDTH,),
        "pairs": ("T*2",), "starts": (EXPERTS + 1,),
    }  # fmt: skip
    whole = {"ids", "pairs", "starts"}
    types = {name: TensorType("i32" if name in whole else "f32", s) for name, s in shapes.items()}
    router = (Ref("router.weight"), Ref("router.bias"), 3, 2, 2, 2.5, True)
    routed = {
        "lingc.router": ((Ref("h"), *router), ("ids", "weights")),
        "lingc.norm_router": (
            (Ref("h"), Ref("norm"), *router, EPS),
            ("ids", "weights", "pairs", "starts"),
        ),
    }
    args, outputs = routed[op]
    program = Program(
        inputs=("x",), states=(), outputs={"logits": "weights"}, updates={}, weights=NAMES[1:],
        types=types,
        steps=(
            Step(op="aten.add.Tensor", args=(Ref("x"), Ref("x")), outputs=("h",)),
            Step(op=op, args=args, outputs=outputs, layer=7),
        ),
    )  # fmt: skip
    return Plan(
        config={}, precision="none", target="cpu", activation="f32", page_size=4, max_draft=0,
        states={}, programs={"prefill": program},
        weights={n: WeightSpec(name=n, type=types[n], sources=()) for n in NAMES[1:]},
    )  # fmt: skip


@pytest.mark.parametrize("op", ["lingc.router", "lingc.norm_router"])
def test_choices_are_those_of_the_step_with_the_scores_behind_them(op: str) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "router.weight": rng.standard_normal((EXPERTS, WIDTH)).astype(np.float32),
        "router.bias": rng.random(EXPERTS).astype(np.float32),
        "norm": rng.random(WIDTH).astype(np.float32),
    }
    backend = InterpreterBackend(routed_plan(op), weights, Limits(slots=1, pages=1))
    watch = PlanWatch(backend)
    x = rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)

    out = backend.run("prefill", {"x": x})
    found = watch(out).experts

    assert list(found) == [7]
    choice = found[7]
    h = 2 * x
    if op == "lingc.norm_router":
        h *= weights["norm"] / np.sqrt(np.square(h).mean(1, keepdims=True) + EPS)
    logits = h @ weights["router.weight"].T
    want = 1 / (1 + np.exp(-logits)) + weights["router.bias"]
    assert choice.biased is not None
    np.testing.assert_allclose(choice.biased, want, rtol=1e-5)
    routing = Routing(groups=3, kept_groups=2, top_k=2)
    for scores, ids in zip(choice.biased, choice.ids, strict=True):
        assert gap(scores, ids.tolist(), routing) == 0
    assert watch(out).experts == {}
