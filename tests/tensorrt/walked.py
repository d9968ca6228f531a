"""A TensorRT library for tests: its engines are networks that are walked, in host memory.

The networks are those that the real library was given; addresses, shapes and streams are what the
backend binds. Work is put on the device's stream, as an engine's is.
"""

import ctypes
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lingc.op import TORCH_DTYPE
from lingc.plan import Plan
from lingc.targets.tensorrt.interpret import Walk
from lingc.targets.tensorrt.lower import Network


class Base:
    """In the place of the library's base classes."""

    def __init__(self, *_: Any) -> None: ...


class Registry:
    def __init__(self) -> None:
        self.creators: list[Any] = []

    def register_creator(self, creator: Any, _namespace: str) -> bool:
        """As TensorRT's: false for a name that it has."""
        is_new = all(one.name != creator.name for one in self.creators)
        if is_new:
            self.creators.append(creator)
        return is_new


class Library:
    """The part of TensorRT that runs engines.

    Args:
        plan: Of the networks.
        networks: By phase; an engine's bytes are its phase's name.
        trt: What made them.
        device: Where the engines' work is put.
        version: Of the library.
    """

    __name__ = "walked"

    def __init__(
        self, plan: Plan, networks: Mapping[str, Network], trt: Any, device: Any, version: str
    ) -> None:
        self.__version__ = version
        self.registry = Registry()
        self.seen: list[bytes] = []
        self._walks = {p: Walk(one, trt, rounded=True) for p, one in networks.items()}
        self._plan, self._networks, self._device = plan, networks, device
        self.IPluginCreatorV3One = Base
        for name in ("", "OneCore", "OneBuildV2", "OneRuntime"):
            setattr(self, f"IPluginV3{name}", type(f"IPluginV3{name}", (Base,), {}))
        self.PluginFieldType = SimpleNamespace(CHAR=0, INT32=1)
        self.PluginField = self.PluginFieldCollection = Base
        self.Logger = type("Logger", (Base,), {"ERROR": 1})

    def get_plugin_registry(self) -> Registry:
        return self.registry

    def Runtime(self, _logger: Any) -> Any:  # noqa: N802 (TensorRT's name)
        return SimpleNamespace(
            engine_host_code_allowed=True, deserialize_cuda_engine=self._deserialize
        )

    def _deserialize(self, data: bytes) -> Any:
        self.seen.append(data)
        phase = data.decode()
        network = self._networks[phase].network
        names = [network.get_input(i).name for i in range(network.num_inputs)]
        names += [network.get_output(i).name for i in range(network.num_outputs)]
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            create_execution_context=lambda: Context(
                self._walks[phase], self._plan, phase, names, self._device
            ),
        )


class Context:
    """An engine's context: what is bound, and the walk over it."""

    def __init__(self, walk: Walk, plan: Plan, phase: str, names: list[str], device: Any) -> None:
        self._walk, self._program, self._device = walk, plan.programs[phase], device
        self._names = names
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._places[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes, places = dict(self._shapes), dict(self._places)
        record = self._device.record

        def work() -> None:
            self._run(shapes, places)

        if record is None:
            self._device.later(stream, work)
        else:
            record.append(work)
        return True

    def _run(self, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, int]) -> None:
        program = self._program
        given = {}
        for name in (*program.inputs, *program.states, *program.weights):
            if name in self._names:
                kind = program.types[name]
                shape = shapes.get(name) or kind.bind({})
                given[name] = _at(places[name], kind.dtype, shape).clone()
        with torch.inference_mode():
            made = self._walk(given)
        for name, value in made.items():
            into = _at(places[name], program.types[name].dtype, tuple(value.shape))
            into.copy_(value)


def _at(address: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """What lies at an address, not copied."""
    kind = TORCH_DTYPE[dtype]
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return torch.from_numpy(raw).view(kind).reshape(shape)
