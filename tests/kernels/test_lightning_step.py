"""Decode and verify of linear attention: what is refused, what the gate sees, long horizons."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lingc import targets
from lingc.device import Device, launch_all
from lingc.kernel import Tactic
from lingc.math import qk_norm_rope
from lingc.op import Op, type_of
from lingc.plugins import lightning_decode_qkv, lightning_verify_qkv
from lingc.samples import Samples
from lingc.targets.cuda import binaries
from lingc.targets.cuda.binaries import compile_all, compile_kernel, kernels

H200 = targets.get("h200-sxm")
DECODE, VERIFY = lightning_decode_qkv.OP, lightning_verify_qkv.OP
CASES = {DECODE: (3, 2, 128, 32, 2), VERIFY: (3, 2, 2, 128, 32, 2)}
BOTH = pytest.mark.parametrize("op", [DECODE, VERIFY], ids=lambda op: op.name)
ARCHES = [arch for arch in binaries.FEATURES if "bulk" in binaries.FEATURES[arch]]


def tactics_of(op: Op, arguments: tuple[Any, ...]) -> list[Tactic]:
    return list(op.tactics(H200, *map(type_of, arguments)))


@BOTH
@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_for_every_architecture_with_dependent_launch(op: Op, arch: str) -> None:
    first, *_ = tactics_of(op, op.inputs(*CASES[op], dtype="bf16", device="cpu"))

    for kernel in kernels([first]):
        assert compile_kernel(kernel, arch).threads == 32 * kernel.warps


@pytest.mark.long
@BOTH
def test_every_tactic_of_the_full_model_compiles(op: Op) -> None:
    for benchmark in op.benchmarks:
        for tokens in benchmark.tokens[:1]:
            arguments = op.inputs(*benchmark.case(tokens), dtype="bf16", device="cpu")
            for kernel in kernels(tactics_of(op, arguments)):
                compile_kernel(kernel, "sm_90a")


@pytest.mark.parametrize(
    ("op", "case", "reason"),
    [
        (DECODE, (2, 2, 64, 32, 2), "states of 64x64 are not 128x128"),
        (DECODE, (2, 2, 128, 12, 2), "rope of 12 pairs is not one of 4, 8, 16, 32, 64"),
        (DECODE, (2, 2, 128, 32, 33), "33 pending tokens are more than 32"),
        (VERIFY, (2, 9, 2, 128, 32, 9), "18 tokens are not 1 to 8 for each of 2 sequences"),
    ],
)
def test_refuses_what_the_kernel_is_not_made_for(
    op: Op, case: tuple[int, ...], reason: str
) -> None:
    types = [type_of(value) for value in op.inputs(*case, dtype="bf16", device="cpu")]

    assert op.refusal(H200, *types) == reason
    assert not op.tactics(H200, *types)


def test_refuses_activations_that_are_not_bf16() -> None:
    given = DECODE.inputs(*CASES[DECODE], dtype="f32", device="cpu")

    assert DECODE.refusal(H200, *map(type_of, given)) == "qkvg is f32, not bf16"


def results(op: Op) -> tuple[tuple[Any, ...], list[Tensor]]:
    arguments = op.inputs(*CASES[op], dtype="bf16", device="cpu")
    return arguments, list(op.reference(*arguments))


@BOTH
def test_the_gate_passes_the_reference(op: Op) -> None:
    assert op.judge is not None
    arguments, made = results(op)

    assert op.judge(arguments, made, None) is None


@BOTH
@pytest.mark.parametrize("fault", ["o", "live state", "idle state", "nothing written"])
def test_the_gate_sees_what_is_wrong(op: Op, fault: str) -> None:
    assert op.judge is not None
    arguments, made = results(op)
    live = int(arguments[9][1])
    if fault == "o":
        made[0][1, 3] += 0.25
    elif fault == "live state":
        made[1][live, 0, 5, 7] *= 1.001
    elif fault == "idle state":
        made[1][-1, 0, 5, 7] += 1e-6
    else:
        made[1] = arguments[6].clone()

    assert op.judge(arguments, made, None) is not None


def test_the_gate_of_verify_sees_pending_tokens_that_are_wrong() -> None:
    assert VERIFY.judge is not None
    arguments, made = results(VERIFY)
    live = int(arguments[9][1])

    for which in (2, 3):
        wrong = [tensor.clone() for tensor in made]
        wrong[which][live, 1, 1, 9] += 0.25
        assert VERIFY.judge(arguments, wrong, None) is not None


STEPS, PERIOD, HEADS = 131_072, 512, 32


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize(("op", "draft"), [(DECODE, 1), (VERIFY, 4)], ids=["decode", "verify"])
def test_a_chain_of_128k_tokens_equals_fp64(op: Op, draft: int, tmp_path: Path) -> None:
    """The state after 512 tokens 256 times over, every draft token accepted, in closed form.

    Rates are those of the full model, from its fastest head to its slowest: rounding exp(-s) to
    f32 would be an error of 2e-4 in the slowest.
    """
    some = Samples(dtype="bf16", device="cuda")
    case = (1, HEADS, 128, 32, 4, 0) if draft == 1 else (1, draft, HEADS, 128, 32, 4, draft)
    arguments = dict(zip(op.arguments, op.inputs(*case, dtype="bf16", device="cuda"), strict=True))
    rates = torch.logspace(0, 1, HEADS, base=1.26e-4 / 0.8409, dtype=torch.float64) * 0.8409
    decay = arguments["decay"].copy_(rates)
    for name in ("state", "pending_k", "pending_v"):
        arguments[name].zero_()
    width = HEADS * 128
    qkvg = some.normal(PERIOD, 4 * width) + 0.5
    cos, sin = some.rope(torch.arange(1, PERIOD + 1), 32)
    o = torch.zeros(PERIOD, width, dtype=torch.bfloat16, device="cuda")

    device = Device()
    tactic = tactics_of(op, tuple(arguments.values()))[0]
    # A step is one launch here, which may not read the state before the last step wrote it.
    launches = [replace(one, dependent=False) for one in tactic.launches]
    compiled = compile_all(kernels([tactic]), H200.arch, tmp_path)
    held = {n: t.data_ptr() for n, t in arguments.items() if isinstance(t, Tensor)}
    torch.cuda.synchronize()
    with device.recording() as graph:
        for t in range(0, PERIOD, draft):
            rows = {"qkvg": qkvg[t], "cos": cos[t], "sin": sin[t], "o": o[t]}
            here = held | {name: row.data_ptr() for name, row in rows.items()}
            launch_all(device, launches, compiled, here)
    for _ in range(STEPS // PERIOD):
        graph.replay()
    device.synchronize()
    graph.close()

    q, k = qk_norm_rope(
        qkvg, arguments["q_weight"], arguments["k_weight"], cos, sin, HEADS, arguments["eps"]
    )
    q, k, v = q.double(), k.double(), qkvg[:, 2 * width : 3 * width].unflatten(1, (HEADS, -1))
    s = decay.double()
    kept = torch.exp(-(PERIOD - 1 - torch.arange(PERIOD, device="cuda"))[:, None] * s)
    once = torch.einsum("thk,thv,th->hkv", k, v.double(), kept)
    want = once * (torch.expm1(-s * STEPS) / torch.expm1(-s * PERIOD))[:, None, None]
    read = torch.einsum("hk,hkv->hv", q[-1] * 128**-0.5, want).flatten()
    if draft > 1:  # the tokens of the last step still wait
        waiting = torch.einsum("thk,thv,th->hkv", k[-draft:], v[-draft:].double(), kept[-draft:])
        want = (want - waiting) * torch.exp(s * draft)[:, None, None]
    got = arguments["state"][int(arguments["slots"][0])].double()

    error = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert float(error.max()) < 2e-5
    assert float((o[-1].double() - read).norm() / read.norm()) < 4e-3
