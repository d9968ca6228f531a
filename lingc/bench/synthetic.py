"""Weights that are drawn on the device, so that a model can be timed without its checkpoint.

Bytes and shapes are those of the engine; values are such that activations stay near one and the
experts that tokens are sent to are spread as they should be: evenly, or as by Zipf's law. What a
step makes of them is checked like that of any engine, and means nothing.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lingc.device import Binary, Device
from lingc.errors import InputError
from lingc.kernel import Kernel
from lingc.model.config import ModelConfig
from lingc.plan import Plan, Ref, TensorType, WeightSpec
from lingc.runtime.backend import Array
from lingc.runtime.cuda_memory import Held
from lingc.targets.cuda.binaries import Compilers, compile_all

Routing = Literal["uniform", "zipf"]
ROUTINGS: tuple[Routing, ...] = ("uniform", "zipf")

KINDS = {"bf16": 0, "f32": 1, "f8e4m3": 2, "i32": 3, "u8": 3}
"""Element type -> how `kernels/fill.cu` draws it."""

CODE_RMS = 0.595
"""Root mean square of the E4M3 codes that are drawn."""
NIBBLE_RMS = 4.18
"""Of nibbles from 1 to 15, 8 twice as often as others, less 8."""

BRANCH = 0.1
"""Gain of what ends a block: the residual stream stays mostly a token's own embedding, so that
tokens are sent to experts independently of each other."""

ZIPF_SPREAD = 0.075
"""Of the biases, against scores that are sigmoids of normal numbers: with it batches of 16 and 32
tokens hit as many distinct of 256 experts, 8 each, as draws by 1 / rank do, 69 and 106."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """How a weight is drawn: offset + scale * n, where its element type has numbers."""

    scale: float = 1.0
    offset: float = 0.0


def kernels() -> dict[int, Kernel]:
    """The kernel that draws, by kind."""
    arguments = (("out", "*u8"), ("bytes", "i64"), ("seed", "i32"), ("scale", "f32"),
                 ("offset", "f32"))  # fmt: skip
    return {
        kind: Kernel(
            language="cuda",
            source="kernels/fill.cu",
            entry="fill",
            arguments=arguments,
            constants=(("KIND", kind),),
            warps=8,
        )
        for kind in sorted(set(KINDS.values()))
    }


def binaries(
    arch: str, cache_dir: Path, compilers: Compilers | None = None
) -> Mapping[int, Binary]:
    """The same, compiled."""
    some = kernels()
    made = compile_all(some.values(), arch, cache_dir, compilers=compilers, jobs=1)
    return {kind: made[kernel] for kind, kernel in some.items()}


class Drawn:
    """Draws tensors of a plan on a device.

    Args:
        seed: Of every number.
        code: What `binaries` gave.
    """

    def __init__(self, device: Device, seed: int, code: Mapping[int, Binary]) -> None:
        self._device, self._seed, self._code = device, seed, code

    def tensor(self, name: str, held: Held, fill: Fill) -> None:
        """Draw one, on the stream."""
        if held.bytes % 4:
            raise InputError(f"{name!r} has {held.bytes} bytes, which is no multiple of 4")
        binary = self._code[KINDS[held.kind.dtype]]
        seed = zlib.crc32(f"{self._seed} {name}".encode()) & 0x7FFFFFFF
        words = held.bytes // 4
        blocks = max(1, min(-(-words // binary.threads), 1 << 14))
        self._device.put(
            binary,
            (held.address, held.bytes, seed, fill.scale, fill.offset),
            grid=(blocks, 1, 1),
        )

    def numbers(self, held: Held, values: Array) -> None:
        """Put given numbers where a tensor is."""
        whole = np.ascontiguousarray(values)
        assert whole.nbytes == held.bytes, "numbers for that tensor"
        self._device.upload(held.address, whole.ctypes.data, held.bytes)
        self._device.synchronize()


def draw_weights(
    plan: Plan, where: Mapping[str, Held], drawn: Drawn, routing: Routing = "uniform", seed: int = 0
) -> None:
    """Draw every weight of a plan; decays are those of its model."""
    config = ModelConfig.from_dict(plan.config)
    branches, biases = ends_of_branches(plan), router_biases(plan)
    for name, spec in plan.weights.items():
        held = where[name]
        if spec.format == "decay":
            drawn.numbers(held, config.decay(spec.layer).astype(np.float32))
        elif name in biases:
            experts = int(held.kind.shape[0])
            drawn.numbers(held, router_bias(experts, routing, seed + len(name) + biases[name]))
        else:
            drawn.tensor(name, held, fill_of(spec, BRANCH if name in branches else 1.0))


def fill_of(spec: WeightSpec, gain: float) -> Fill:
    """How a weight is drawn, so that its product has the gain: numbers near one become so."""
    shape = spec.type.shape
    if spec.type.dtype in {"f8e4m3", "i32", "u8"}:
        return Fill()
    if spec.part == "scales":
        int4 = spec.format == "int4_group"
        width = int(shape[-1]) * (spec.group if int4 else 128)
        size = gain / (width**0.5 * (NIBBLE_RMS if int4 else CODE_RMS))
        return Fill(offset=size, scale=0.2 * size)
    if len(shape) == 1:
        return Fill(offset=1.0, scale=0.1)  # a norm's
    if not spec.name.endswith("embeddings.weight"):
        return Fill(scale=gain * int(shape[-1]) ** -0.5)
    return Fill()


def state_fill(kind: TensorType) -> Fill:
    """How state is drawn: a cache of numbers near one, sums of products that are small."""
    return Fill(scale=0.1 if kind.dtype == "f32" else 1.0)


def ends_of_branches(plan: Plan) -> set[str]:
    """Weights of the products that are added to the residual stream, their scales among them."""
    found: set[str] = set()
    for op, given in _calls(plan):
        if op == "expert_down" or (op == "fused_linear" and given.get("residual") is not None):
            names = ("down", "scale") if op == "expert_down" else ("weight", "scale")
            found |= {one.name for name in names if isinstance(one := given.get(name), Ref)}
    return found


def router_biases(plan: Plan) -> dict[str, int]:
    """Weights that choose experts beside their scores, numbered."""
    found = [given["bias"].name for op, given in _calls(plan) if op == "norm_router"]
    return {name: i for i, name in enumerate(dict.fromkeys(found))}


def _calls(plan: Plan) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from lingc.plugins.table import OPS  # noqa: PLC0415 (imports torch)

    for program in plan.programs.values():
        for step in program.steps:
            name = step.op.removeprefix("lingc.")
            if name in OPS:
                yield name, dict(zip(OPS[name].arguments, step.args, strict=True))


def router_bias(experts: int, routing: Routing, seed: int) -> Array:
    """Biases, f32 [experts]: none, or such that the expert of rank r is chosen about as 1 / r.

    To take the largest of log p + Gumbel noise is to draw without replacement by p; the scores are
    the noise here, though their tail is a shorter one. Ranks are dealt out by the seed.
    """
    if routing == "uniform":
        return np.zeros(experts, np.float32)
    rank = np.random.default_rng(seed).permutation(experts) + 1
    found: Array = (-ZIPF_SPREAD * np.log(rank)).astype(np.float32)
    return found
