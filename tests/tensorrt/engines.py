"""TensorRT networks of the shipped checkpoint, lowered once a process."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc import targets
from lingc.capture import Capturer, Sizes
from lingc.checkpoint import open_checkpoint
from lingc.checkpoint.convert import to_rounded
from lingc.checkpoint.source import Source
from lingc.compile import Request, compile_plan
from lingc.device import Binary
from lingc.kernel import Kernel
from lingc.model.config import ModelConfig
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.targets.tensorrt import lower
from lingc.targets.tensorrt.lower import Lowering, Network, Tabled
from lingc.weights import CheckpointWeights
from tests.tensorrt.static import StaticSource

LING_TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"

has_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="TensorRT for RTX is not installed: pip install 'lingc[tensorrt]'",
)

SAMPLE = (("rtx-120", "bf16"), ("rtx-89", "fp8"), ("spark", "int4-all"))
"""Target and precision: every target, and every kind of matrix."""

STATIC = ("rtx-89", "fp8-static")
"""What has static scales."""

MORE = tuple(
    (target, precision)
    for target in ("spark", "rtx-120", "rtx-89")
    for precision in ("bf16", "fp8", "fp8-static", "int4", "int4-fp8", "int4-all")
    if (target, precision) not in (*SAMPLE, STATIC)
)


@cache
def checkpoint(precision: str = "bf16") -> Source:
    """The shipped checkpoint, with scales of inputs where a recipe asks for them."""
    if load_recipe(precision).activations == "fp8_static":
        return cast("Source", StaticSource(checkpoint()))
    return open_checkpoint(LING_TINY)


@cache
def config() -> ModelConfig:
    return ModelConfig.from_file(LING_TINY)


@cache
def _capturer() -> Capturer:
    return Capturer(config(), Sizes())


@cache
def plan(target: str, precision: str) -> Plan:
    request = Request(precision=precision, target=target, engine="tensorrt")
    return compile_plan(
        config(), load_recipe(precision), targets.get(target), has_mtp=True, request=request,
        capturer=_capturer(),
    ).plan  # fmt: skip


@cache
def weights(target: str, precision: str) -> Mapping[str, Any]:
    specs = plan(target, precision).weights.values()
    made = CheckpointWeights(specs, checkpoint(precision), config())
    return {name: np.array(made[name]) for name in made}


def stand_ins(kernels: Sequence[Kernel]) -> dict[Kernel, Binary]:
    """What a network asks of kernels, which is a name: nothing here is launched."""
    return {
        kernel: Binary(
            name=f"{number:064x}", arch="none", code=repr(kernel).encode(), entry=kernel.entry,
            arguments=kernel.arguments, hidden=0, threads=32, shared_bytes=0,
        )
        for number, kernel in enumerate(kernels)
    }  # fmt: skip


@cache
def plugins(target: str, precision: str, *, embeds: bool = True) -> Tabled:
    return lower.tabled(
        plan(target, precision), targets.get(target), stand_ins, embeds=embeds
    )  # fmt: skip


def lowering(
    target: str, precision: str, *, embeds: bool = True, aliased: bool = False
) -> Lowering:
    from lingc.targets.tensorrt.backend import backend  # noqa: PLC0415 (TensorRT may be absent)

    return Lowering(
        backend(targets.get(target)),
        plan(target, precision),
        targets.get(target),
        plugins(target, precision, embeds=embeds),
        weights=weights(target, precision) if embeds else None,
        aliased=aliased,
    )


@cache
def networks(target: str, precision: str) -> tuple[Lowering, dict[str, Network]]:
    """Every phase's network, and what made them."""
    made = lowering(target, precision)
    return made, {phase: made.network(phase) for phase in made.plan.programs}


class RoundedSource:
    """A checkpoint whose matrices hold what a recipe's formats make of them.

    Args:
        source: The checkpoint.
        precision: Name of the recipe.
    """

    def __init__(self, source: Source, precision: str) -> None:
        self._source = source
        self._recipe = load_recipe(precision)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dense(self, name: str) -> Any:
        values = self._source.dense(name)
        stored = self._recipe.format_of(name.removesuffix(".weight"))
        if values.ndim != 2 or stored.kind == "plain":
            return values
        return to_rounded(self._source, name, stored.kind, stored.group)


def rows(count: int, length: int) -> list[list[int]]:
    return [[(37 * t + 11 * i) % 4096 for t in range(length + 7 * i)] for i in range(count)]


def as_tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values))
