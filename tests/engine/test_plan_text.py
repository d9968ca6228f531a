"""A plan reads as text: like layers once, every step of each, and nothing that hides the rest."""

from dataclasses import replace

from lingc.engine import plan_text
from lingc.plan import Arg, Plan, Program, Ref, Step, TensorType


def step(layer: int, op: str, *inputs: str) -> Step:
    arguments: tuple[Arg, ...] = (*(Ref(name) for name in inputs), 1e-6)
    return Step(op=f"lingc.{op}", args=arguments, outputs=(f"layers.{layer}.{op}",), layer=layer)


def program(kinds: str) -> Program:
    """Layers `a` and `b`, each reading the one before it."""
    steps = [Step(op="lingc.embedding", args=(Ref("x"),), outputs=("h",))]
    last = "h"
    for layer, kind in enumerate(kinds):
        steps.append(step(layer, f"first_{kind}", last, f"layers.{layer}.weight"))
        last = f"layers.{layer}.first_{kind}"
    types = {"x": TensorType("i32", ("T",)), last: TensorType("f32", ("T", 8))}
    return Program(
        inputs=("x",), states=(), outputs={"logits": last}, updates={}, weights=(), types=types,
        steps=tuple(steps),
    )  # fmt: skip


def test_like_layers_are_written_once(plan: Plan) -> None:
    text = "\n".join(plan_text.lines(replace(plan, programs={"decode": program("aaabaab")})))

    # The first layer reads the embedding, the last one is typed, and those behind a `b` read that.
    assert text == (
        "plan: fp8 for cpu, f32 activations\n"
        "\n"
        "decode(x: i32[T])\n"
        "  h = lingc.embedding(x)\n"
        "  layers 0:\n"
        "    layers.{l}.first_a = lingc.first_a(h, layers.{l}.weight, 1e-06)\n"
        "  layers 1-2, 5:\n"
        "    layers.{l}.first_a = lingc.first_a(layers.{l-1}.first_a, layers.{l}.weight, 1e-06)\n"
        "  layers 3:\n"
        "    layers.{l}.first_b = lingc.first_b(layers.{l-1}.first_a, layers.{l}.weight, 1e-06)\n"
        "  layers 4:\n"
        "    layers.{l}.first_a = lingc.first_a(layers.{l-1}.first_b, layers.{l}.weight, 1e-06)\n"
        "  layers 6:\n"
        "    layers.{l}.first_b: f32[T, 8] = "
        "lingc.first_b(layers.{l-1}.first_a, layers.{l}.weight, 1e-06)\n"
        "  return logits = layers.6.first_b: f32[T, 8]"
    )


def test_a_long_argument_is_cut(plan: Plan) -> None:
    frequencies = tuple(0.5**i for i in range(32))
    made = Step(op="lingc.rope_table", args=(Ref("x"), frequencies, None), outputs=("cos",))
    only = replace(program(""), steps=(made,), outputs={})

    text = list(plan_text.lines(replace(plan, programs={"decode": only})))

    assert text[-1].endswith("0.015625, 0.0078125, ... 32 in all], None)")
