"""What may be known of a device while compiling for it. Facts only, and never probed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KIB = 1024
MIB = 1024 * KIB

EngineKind = Literal["onnx", "cuda", "tensorrt"]
ENGINE_KINDS: tuple[EngineKind, ...] = ("onnx", "cuda", "tensorrt")

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARCH = re.compile(r"cpu|sm_([1-9][0-9]+)a?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device, or one class of devices, to compile for.

    A fact that has no source is None, and what would follow from it is None too. A class of
    devices (`rtx-89` is every part of compute capability 8.9) knows only what they share.

    Attributes:
        name: Canonical name, as given on the command line and written in manifests.
        vendor: Who makes it; `any` for a class that many make.
        title: The product, as a reader would look it up.
        engines: Engine kinds that can be built for it; the first is what `auto` means.
        arch: `cpu`, or the CUDA architecture that kernels are compiled for, e.g. `sm_90a`.
        sms: Streaming multiprocessors a kernel may use.
        memory_bytes: Device memory, by the datasheet's decimal gigabytes.
        hbm_bytes_per_s: Peak DRAM bandwidth.
        l2_bytes: L2 cache, as the device reports it.
        smem_per_block_bytes: Largest shared-memory allocation of one block, opt-in included.
        dense_flops_per_s: Peak tensor-core rate by dtype name, without structured sparsity.
        activations: Dtype of activations between ops.
        fp8_activations: Whether precisions with FP8 activations quantize them here. Where not,
            such a precision is weight-only.
    """

    name: str
    vendor: str
    title: str
    engines: tuple[EngineKind, ...]
    arch: str
    activations: Literal["f32", "bf16"]
    fp8_activations: bool
    sms: int | None = None
    memory_bytes: int | None = None
    hbm_bytes_per_s: float | None = None
    l2_bytes: int | None = None
    smem_per_block_bytes: int | None = None
    dense_flops_per_s: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        faults = [
            f"{self.name!r}: {fault}"
            for fault in (*_identity_faults(self), *_unit_faults(self))
            if fault is not None
        ]
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def default_engine(self) -> EngineKind:
        """What `--engine auto` builds for this target, on any build machine."""
        return self.engines[0]

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """`(9, 0)` for `sm_90a`; None for a CPU."""
        match = _ARCH.fullmatch(self.arch)
        if match is None or match[1] is None:
            return None
        return int(match[1][:-1]), int(match[1][-1])

    def seconds(self, *, flops: float, dtype: str, moved_bytes: float) -> float | None:
        """Roofline time: the slower of arithmetic at peak and memory traffic at peak.

        Args:
            flops: Multiplications and additions, counted apart.
            dtype: Name of the dtype that is multiplied, e.g. `fp8`.
            moved_bytes: Bytes read from and written to device memory.

        Returns:
            None where the bandwidth or the rate for `dtype` is not known.
        """
        rate = self.dense_flops_per_s.get(dtype)
        if rate is None or self.hbm_bytes_per_s is None:
            return None
        return max(flops / rate, moved_bytes / self.hbm_bytes_per_s)


def _identity_faults(target: Target) -> tuple[str | None, ...]:
    unknown = [kind for kind in target.engines if kind not in ENGINE_KINDS]
    return (
        None if _NAME.fullmatch(target.name) else "a name is lower case, digits and hyphens",
        None if _ARCH.fullmatch(target.arch) else f"arch {target.arch!r} is not 'cpu' or 'sm_XY'",
        None if target.engines else "no engine kind can be built for it",
        f"engine kinds {unknown} are not among {list(ENGINE_KINDS)}" if unknown else None,
        "an engine kind is listed twice"
        if len(set(target.engines)) < len(target.engines)
        else None,
        f"FP8 activations between {target.activations} ops are nobody's kernel"
        if target.fp8_activations and target.activations != "bf16"
        else None,
    )


def _unit_faults(target: Target) -> tuple[str | None, ...]:
    """Figures that can only be a slip of unit: GB for bytes, TFLOP/s for FLOP/s."""

    def outside(what: str, value: float | None, low: float, high: float) -> str | None:
        if value is None or low <= value <= high:
            return None
        return f"{what} = {value:g} is outside {low:g} to {high:g}; is the unit right?"

    return (
        outside("sms", target.sms, 1, 1024),
        outside("memory_bytes", target.memory_bytes, 1e9, 1e13),
        outside("hbm_bytes_per_s", target.hbm_bytes_per_s, 1e11, 1e14),
        outside("l2_bytes", target.l2_bytes, MIB, 1024 * MIB),
        outside("smem_per_block_bytes", target.smem_per_block_bytes, 48 * KIB, 1024 * KIB),
        *(
            outside(f"dense_flops_per_s[{dtype!r}]", rate, 1e12, 1e17)
            for dtype, rate in target.dense_flops_per_s.items()
        ),
    )
