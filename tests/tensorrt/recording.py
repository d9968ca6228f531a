"""A TensorRT that only records: it has what a surface has, and fails for anything else.

Objects are of the class that a method's signature returns, so that a layer has its own members and
no others. Nothing is built: an engine is its network's name.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

Surface = Mapping[str, Any]


class Recording:
    """A module of bindings, made of a surface.

    Args:
        surface: As `tests.tensorrt.surface` writes it.

    Attributes:
        used: Every name that was asked for, such as `IBuilderConfig.set_preview_feature`.
        calls: Names of the network's methods in order.
        given: (name of the method, arguments) of every call.
    """

    __name__ = "tensorrt"

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.__version__ = surface["version"]
        self.used: set[str] = set()
        self.calls: list[str] = []
        self.given: list[tuple[str, tuple[Any, ...]]] = []
        self._classes: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in self.surface["module"]:
            raise AttributeError(f"TensorRT {self.__version__} has no {name!r}")
        self.used.add(name)
        if name in ALIASES:
            return getattr(self.DataType, ALIASES[name])
        if name == "get_plugin_registry":
            return lambda: Thing(self, "IPluginRegistry")
        if name not in self._classes:
            self._classes[name] = _class(self, name)
        return self._classes[name]

    def member(self, kind: str, name: str) -> Any:
        """What a class has under a name.

        Raises:
            AttributeError: Nothing.
        """
        members = self.surface["classes"][kind]
        if name not in members:
            raise AttributeError(f"{kind} of TensorRT {self.__version__} has no {name!r}")
        self.used.add(f"{kind}.{name}")
        return members[name]


ALIASES = {"bfloat16": "BF16", "float32": "FLOAT", "fp8": "FP8", "int32": "INT32"}


def _class(recording: Recording, name: str) -> Any:
    """A class of the module: one to inherit from, to make, or an enumeration."""

    class Made(Thing):
        def __init__(self, *args: Any) -> None:
            del args
            Thing.__init__(self, recording, name)

    class Enumeration(type):
        def __getattr__(cls, member: str) -> Any:
            if member.startswith("__"):
                raise AttributeError(member)
            recording.member(name, member)
            return Value(member)

    if name.startswith(("IPlugin", "ILogger")):
        return type(name, (Plain,), {"Severity": _severity(recording)})
    return Enumeration(name, (Made,), {"__module__": "tensorrt"})


class Plain:
    """What a class of ours inherits from."""

    def __init__(self, *_: Any) -> None: ...


def _severity(recording: Recording) -> Any:
    recording.member("ILogger", "Severity")
    return SimpleNamespace(ERROR=1, VERBOSE=4)


class Value(str):
    """A member of an enumeration."""

    __slots__ = ()

    def __int__(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return str(self)


class Thing:
    """An object of a class of the surface."""

    def __init__(self, recording: Recording, kind: str) -> None:
        object.__setattr__(self, "_recording", recording)
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_set", {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        overloads = self._recording.member(self._kind, name)
        if overloads is None:
            return self._set.get(name, 0)
        return lambda *args, **more: self._call(name, overloads, args, more)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._recording.member(self._kind, name) is not None:
            raise AttributeError(f"{self._kind}.{name} is a method")
        self._set[name] = value

    def __bytes__(self) -> bytes:
        kind: str = self._kind
        return kind.encode()

    def __bool__(self) -> bool:
        return True

    def _call(self, name: str, overloads: Any, args: tuple[Any, ...], more: Any) -> Any:
        self._recording.given.append((f"{self._kind}.{name}", args))
        if self._kind == "INetworkDefinition":
            self._recording.calls.append(name)
        fitting = [one for one in overloads if _fits(one, args, more)]
        if not fitting:
            told = " or ".join(f"({', '.join(one['arguments'])})" for one in overloads)
            raise TypeError(
                f"{self._kind}.{name} of TensorRT {self._recording.__version__} takes {told}, "
                f"not {len(args)} arguments {sorted(more)}"
            )
        returns = fitting[0]["returns"]
        if returns in self._recording.surface["classes"]:
            return Thing(self._recording, returns)
        return {"bool": True, "int": 0, "str": "", "CapsuleType": object()}.get(returns)


def _fits(overload: Mapping[str, Any], args: tuple[Any, ...], more: Mapping[str, Any]) -> bool:
    names = overload["arguments"]
    least = len(names) - overload["optional"]
    return least <= len(args) + len(more) <= len(names) and more.keys() <= {*names[len(args) :]}
