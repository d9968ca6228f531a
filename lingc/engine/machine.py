"""What this machine has, held against what a variant asks for.

Nothing native is loaded, but for a variant that asks for a GPU: then the driver is asked, by its C
interface, what devices it has. No context is made, and no memory taken.
"""

import ctypes
import importlib.metadata
import importlib.util
import operator
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lingc.engine.checks import Check, failed, not_run, passed
from lingc.engine.manifest import Variant

_EXTRAS: Mapping[str, str] = {"onnx": "onnx", "cuda": "cuda", "tensorrt": "tensorrt"}
_KNOWN = ("arch", "gpu", "libraries", "os")
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)(\d{1,9}(?:\.\d{1,9})*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The GPU that an engine would run on: the first that the driver shows.

    Attributes:
        name: As it names itself.
        capability: Compute capability, `9.0`.
        driver: The newest CUDA that the driver speaks, `13.0`.
        memory_bytes: In all, whoever holds it.
        sms: Multiprocessors; 0 where the driver does not say.
    """

    name: str
    capability: str
    driver: str
    memory_bytes: int
    sms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as far as a variant can ask about it.

    Attributes:
        version_of: Module name -> its version, `""` if it does not say, None if it is not there.
        gpu: The first GPU, or a sentence that says why there is none.
    """

    os: str
    arch: str
    version_of: Callable[[str], str | None]
    gpu: Callable[[], Gpu | str] = lambda: "no GPU was looked for"


def this_machine() -> Machine:
    """The machine that this runs on."""
    return Machine(
        os=platform.system().lower(),
        arch=platform.machine(),
        version_of=_installed_version,
        gpu=_first_gpu,
    )


def judge_machine(variant: Variant, machine: Machine) -> list[Check]:
    """Whether a variant can run there; every reason that it cannot."""
    needs = variant.runs_on
    rows = [
        failed(
            "requirement",
            repr(name),
            f"one of {', '.join(_KNOWN)}",
            "a requirement that this version does not know",
            "update lingc (pip install -U lingc)",
        )
        for name in sorted(set(needs) - set(_KNOWN))
    ]
    rows += [] if rows else [passed("requirement", f"{len(needs)} requirements")]
    rows.append(_one_of("os", machine.os, needs["os"], variant))
    rows.append(_one_of("arch", machine.arch, needs["arch"], variant))
    for name, versions in sorted(needs["libraries"].items()):
        rows += _library(name, versions, variant, machine)
    if "gpu" in needs:
        rows += _judge_gpu(needs["gpu"], variant, machine)
    return rows


def satisfies(version: str, versions: str) -> bool:
    """Whether a version is among those described.

    Raises:
        ValueError: The description cannot be read.

    >>> satisfies("1.31.1", ">=1.20,<2"), satisfies("2.0.0rc1", "<2"), satisfies("3", "")
    (True, False, True)
    """
    wanted = []
    for clause in filter(None, (part.strip() for part in versions.split(","))):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"{clause!r} is not a comparison with a version")
        wanted.append((_COMPARE[match[1]], _numbers(match[2])))
    have = _numbers(version)
    return all(compare(_padded(have), _padded(bound)) for compare, bound in wanted)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d{1,9}(?:\.\d{1,9})*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _padded(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (*numbers, *(0,) * 8)[:8]


def _installed_version(module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    for name in _distributions(module):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _distributions(module: str) -> Iterator[str]:
    """What may have brought a module; its own name first, as the rest takes long to find out."""
    yield module
    yield from importlib.metadata.packages_distributions().get(module, ())


def _one_of(check_id: str, have: str, wanted: list[str], variant: Variant) -> Check:
    listed = ", ".join(wanted)
    if have in wanted:
        return passed(check_id, have, expected=listed)
    fix = f"run it on {listed or 'no machine'}, or build it for this one"
    return failed(check_id, variant.target, listed or "nothing", have, fix)


def _library(name: str, versions: str, variant: Variant, machine: Machine) -> list[Check]:
    have = machine.version_of(name)
    extra = _EXTRAS[variant.engine]
    install = f"pip install 'lingc[{extra}]'"
    wanted = f"{name} {versions}".strip()
    if have is None:
        fix = install
        return [failed("library", name, wanted, "it is not installed", fix)]
    rows = [passed("library", f"{name} {have}".strip(), expected=wanted)]
    try:
        fits = satisfies(have, versions)
    except ValueError as error:
        return [
            *rows,
            failed("requirement", name, "versions such as >=1.2,<3", str(error), install),
        ]
    if fits:
        return [*rows, passed("library-version", have, expected=versions or "any")]
    return [*rows, failed("library-version", name, versions, have or "no version", install)]


def _judge_gpu(needs: Mapping[str, Any], variant: Variant, machine: Machine) -> list[Check]:
    """The GPU: generation, driver, memory in all. What is free is known when it is started."""
    wanted = f"compute capability {needs['capability']}"
    gpu = machine.gpu()
    if isinstance(gpu, str):
        fix = f"run it where a GPU of {wanted} and its driver are; `lingc inspect` works anywhere"
        later = not_run(("gpu-driver", "gpu-memory"), "there is no GPU")
        return [failed("gpu", variant.target, wanted, gpu, fix), *later]
    found = f"{gpu.name}, {gpu.capability}"
    fix = "its code runs on no other generation: build it for this GPU, or run it on such a one"
    rows = [
        passed("gpu", found, expected=wanted)
        if gpu.capability == needs["capability"]
        else failed("gpu", variant.target, wanted, found, fix)
    ]
    try:
        is_new = satisfies(gpu.driver, needs["driver"])
    except ValueError as error:
        rows.append(failed("requirement", "gpu.driver", "versions such as >=13", str(error), fix))
    else:
        wanted, found, fix = f"CUDA {needs['driver']}", f"CUDA {gpu.driver}", "update the driver"
        rows.append(
            passed("gpu-driver", found, expected=wanted)
            if is_new
            else failed("gpu-driver", gpu.name, wanted, found, fix)
        )
    least, have = (f"{count / 1e9:.1f} GB" for count in (needs["memory_bytes"], gpu.memory_bytes))
    fix = "take a GPU with more memory, or an engine of a smaller precision"
    rows.append(
        passed("gpu-memory", have, expected=f"at least {least}")
        if gpu.memory_bytes >= needs["memory_bytes"]
        else failed("gpu-memory", gpu.name, f"at least {least}", have, fix)
    )
    return rows


_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16
"""Of `CUdevice_attribute` in cuda.h."""


def _first_gpu() -> Gpu | str:
    """What the driver says of its first device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed"
    version, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    facts: list[int] = []
    calls: list[tuple[Any, ...]] = [
        (driver.cuInit, 0),
        (driver.cuDriverGetVersion, ctypes.byref(version)),
        (driver.cuDeviceGet, ctypes.byref(device), 0),
        (driver.cuDeviceGetName, name, len(name), device),
        (driver.cuDeviceTotalMem_v2, ctypes.byref(memory), device),
    ]
    for call, *arguments in calls:
        if (code := call(*arguments)) != 0:
            return f"the NVIDIA driver shows no device (error {code})"
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        facts.append(value.value)
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=f"{facts[0]}.{facts[1]}",
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        memory_bytes=memory.value,
        sms=facts[2],
    )
