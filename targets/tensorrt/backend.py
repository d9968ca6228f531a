"""The two flavours of TensorRT behind one small object: standard 10.16 and 11.x, and RTX.

Lowering uses what both have. What differs stands here: how a network is made, how a plugin gets
into it, and what an engine is built for. `tests/tensorrt/test_surface.py` holds every name that is
used to the published bindings of each version.
"""

import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lingc.engine.machine import this_machine
from lingc.errors import IncompatibleError, StageError
from lingc.plan import Plan
from lingc.runtime import tensorrt_library
from lingc.runtime.tensorrt_plugin import OpPlugin
from lingc.targets.spec import Target
from lingc.targets.tensorrt.timing import Timing

COMPATIBLE = "SAME_COMPUTE_CAPABILITY"
"""What standard engines run on: any GPU of the compute capability, at the cost of cuBLAS and cuDNN
as sources of kernels."""


def log_class(trt: Any) -> type[Any]:
    """A logger of `trt` that keeps every message, as (severity, text)."""

    def start(self: Any) -> None:
        trt.ILogger.__init__(self)
        self.messages = []

    def log(self: Any, severity: Any, message: str) -> None:
        self.messages.append((severity, message))

    return type("Log", (trt.ILogger,), {"__init__": start, "log": log})


@dataclass(slots=True)
class Backend(ABC):
    """A flavour of TensorRT, loaded.

    Attributes:
        trt: Its module.
        log: Every message of building so far.
    """

    trt: Any
    log: Any = field(init=False)
    _kept: list[Any] = field(init=False, default_factory=list)

    flavour = ""
    hosts: ClassVar[list[str]] = []
    """CPU architectures that its engines run beside."""

    def __post_init__(self) -> None:
        self.log = log_class(self.trt)()

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def builder(self) -> Any:
        return self.trt.Builder(self.log)

    def network(self, builder: Any, plugins: Sequence[OpPlugin]) -> Any:
        """An empty network, strongly typed, that `plugin` can add these plugins to."""
        # By name: on 10.16 the number 1 is this flag, on 11 it means nothing.
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        self._prepare(network, plugins)
        return network

    @abstractmethod
    def _prepare(self, network: Any, plugins: Sequence[OpPlugin]) -> None:
        """Do what must be done while the network is empty."""

    @abstractmethod
    def plugin(self, network: Any, number: int, plugin: OpPlugin, inputs: Sequence[Any]) -> Any:
        """Add the layer of the plugin of that number."""

    def config(self, builder: Any, target: Target, *, aliased: bool = False) -> Any:
        """What engines are built with."""
        config = builder.create_builder_config()
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        if aliased:
            config.set_preview_feature(self.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # noqa: FBT003
        self._aim(config, target)
        return config

    @abstractmethod
    def ready(self, plan: Plan, target: Target, timing: Timing, cache_dir: Path | None) -> None:
        """Make sure that it can build a plan for a target here, and by which measurements.

        Raises:
            IncompatibleError: It cannot.
            UsageError: The measurements cannot be read.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """How an engine was chosen, for `variant.json`: what it was timed on, and by what."""

    @abstractmethod
    def _aim(self, config: Any, target: Target) -> None:
        """Say what an engine is to run on."""

    def build(self, builder: Any, network: Any, config: Any) -> bytes:
        """The engine.

        Raises:
            StageError: TensorRT refuses, with its own words.
        """
        begin = len(self.log.messages)
        made = builder.build_serialized_network(network, config)
        if made is None:
            errors = self.errors(begin)
            raise StageError(
                f"TensorRT builds no engine of {network.name!r}: {errors}",
                hint="a fault of lingc, or of this TensorRT; please report it",
            )
        return bytes(made)

    def errors(self, begin: int = 0) -> str:
        """Errors that were logged since message `begin`."""
        worst = self.trt.ILogger.Severity.ERROR
        told = [text for severity, text in self.log.messages[begin:] if severity <= worst]
        return "; ".join(told[:3])[:600] or "it does not say why"


class RtxBackend(Backend):
    """TensorRT for RTX: builds on any machine; its network takes plugins from a parser alone."""

    flavour = "rtx"
    hosts: ClassVar[list[str]] = ["x86_64", "aarch64"]
    __slots__ = ("_seeds",)

    def ready(self, plan: Plan, target: Target, timing: Timing, cache_dir: Path | None) -> None: ...

    def facts(self) -> dict[str, Any]:
        return {}  # nothing is timed: its kernels are compiled where they run

    def _prepare(self, network: Any, plugins: Sequence[OpPlugin]) -> None:
        from lingc.targets.tensorrt.seeds import seed  # noqa: PLC0415 (needs onnx)

        tensorrt_library.mend(self.trt)
        parser, self._seeds = seed(self.trt, self.log, network, plugins)
        self._kept.append(parser)  # its layers live no longer than it

    def plugin(self, network: Any, number: int, plugin: OpPlugin, inputs: Sequence[Any]) -> Any:
        del network, plugin
        layer = self._seeds[number]
        for index, tensor in enumerate(inputs):
            layer.set_input(index, tensor)
        return layer

    def _aim(self, config: Any, target: Target) -> None:
        capability = target.compute_capability or (0, 0)
        names = tensorrt_library.RTX_CAPABILITIES
        if capability not in names:
            known = ", ".join(f"{major}.{minor}" for major, minor in names)
            raise IncompatibleError(
                f"TensorRT for RTX builds nothing for {target.name!r} (compute capability "
                f"{capability[0]}.{capability[1]})",
                hint=f"it builds for {known}",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(self.trt.ComputeCapability, names[capability]), 0)


class StandardBackend(Backend):
    """Standard TensorRT: builds where a GPU of the target's kind is."""

    flavour = "standard"
    hosts: ClassVar[list[str]] = [platform.machine()]
    __slots__ = ("_gpu", "timing")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.timing = Timing()
        self._gpu = ""

    def ready(self, plan: Plan, target: Target, timing: Timing, cache_dir: Path | None) -> None:
        gpu = this_machine().gpu()
        wanted = ".".join(map(str, target.compute_capability or ()))
        if isinstance(gpu, str) or gpu.capability != wanted:
            have = gpu if isinstance(gpu, str) else f"{gpu.name} has {gpu.capability}"
            raise IncompatibleError(
                f"standard TensorRT times its kernels on a GPU of compute capability {wanted} to "
                f"build for {target.name!r}, and here {have}",
                hint=f"build on a host with {target.title}, or with --engine cuda on any",
            )
        self._gpu = gpu.name
        timing.own(cache_dir, self.version, gpu.name, plan.precision)
        timing.read()
        self.timing = timing

    def facts(self) -> dict[str, Any]:
        return {
            "tuned_on": self._gpu,
            "hardware_compatibility": COMPATIBLE,
            "measurements_sha256": self.timing.sha256,
            "tactics_locked": self.timing.locked,
        }

    def build(self, builder: Any, network: Any, config: Any) -> bytes:
        try:
            return super().build(builder, network, config)
        except StageError as error:
            if not self.timing.locked:
                raise
            raise StageError(
                error.problem,
                hint="with --lock-tactics nothing is measured: leave it out where the model, the "
                "precision or TensorRT is another",
            ) from error
        finally:
            self.timing.keep()

    def _prepare(self, network: Any, plugins: Sequence[OpPlugin]) -> None: ...

    def plugin(self, network: Any, number: int, plugin: OpPlugin, inputs: Sequence[Any]) -> Any:
        del number
        return network.add_plugin_v3(list(inputs), [], plugin)

    def _aim(self, config: Any, target: Target) -> None:
        # Legal on any GPU of the capability, and tuned on the one that it is built on.
        del target
        level = getattr(self.trt.HardwareCompatibilityLevel, COMPATIBLE)
        config.hardware_compatibility_level = level
        self.timing.attach(self.trt, config)


def backend(target: Target) -> Backend:
    """The flavour that builds for a target: RTX for RTX GPUs and DGX Spark, else standard.

    Raises:
        MissingExtraError: It is not installed.
    """
    trt = tensorrt_library.require(target)
    return (RtxBackend if trt.__name__ == tensorrt_library.RTX else StandardBackend)(trt)
