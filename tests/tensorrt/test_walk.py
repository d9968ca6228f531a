"""The networks compute what eager computes: walked layer by layer, without rounding and with it."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lingc.interpret import InterpreterBackend
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.parity.budget import judge, load_budget
from lingc.parity.compare import Comparison
from lingc.parity.eager import EagerSide
from lingc.parity.engine import EngineSide
from lingc.parity.side import MODES, Mode, Scores
from lingc.runtime.backend import Backend, Limits
from tests.driver import in_float64
from tests.evaluate import one_thread
from tests.tensorrt.engines import (
    MORE,
    SAMPLE,
    STATIC,
    RoundedSource,
    checkpoint,
    config,
    has_rtx,
    networks,
    plan,
    rows,
    weights,
)
from tests.tensorrt.static import StaticSource, rounded_model

pytestmark = has_rtx

CASES = [*SAMPLE, STATIC, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]

CODED = ("fp8", "int4-fp8")
"""Recipes that quantize activations, which eager does not: there the plan's references are held to
in their place, which other tests hold to eager."""


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


def walked(target: str, precision: str, *, rounded: bool, limits: Limits) -> Backend:
    from lingc.targets.tensorrt.interpret import NetworkBackend  # noqa: PLC0415

    lowering, made = networks(target, precision)
    held = weights(target, precision)
    return NetworkBackend(
        lowering.plan, made, lowering.backend.trt, held, limits, rounded=rounded
    )  # fmt: skip


def scored(backend: Backend, tokens: list[list[int]], mode: Mode) -> list[Scores]:
    return EngineSide(backend, "network", chunk=32).score(tokens, mode)


def reference(target: str, precision: str, tokens: list[list[int]], mode: Mode) -> list[Scores]:
    """What is right, in float64."""
    if precision in CODED:
        limits = Limits(slots=len(tokens), pages=4 * len(tokens))
        made = plan(target, precision)
        held = in_float64(made, weights(target, precision), config(), limits)
        return scored(held, tokens, mode)
    module = eager(target, precision, torch.float64)
    return EagerSide(module, "eager").score(tokens, mode)


def eager(target: str, precision: str, dtype: torch.dtype) -> LingModel:
    """Eager with a recipe's weights; it rounds inputs too where scales of them are known."""
    source = checkpoint(precision)
    if isinstance(source, StaticSource):
        return rounded_model(source, plan(target, precision), dtype)
    return from_source(RoundedSource(source, precision), dtype)


def error(got: list[Scores], want: list[Scores]) -> float:
    """Mean difference of logits."""
    apart = [np.abs(a.logits - b.logits).ravel() for a, b in zip(got, want, strict=True)]
    return float(np.concatenate(apart).mean())


@pytest.mark.parametrize(("target", "precision"), CASES)
def test_without_rounding_every_mode_is_eager(target: str, precision: str) -> None:
    tokens, budget = rows(2, 19), load_budget("engine-vs-eager")
    for mode in MODES:
        want = reference(target, precision, tokens, mode)
        backend = walked(target, precision, rounded=False, limits=Limits(slots=2, pages=4))
        got = scored(backend, tokens, mode)
        compared = Comparison(mode, None)
        for row, (a, b) in enumerate(zip(want, got, strict=True)):
            compared.add(row, a, b)

        failed = [check for check in judge(compared.summary(budget.margin), budget) if not check.ok]
        assert failed == []
        assert error(got, want) < 1e-5


@pytest.mark.parametrize(("target", "precision"), CASES)
def test_rounding_as_declared_loses_no_more_than_eager_in_bf16(target: str, precision: str) -> None:
    tokens = rows(8, 40)
    limits = Limits(slots=8, pages=16)
    want = reference(target, precision, tokens, "prefill")
    got = scored(walked(target, precision, rounded=True, limits=limits), tokens, "prefill")
    if precision in CODED:
        held = InterpreterBackend(plan(target, precision), weights(target, precision), limits)
        other = scored(held, tokens, "prefill")
    else:
        module = eager(target, precision, torch.bfloat16)
        other = EagerSide(module, "bf16").score(tokens, "prefill")

    assert error(got, want) <= 1.2 * error(other, want)
    assert error(got, want) > 1e-4, "nothing was rounded"
