"""Static scales for tests: a checkpoint that has some, and eager that rounds by them."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lingc.checkpoint.convert import to_quantized
from lingc.checkpoint.source import Source
from lingc.math import E4M3_MAX, dequantize_rows, quantize_fp8
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.model.moe import Experts
from lingc.parity.weights import formats
from lingc.plan import Plan
from lingc.quantize.formats import FP8_BLOCK, decode_e4m3
from lingc.quantize.recipes import PLAIN
from tests.evaluate import one_thread


class StaticSource:
    """A checkpoint with a scale of inputs beside each matrix, as a calibration leaves it.

    A scale is by the largest magnitude that some tokens bring.

    Args:
        source: The checkpoint.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def input_scale(self, name: str) -> float | None:
        return self._scales.get(name.removesuffix(".weight"))

    @cached_property
    def _scales(self) -> Mapping[str, float]:
        return _observed(self._source)


def _observed(source: Source) -> Mapping[str, float]:
    module, found = from_source(source), dict[str, float]()

    def watch(name: str, x: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(x.abs().max()) / E4M3_MAX)

    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda _m, args, name=name: watch(name, args[0]))
    ids = torch.tensor([[(53 * t + 7) % 4096 for t in range(64)]])
    with torch.inference_mode(), one_thread():
        hidden = module.forward_hidden(ids[:, :-1])
        module.mtp(ids[:, 1:], hidden)
    return found


class _ExactSource(StaticSource):
    """Weights as a plan holds them, in f64: codes that are made of a product tell its last bits."""

    def __init__(self, source: StaticSource, plan: Plan) -> None:
        super().__init__(source._source)
        self.stored = formats(plan, plan.programs)

    def dense(self, name: str) -> Any:
        stored = self.stored.get(name, PLAIN)
        if stored.kind == "plain":
            return self._source.dense(name)
        codes, scales = to_quantized(self._source, name, stored.kind, stored.group)
        wide = scales.astype(np.float64)
        if stored.kind == "fp8_block":
            wide = wide.repeat(FP8_BLOCK, 0)[: codes.shape[0]]
            wide = wide.repeat(FP8_BLOCK, 1)[:, : codes.shape[1]]
        return decode_e4m3(codes) * wide


def rounded_model(source: StaticSource, plan: Plan, dtype: torch.dtype) -> LingModel:
    """Eager with a plan's FP8, which rounds what is multiplied: experts' inputs by blocks."""
    exact = _ExactSource(source, plan)
    module = from_source(cast("Source", exact), dtype)
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and exact.stored[f"{name}.weight"].kind == "fp8_tensor":
            scale = torch.tensor(source.input_scale(name), dtype=torch.float32)
            part.register_forward_pre_hook(_by(scale))
        elif isinstance(part, Experts):
            _round_experts(part)
    return module


def _by(scale: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (codes.to(x.dtype) * scale.to(x.dtype),)

    return hook


def _round_experts(experts: Experts) -> None:
    def coded(x: Tensor) -> Tensor:
        return dequantize_rows(*quantize_fp8(x), x.dtype)

    def forward(n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total, rounded = torch.zeros_like(n, dtype=weights.dtype), coded(n)
        for e in ids.unique().tolist():
            token, rank = torch.nonzero(ids == e, as_tuple=True)
            x = rounded[token]
            inner = nn.functional.silu(x @ experts.gate_proj[e].T) * (x @ experts.up_proj[e].T)
            y = coded(inner) @ experts.down_proj[e].T
            total.index_add_(0, token, y * weights[token, rank].unsqueeze(-1))
        return total.to(n.dtype)

    experts.forward = forward  # type: ignore[method-assign]
