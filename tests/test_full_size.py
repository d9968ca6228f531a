"""The full-size model, from its config alone: every number that follows from it, and its plans."""

import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lingc import pipeline, plan_text, targets
from lingc.capture import Capturer, Sizes
from lingc.context import Context
from lingc.graph import Captured, Fused
from lingc.lower import lower
from lingc.model.config import ModelConfig
from lingc.pipeline import Report
from lingc.plan import PHASES, Plan
from lingc.quantize.recipes import built_in, load_recipe
from tests.programs import copy

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "artifacts" / "checkpoints" / "ling-2.6-flash"

PARAMETERS = 107_494_409_216
"""The draft layer's included; the release displays 107B."""

EXPECTED = {
    "fuse_qk_norm_rope": (28, 28, 28, 0),
    "fuse_group_norm_gate": (28, 28, 28, 0),
    "fuse_router": (31, 31, 31, 1),
    "fuse_experts": (31, 31, 31, 1),
    "fuse_shared_expert_add": (31, 31, 31, 1),
    "fuse_mla_latent": (4, 4, 4, 1),
    "fuse_mla_latent_kv": (0, 0, 0, 0),
    "fuse_mla_query_rope": (4, 4, 4, 1),
    "fuse_mla_attention": (4, 4, 4, 1),
    "absorb_mla": (0, 4, 4, 1),
    "fuse_add_rms_norm": (0, 0, 0, 0),
    "fuse_rms_norm": (65, 65, 65, 5),
    "fuse_decode_mixer": (0, 0, 0, 0),
    "fuse_verify_mixer": (0, 0, 0, 0),
    "merge_projections": (64, 64, 64, 2),
    "join_projections": (0, 0, 0, 0),
    "fuse_silu_mul": (32, 32, 32, 1),
    "fuse_rope_table": (1, 1, 1, 1),
    "fuse_embedding": (1, 1, 1, 1),
    "fuse_lm_head": (1, 1, 1, 1),
    # Two of a linear layer, three of a latent one, two of a SwiGLU; eh_proj.
    "quantize_linears": (132, 132, 132, 6),
    "quantize_experts": (31, 31, 31, 1),
    "fuse_add_rms_norm_quantize": (0, 0, 0, 0),
    "fuse_rms_norm_quantize": (0, 0, 0, 0),
    "fuse_silu_mul_quantize": (0, 0, 0, 0),
    "fuse_lightning_prefill": (28, 0, 0, 0),
    "fuse_lightning_decode": (0, 28, 0, 0),
    "fuse_lightning_verify": (0, 0, 28, 0),
    # The linears of above and the head.
    "fuse_linear": (133, 133, 133, 7),
    # The first of each layer, and of each SwiGLU.
    "fuse_linear_norm": (64, 64, 64, 2),
    "fuse_linear_latent": (4, 4, 4, 1),
    "fuse_linear_gate": (28, 28, 28, 0),
    "fuse_linear_swiglu": (32, 32, 32, 1),
    # The second of each layer, and of each SwiGLU.
    "fuse_linear_residual": (64, 64, 64, 2),
    "fuse_norm_router": (31, 31, 31, 1),
    "split_experts": (31, 31, 31, 1),
    "join_shared_expert": (31, 31, 31, 1),
    "fuse_latent_attention": (0, 4, 4, 1),
    "fuse_norm_pair": (0, 0, 0, 1),
    "gather_rows": (1, 0, 0, 1),
}
"""In fp8 for h20, by rule: prefill, decode, verify and draft. 32 layers: 28 linear, 4 latent; the
first is dense, 31 have 256 experts and a shared one; one latent draft layer."""

ELSEWHERE = {
    "fuse_add_rms_norm": (64, 64, 64, 2),
    "fuse_rms_norm": (1, 1, 1, 3),
    "fuse_decode_mixer": (0, 28, 0, 0),
    "fuse_verify_mixer": (0, 0, 28, 0),
    # Of the 64 norms all but the input norms of the four latent layers and the last one.
    "fuse_add_rms_norm_quantize": (59, 59, 59, 1),
    "fuse_rms_norm_quantize": (1, 1, 1, 0),
    "fuse_silu_mul_quantize": (32, 32, 32, 1),
}
"""What differs where an engine launches other kernels than ours; there the last 15 never fire."""

LAUNCHES = tuple(EXPECTED)[-15:]


@cache
def captured(phase: str) -> Captured:
    return _capturer().capture(phase)


@cache
def _capturer() -> Capturer:
    return Capturer(ModelConfig.from_file(CONFIG))


@cache
def compiled(precision: str, target: str) -> tuple[Plan, Report]:
    report, fused = Report(), dict[str, Fused]()
    first = Context(
        config=_capturer().config,
        phase=PHASES[0],
        target=targets.get(target),
        recipe=load_recipe(precision),
    )
    for phase in PHASES:
        program = Captured(copy(captured(phase)))
        fused[phase] = pipeline.run(program, replace(first, phase=phase), report)
    return lower(fused, first, Sizes()), report


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("h20", EXPECTED),
        ("rtx-120", EXPECTED | ELSEWHERE | dict.fromkeys(LAUNCHES, (0, 0, 0, 0))),
    ],
)
def test_every_fusion_fires_as_often_as_the_architecture_says(
    target: str, expected: Mapping[str, tuple[int, ...]]
) -> None:
    _, report = compiled("fp8", target)

    found: dict[str, list[int]] = {}
    for line in report.lines:
        if line.expected is not None:
            found.setdefault(line.name, []).append(line.found)

    assert {name: tuple(counts) for name, counts in found.items()} == expected
    assert [line for line in report.lines if line.missed or line.waived] == []


@pytest.mark.parametrize("precision", [p for p in built_in() if p != "fp8"])
def test_every_recipe_is_fused_for_a_gpu(precision: str) -> None:
    plan, report = compiled(precision, "h200-sxm")

    assert [line for line in report.lines if line.missed] == []
    shared_apart = [name for name in plan.weights if ".shared_experts." in name]
    assert bool(shared_apart) == (precision == "int4")


def test_a_token_takes_six_launches_a_layer() -> None:
    plan, _ = compiled("fp8", "h20")

    steps = Counter(step.layer for step in plan.programs["decode"].steps)

    latent = {7, 15, 23, 31}
    assert steps.pop(-1) == 4  # embedding, rotary table, last norm, head
    assert steps == {0: 5} | {layer: 6 + (layer in latent) for layer in range(1, 32)}


@pytest.mark.parametrize(("precision", "target"), [("fp8", "h20"), ("bf16", "cpu")])
def test_the_plan_is_the_one_that_was_reviewed(
    precision: str, target: str, golden: Callable[[str, str], None]
) -> None:
    plan, _ = compiled(precision, target)

    written = plan_text.text(plan)

    golden(f"plans/ling-2.6-flash-{target}-{precision}.txt", written)
    assert len(written.splitlines()) < 400


def test_the_weights_weigh_what_the_parameters_do() -> None:
    plan, _ = compiled("bf16", "cpu")

    total_bytes = sum(spec.type.bytes() for spec in plan.weights.values())

    # In BF16 but for the decay rates and the expert biases; kv_b of the main layers stands twice,
    # whole for the prompt and cut for a few tokens.
    twice_bytes = 4 * 2 * 32 * (128 + 128) * 512
    assert total_bytes == 2 * PARAMETERS + 32 * 256 * 2 + 28 * 32 * 4 + twice_bytes


@pytest.mark.long
def test_all_phases_are_planned_in_little_time_and_memory() -> None:
    code = (
        "import sys, lingc.cli\n"
        f"sys.exit(lingc.cli.main(['passes', {str(CONFIG)!r}, '--precision', 'fp8', "
        "'--target', 'h20']))"
    )
    start = time.perf_counter()

    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=False, cwd=ROOT
    )

    seconds = time.perf_counter() - start
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert done.returncode == 0, done.stderr
    assert seconds < 90
    assert peak_bytes < 6 << 30
