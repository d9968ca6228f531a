"""Kernels of other projects, on the tensors of an op's benchmark, in the same run.

None is a dependency: a peer whose package is not there is reported absent. A peer is called through
its package's own functions, with the op's arguments as they are or, where it stores weights
otherwise, rearranged before anything is timed. What it does beyond the op's work or leaves out is
said beside its time.
"""

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lingc.bench.peer_clock import Call, Clock
from lingc.errors import LingcError
from lingc.math import BLOCK, quantize_fp8
from lingc.op import Benchmark, Op

Given = Mapping[str, Any]
"""An op's arguments by name; weights plain, as in the checkpoint."""

FAILURES = (
    LingcError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What other people's code may raise on a device or version it was not written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way of another project to do an op's work.

    Attributes:
        name: Package and function.
        package: Distribution whose version is told, or None for torch.
        module: What is imported.
        prepare: From the module and the op's arguments, what is timed; None for arguments that it
            does not take.
        difference: What it does beyond the op's work, or leaves out.
    """

    name: str
    package: str | None
    module: str
    prepare: Callable[[Any, Given], Call | None]
    difference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTiming:
    """A peer at one shape.

    Attributes:
        microseconds: 10th, 50th and 90th percentile of a call; None where it did not run.
        absent: Why not.
    """

    op: str
    benchmark: str
    tokens: int
    peer: str
    version: str
    microseconds: tuple[float, float, float] | None = None
    absent: str = ""
    difference: str = ""


def time_peers(
    op: Op, benchmark: Benchmark, tokens: int, arguments: Sequence[Any], l2_bytes: int, clock: Clock
) -> Iterator[PeerTiming]:
    """Every peer of an op, over cold data, as nodes of one graph where it can be recorded.

    A peer that fails has a row that says how, and the next one is timed as if it had not run.
    """
    for peer in PEERS.get(op.name, ()):
        timed: tuple[float, float, float] | None = None
        version, absent, beside = _version(peer), "", ""
        try:
            module = importlib.import_module(peer.module)
            series = list(_series(benchmark, arguments, l2_bytes))
            calls = [
                peer.prepare(module, dict(zip(op.arguments, one, strict=True))) for one in series
            ]
            if any(call is None for call in calls):
                continue
            timed, beside = _time([call for call in calls if call is not None], clock)
        except ImportError as error:
            absent = f"not installed: {error}"
        except FAILURES as error:
            absent = _told(error)
        yield PeerTiming(
            op=op.name,
            benchmark=benchmark.name,
            tokens=tokens,
            peer=peer.name,
            version=version,
            microseconds=timed,
            absent=absent,
            difference="; ".join(filter(None, (peer.difference, beside))),
        )


def _told(error: BaseException) -> str:
    """Kind and first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def _version(peer: Peer) -> str:
    if peer.package is None:
        return str(torch.__version__)
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _series(
    benchmark: Benchmark, arguments: Sequence[Any], l2_bytes: int
) -> Iterator[Sequence[Any]]:
    """Arguments whose tensors together pass the L2 cache three times."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    each = sum(one.numel() * one.element_size() for one in tensors)
    copies = max(1, min(96, math.ceil(3 * l2_bytes / max(each, 1))))
    if benchmark.vary is not None:
        for i in range(max(copies, 12)):
            yield benchmark.vary(tuple(arguments), i)
        return
    for i in range(copies):
        yield [
            value.clone() if i and isinstance(value, torch.Tensor) else value for value in arguments
        ]


def _time(calls: Sequence[Call], clock: Clock) -> tuple[tuple[float, float, float], str]:
    """Microseconds of a call among at least 20, and how they were put in a row if not as a graph.

    A tuner measures and waits on the first call of a shape, and sometimes of an argument's second
    appearance, neither of which can be recorded: hence two rounds before.
    """
    count, beside = max(len(calls), 20), ""
    clock.warm(calls, rounds=2)
    try:
        times = clock.recorded(calls, count)
    except FAILURES as error:
        beside = f"queued call by call, since it cannot be recorded ({_told(error)})"
        times = clock.queued(calls, count)
    low, middle, high = np.percentile(times, (10, 50, 90)).tolist()
    return (low, middle, high), beside


# ------------------------------------------------------------------------------ norms, gates, rope


def _linghe_rms_norm(module: Any, given: Given) -> Call:
    x, weight, eps = given["x"], given["weight"], given["eps"]
    return lambda: module.triton_rms_norm_forward(x, weight, eps=eps)


def _linghe_rms_norm_fp8(module: Any, given: Given) -> Call:
    x, weight, eps = given["x"], given["weight"], given["eps"]
    return lambda: module.triton_rms_norm_and_block_quant_forward(x, weight, eps=eps, output_mode=0)


def _torch_rms_norm(module: Any, given: Given) -> Call:
    x, weight, eps = given["x"], given["weight"], given["eps"]
    return lambda: module.rms_norm(x, weight.shape, weight, eps)


def _linghe_silu_mul(module: Any, given: Given) -> Call:
    gate_up = given["gate_up"]
    return lambda: module.triton_weighted_silu_forward(gate_up)


def _linghe_silu_mul_fp8(module: Any, given: Given) -> Call:
    gate_up = given["gate_up"]
    return lambda: module.triton_silu_and_block_quant_forward(gate_up, output_mode=0)


def _linghe_quantize(module: Any, given: Given) -> Call:
    x = given["x"]
    return lambda: module.triton_group_quant(x)


def _linghe_group_norm_gate(module: Any, given: Given) -> Call:
    o, gate, weight, groups, eps = (given[n] for n in ("o", "gate", "weight", "groups", "eps"))
    shaped = o if o.ndim == 3 else o.unflatten(1, (groups, -1))
    return lambda: module.triton_group_rms_norm_gate_forward(
        shaped[None], gate[None], weight, eps=eps, group_size=groups, transpose=False
    )


def _linghe_qk_norm_rope(module: Any, given: Given) -> Call | None:
    qkv, q_weight, k_weight = given["qkv"], given["q_weight"], given["k_weight"]
    cos, sin, heads, eps = given["cos"], given["sin"], given["heads"], given["eps"]
    width = heads * q_weight.numel()
    if qkv.shape[1] < 3 * width or cos.shape[1] * 4 != q_weight.numel():
        return None
    three = qkv[:, : 3 * width].contiguous()
    angles = torch.cat((torch.atan2(sin, cos),) * 2, 1)
    ends = torch.tensor([0, qkv.shape[0]], dtype=torch.int32, device=qkv.device)
    return lambda: module.triton_varlen_qk_norm_and_half_rope_forward(
        three, q_weight, k_weight, angles, ends, ends, H=heads, h=heads, eps=eps, interleaved=False
    )


# ------------------------------------------------------------------------------- linear attention


def _fla_chunks(module: Any, given: Given) -> Call:
    q, k, v, rates = given["q"], given["k"], given["v"], -given["decay"]
    ends = None if len(given["slots"]) == 1 else given["offsets"].long()
    return lambda: module.chunk_simple_gla(
        q[None], k[None], v[None], g_gamma=rates, scale=q.shape[2] ** -0.5,
        output_final_state=True, cu_seqlens=ends,
    )  # fmt: skip


def _linghe_lightning(module: Any, given: Given) -> Call | None:
    q, k, v, decay = given["q"], given["k"], given["v"], given["decay"]
    if len(given["slots"]) > 1 or q.shape[0] % 32:
        return None
    return lambda: module.triton_lightning_attention_forward(q[None], k[None], v[None], decay)


def _fla_step(module: Any, given: Given) -> Call:
    heads, rates = given["decay"].numel(), -given["decay"]
    width = heads * given["q_weight"].numel()
    parts = given["qkvg"][:, : 3 * width].unflatten(1, (3, heads, -1)).contiguous()
    q, k, v = (parts[:, None, i] for i in range(3))
    before = given["state"][given["slots"].clamp(min=0).long()].contiguous()
    return lambda: module.fused_recurrent_simple_gla(
        q, k, v, g_gamma=rates, initial_state=before, output_final_state=True
    )


# ----------------------------------------------------------------------------------------- linears


def _cublas_bf16(module: Any, given: Given) -> Call | None:
    weight = given["weight"]
    if given["format"] != "bf16":
        return None
    rows = given["x"][:, : weight.shape[1]].contiguous()
    return lambda: module.linear(rows, weight)


def _fp8_rows(given: Given) -> tuple[Any, Any] | None:
    """Codes and scales of the input; None where the weight is not whole blocks of FP8."""
    weight = given["weight"]
    if given["format"] != "fp8" or weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        return None
    codes, scales = quantize_fp8(given["x"][:, : weight.shape[1]])
    return codes.contiguous(), scales


def _cublas_fp8(module: Any, given: Given) -> Call | None:
    rows, weight, scale = _fp8_rows(given), given["weight"], given["scale"]
    if rows is None:
        return None
    codes, columns = rows[0], rows[1].t().contiguous().t()
    kinds = module.ScalingType
    return lambda: module.scaled_mm(
        codes, weight.t(), columns, kinds.BlockWise1x128, scale.t(), kinds.BlockWise128x128
    )


def _deep_gemm(module: Any, given: Given) -> Call | None:
    rows, weight, scale = _fp8_rows(given), given["weight"], given["scale"]
    if rows is None:
        return None
    codes, scales = rows[0], module.get_mn_major_tma_aligned_tensor(rows[1])
    y = torch.empty(codes.shape[0], weight.shape[0], dtype=torch.bfloat16, device=codes.device)
    return lambda: module.fp8_gemm_nt((codes, scales), (weight, scale), y)


def _humming(module: Any, given: Given) -> Call | None:
    if given["format"] != "int4":
        return None
    rows, words = given["weight"].shape
    layer = module.HummingLayer(
        shape_n=rows,
        shape_k=8 * words,
        weight_config={
            "quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int",
            "num_bits": 4, "strategy": "group", "group_size": given["group"], "symmetric": True,
        },
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_tensors({"weight_packed": given["weight"], "weight_scale": given["scale"]})
    layer.transform()
    x = given["x"][:, : 8 * words].contiguous()
    return lambda: layer(x)


_ALONE = "the product alone, on codes that are there"
_LINGHE = "linghe"

PEERS: Mapping[str, tuple[Peer, ...]] = {
    "rms_norm": (
        Peer(
            name="linghe triton_rms_norm_forward", package=_LINGHE,
            module="linghe.utils.norm", prepare=_linghe_rms_norm,
        ),
        Peer(
            name="torch rms_norm", package=None, module="torch.nn.functional",
            prepare=_torch_rms_norm,
        ),
    ),
    "rms_norm_fp8": (
        Peer(
            name="linghe triton_rms_norm_and_block_quant_forward", package=_LINGHE,
            module="linghe.utils.norm", prepare=_linghe_rms_norm_fp8,
            difference="writes no bf16 copy: 3 of our 5 bytes a value",
        ),
    ),
    "silu_mul": (
        Peer(
            name="linghe triton_weighted_silu_forward", package=_LINGHE,
            module="linghe.utils.silu", prepare=_linghe_silu_mul,
        ),
    ),
    "silu_mul_fp8": (
        Peer(
            name="linghe triton_silu_and_block_quant_forward", package=_LINGHE,
            module="linghe.utils.silu", prepare=_linghe_silu_mul_fp8,
        ),
    ),
    "quantize_fp8": (
        Peer(
            name="linghe triton_group_quant", package=_LINGHE,
            module="linghe.quant.group", prepare=_linghe_quantize,
        ),
    ),
    "group_norm_gate": (
        Peer(
            name="linghe triton_group_rms_norm_gate_forward", package=_LINGHE,
            module="linghe.utils.gate", prepare=_linghe_group_norm_gate,
        ),
    ),
    "qk_norm_rope": (
        Peer(
            name="linghe triton_varlen_qk_norm_and_half_rope_forward", package=_LINGHE,
            module="linghe.utils.rope", prepare=_linghe_qk_norm_rope,
            difference="copies v too, and makes cos and sin from angles",
        ),
    ),
    "lightning_prefill": (
        Peer(
            name="fla-core chunk_simple_gla", package="fla-core", module="fla.ops.simple_gla",
            prepare=_fla_chunks, difference="chunk states in bf16; from zero",
        ),
        Peer(
            name="linghe triton_lightning_attention_forward", package=_LINGHE,
            module="linghe.attn.la", prepare=_linghe_lightning, difference="from zero",
        ),
    ),
    "lightning_decode_qkv": (
        Peer(
            name="fla-core fused_recurrent_simple_gla", package="fla-core",
            module="fla.ops.simple_gla", prepare=_fla_step,
            difference="no norm, no rope; a new copy of the states",
        ),
    ),
    "fused_linear": (
        Peer(
            name="cuBLASLt, bf16", package=None, module="torch.nn.functional",
            prepare=_cublas_bf16, difference="the product alone",
        ),
        Peer(
            name="cuBLASLt, blocks of fp8", package=None, module="torch.nn.functional",
            prepare=_cublas_fp8, difference=_ALONE,
        ),
        Peer(
            name="DeepGEMM fp8_gemm_nt", package="sgl-deep-gemm", module="deep_gemm",
            prepare=_deep_gemm, difference=_ALONE,
        ),
        Peer(
            name="humming, int4", package="humming-kernels", module="humming.layer",
            prepare=_humming, difference="the product alone",
        ),
    ),
}  # fmt: skip
"""By op."""
