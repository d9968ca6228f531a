"""What becomes of weights when they are loaded, and how much memory they take."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import InputError
from lingc.quantize.formats import dequantize_fp8_block, round_bf16
from lingc.quantize.layouts import INTERLEAVED, PLAIN, arrange
from lingc.runtime.onnx_weights import Initializer, initializer_from_json, load


@settings(max_examples=25)
@given(
    experts=st.integers(1, 3),
    rows=st.integers(1, 150),
    width=st.integers(1, 150),
    layout=st.sampled_from([PLAIN, INTERLEAVED]),
    seed=st.integers(0, 99),
)
def test_fp8_experts_are_widened_in_either_order_of_rows(
    experts: int, rows: int, width: int, layout: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 127, (experts, 2 * rows, width)).astype(np.uint8)
    shape = (experts, 2 * -(-rows // 128), -(-width // 128))
    scales = random.random(shape).astype(np.float32)
    made = Initializer(
        name="w",
        dtype="f32",
        shape=codes.shape,
        weights=("w", "s"),
        load="fp8_to_f32",
        layout=layout,
        stacked=2,
    )
    spread = Initializer(
        name="s",
        dtype="f32",
        shape=(*codes.shape[:2], shape[2]),
        weights=("s",),
        load="scales_to_rows",
        layout=layout,
        stacked=2,
    )
    held = {"w": arrange(layout, codes), "s": scales}

    got = load(made, held)

    halves = [
        [dequantize_fp8_block(c, s) for c, s in zip(np.split(e, 2), np.split(f, 2), strict=True)]
        for e, f in zip(codes, scales, strict=True)
    ]
    want = arrange(layout, np.stack([np.concatenate(pair) for pair in halves]))
    np.testing.assert_array_equal(got, want)
    whole = dequantize_fp8_block(held["w"][0], np.ones((2 * rows, width), np.float32))
    by_row = np.repeat(load(spread, held)[0], 128, axis=1)[:, :width]
    np.testing.assert_array_equal(whole * by_row, want[0])


def test_stored_weights_are_not_copied() -> None:
    bits = round_bf16(np.ones((4, 6), np.float32))
    packed = np.zeros((4, 2), np.int32)

    as_stored = load(Initializer(name="w", dtype="bf16", shape=(4, 6), weights=("w",)), {"w": bits})
    as_bytes = load(
        Initializer(name="p", dtype="u8", shape=(4, 8), weights=("p",), load="as_bytes"),
        {"p": packed},
    )

    assert np.shares_memory(as_stored, bits)
    assert np.shares_memory(as_bytes, packed)


def test_every_e4m3_value_is_exact_in_fp16() -> None:
    codes = np.arange(127, dtype=np.uint8)[None]
    halves = Initializer(name="w", dtype="f16", shape=(1, 127), weights=("w",), load="fp8_to_f16")

    got = load(halves, {"w": codes})

    want = dequantize_fp8_block(codes, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(got.astype(np.float32), want)


def test_initializers_survive_json_and_newer_ones_are_refused() -> None:
    made = Initializer(name="w", dtype="f32", shape=(2, 3), weights=("w",), load="bf16_to_f32")

    assert initializer_from_json(made.to_json()) == made
    with pytest.raises(InputError, match="'w' asks for 'fp4_to_f32', which this lingc does not"):
        initializer_from_json(made.to_json() | {"load": "fp4_to_f32"})
    with pytest.raises(InputError, match="an initializer of the engine cannot be read"):
        initializer_from_json({"name": "w"})


MEMORY = """
import sys
import numpy as np
from lingc.plan import Plan, Program, Ref, Step, TensorType, WeightSpec
from lingc.runtime import onnx_backend
from lingc.runtime.backend import Limits
from lingc.runtime.onnx_backend import OnnxBackend, OnnxModels
from lingc.targets.onnx import lower

onnx_backend.PREPACKED_BYTES = 0  # as for weights of more than that
LAYERS, D = 12, 1536
names = [f"layers.{l}.weight" for l in range(LAYERS)]
specs = {n: WeightSpec(name=n, type=TensorType("bf16", (D, D)), sources=()) for n in names}
values = ["x", *(f"y{l}" for l in range(LAYERS))]
program = Program(
    inputs=("x",), states=(), outputs={"hidden": values[-1]}, updates={}, weights=tuple(names),
    types={v: TensorType("f32", ("T", D)) for v in values},
    steps=tuple(
        Step(op="lingc.linear", args=(Ref(x), Ref(n)), outputs=(y,))
        for x, n, y in zip(values, names, values[1:])
    ),
)
plan = Plan(
    config={}, precision="bf16", target="cpu", activation="f32", page_size=1, max_draft=0,
    states={}, weights=specs, programs={p: program for p in ("prefill", "decode", "verify")},
)
engine = lower(plan, widen=sys.argv[1])
rows = np.zeros((LAYERS, D, D), np.uint16) + 1  # touched: in memory before the measurement


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


before = resident()
models = OnnxModels(plan=plan, models=engine.models, info=engine.info)
runs = OnnxBackend(models, dict(zip(names, rows)), Limits(slots=1, pages=1), threads=1)
for phase in plan.programs:
    for tokens in (1, 3):
        runs.run(phase, {"x": np.ones((tokens, D), np.float32)})
print((resident() - before) / (4 * D * D * LAYERS))
"""


@pytest.mark.parametrize(("widen", "least", "most"), [("load", 0.95, 1.3), ("step", 0.0, 0.75)])
def test_weights_are_in_memory_once(widen: str, least: float, most: float) -> None:
    """Resident memory after three phases, as a part of all weights in f32.

    `load` holds them all once. `step` holds a matrix or two of the twelve for each phase.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, widen], capture_output=True, text=True, check=True
    )

    assert least < float(done.stdout) < most
