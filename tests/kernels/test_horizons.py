"""Linear attention remembers over a whole context as FP64 does, with the decays of real layers."""

from pathlib import Path

import pytest
import torch

from lingc.bench.kernels import Bound
from lingc.compare import close
from lingc.device import Device, launch_all
from lingc.op import OPS, type_of
from lingc.plugins import table  # noqa: F401 (registers the ops)
from lingc.samples import Samples
from lingc.targets.cuda.binaries import compile_all, kernels
from lingc.targets.nvidia import H200_SXM

TOKENS = 131_072
HEADS = 32
LAYERS = 32


def decays(layer: int) -> torch.Tensor:
    """Rates of a layer's heads: memories from about one token to about 7,900."""
    slopes = 2 ** (-8 * (torch.arange(HEADS, dtype=torch.float64) + 1) / HEADS)
    return (slopes * (1 - layer / (LAYERS - 1) + 1e-5)).float().cuda()


def faults(layer: int, cache_dir: Path) -> list[str]:
    """What is wrong with each tactic after 128K tokens of one sequence that goes on.

    Values are a quarter of keys in size, so that the slowest head's states, sums of thousands of
    products, are of the size of some ten.
    """
    some, op = Samples(dtype="bf16", device="cuda"), OPS["lightning_prefill"]
    q, k, v = (some.normal(TOKENS, HEADS, 128) for _ in range(3))
    v *= 0.25
    where = some.ints([1]), some.ints([0, TOKENS]), torch.arange(5, TOKENS + 5).int().cuda()
    arguments = (q, k, v, decays(layer), some.state(3, HEADS, 128, 128), *where)
    want = op.reference(q.double(), k.double(), v.double(), *arguments[3:])
    found = []
    device = Device()
    tactics = op.tactics(H200_SXM, *map(type_of, arguments))
    binaries = compile_all(kernels(tactics), H200_SXM.arch, cache_dir)
    for tactic in tactics:
        bound = Bound(op, arguments, tactic)
        torch.cuda.synchronize()
        launch_all(device, tactic.launches, binaries, bound.addresses, first=True)
        device.synchronize()
        for name, got, right in zip(op.results, bound.results(), want, strict=True):
            dtype = "bf16" if name == "o" else "f32"
            compared = close(got, right, dtype=dtype, mechanism="lightning")
            if not compared.ok:
                found.append(f"{tactic.name}, {name}: {compared}")
    return found


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("layer", [0, 30])
def test_128k_tokens_are_remembered_as_in_f64(layer: int, tmp_path: Path) -> None:
    assert faults(layer, tmp_path) == []
