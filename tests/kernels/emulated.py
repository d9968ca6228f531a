"""Run tactics whose kernels are CUDA C++ on the CPU, thread by thread (`emulator/`).

The CUDA file is compiled by the host's C++ compiler against headers that stand in for those of
`lingc/kernels`; what a file says in PTX of its own cannot be run. Every tensor stands between
guard zones, which a kernel must leave as they are.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lingc.bench.kernels import problem_of
from lingc.kernel import Kernel, Launch, Operand, Tactic, Tensor
from lingc.op import TORCH_DTYPE, Op, type_of
from lingc.plan import TensorType
from lingc.quantize.layouts import PLAIN, arrange
from lingc.targets.cuda.binaries import cuda_sources
from lingc.targets.nvidia import H200_SXM

TARGET = replace(H200_SXM, sms=3)
"""A grid of few blocks, which run one after another."""

COMPILER = shutil.which("g++") or shutil.which("clang++")
EMULATOR = Path(__file__).with_name("emulator")

_GUARD = 4096
_BYTE = 0xA5
_POISON = {torch.int32: -77_777_777}
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")
_OWN_HEADERS = {"device.cuh", "wgmma.cuh"}


def runs(tactic: Tactic) -> bool:
    """Whether all of a tactic's launches can be run here."""
    return all(
        one.kernel.language == "cuda" and one.cluster == (1, 1, 1) and _emulated(one.kernel.source)
        for one in tactic.launches
    )


@cache
def _emulated(source: str) -> bool:
    texts = cuda_sources(source)
    # An empty statement only orders, which a compiler of the host understands.
    return not any(
        re.search(r'\basm(?: volatile)?\("(?!")', text)
        for name, text in texts.items()
        if name not in _OWN_HEADERS
    )


def problem(op: Op, arguments: Sequence[Any], tactic: Tactic, folder: Path) -> str | None:
    """What is wrong with a tactic's results, or None.

    Args:
        arguments: As the op's schema has them, on the CPU.
        folder: Where compiled kernels are kept.
    """
    held = _held(op, arguments, tactic)
    for launch in tactic.launches:
        addresses = {name: guarded.address for name, guarded in held.items()}
        if broken := _launch(launch, addresses, folder):
            return f"{launch.kernel.entry}: {broken}"
    for name, guarded in held.items():
        if not guarded.whole():
            return f"wrote outside {name}"
    for space in tactic.workspaces:
        if space.zeroed and bool(held[space.name].tensor().any()):
            return f"left {space.name} at other than zero"
    got = [held[name].tensor() for name in op.results]
    return problem_of(op, arguments, got, similar=0.0)


def results(op: Op, arguments: Sequence[Any], tactic: Tactic, folder: Path) -> list[torch.Tensor]:
    """What a tactic makes of arguments.

    Raises:
        AssertionError: A kernel went wrong, or wrote where it may not.
    """
    held = _held(op, arguments, tactic)
    addresses = {name: guarded.address for name, guarded in held.items()}
    for launch in tactic.launches:
        broken = _launch(launch, addresses, folder)
        assert not broken, f"{launch.kernel.entry}: {broken}"
    stray = [name for name, guarded in held.items() if not guarded.whole()]
    assert not stray, f"{tactic.name} wrote outside {', '.join(stray)}"
    return [held[name].tensor() for name in op.results]


def _held(op: Op, arguments: Sequence[Any], tactic: Tactic) -> dict[str, "_Guarded"]:
    """Arguments as kernels take them, results and workspaces, these full of NaN."""
    layouts = op.layouts(*(type_of(value) for value in arguments))
    held = {
        name: _Guarded(_arranged(layouts.get(name, PLAIN), value))
        for name, value in zip(op.arguments, arguments, strict=True)
        if isinstance(value, torch.Tensor)
    }
    made = op.types(*(type_of(value) for value in arguments))
    types = (made,) if isinstance(made, TensorType) else made
    for name, kind in zip(op.results, types, strict=True):
        dtype = TORCH_DTYPE[kind.dtype]
        fresh = torch.full(kind.bind({}), _POISON.get(dtype, torch.nan)).to(dtype)
        held.setdefault(name, _Guarded(fresh))  # one that has an argument's name is that argument
    for space in tactic.workspaces:
        fill = 0 if space.zeroed else 0xFF
        held[space.name] = _Guarded(torch.full((space.bytes,), fill, dtype=torch.uint8))
    return held


class _Guarded:
    """A copy of a tensor between bytes that nobody may write."""

    def __init__(self, value: torch.Tensor) -> None:
        value = value.contiguous()
        self._shape, self._dtype = value.shape, value.dtype
        self._bytes = value.numel() * value.element_size()
        room = -(-self._bytes // 16) * 16 + 2 * _GUARD + 16
        self._raw = torch.full((room,), _BYTE, dtype=torch.uint8)
        self._at = _GUARD + -(self._raw.data_ptr() + _GUARD) % 16
        self._inside().copy_(value.reshape(-1).view(torch.uint8))

    def _inside(self) -> torch.Tensor:
        return self._raw[self._at : self._at + self._bytes]

    @property
    def address(self) -> int:
        return self._raw.data_ptr() + self._at

    def tensor(self) -> torch.Tensor:
        return self._inside().clone().view(self._dtype).view(self._shape)

    def whole(self) -> bool:
        """Whether the bytes around it are as they were."""
        around = torch.cat((self._raw[: self._at], self._raw[self._at + self._bytes :]))
        return bool((around == _BYTE).all())


def _arranged(layout: str, value: torch.Tensor) -> torch.Tensor:
    if layout == PLAIN:
        return value
    raw = value
    if value.dtype == torch.float8_e4m3fn:
        raw = value.view(torch.uint8)
    elif value.dtype == torch.bfloat16:
        raw = value.view(torch.int16)
    return torch.from_numpy(arrange(layout, raw.numpy()).copy()).view(value.dtype)


def _launch(launch: Launch, addresses: Mapping[str, int], folder: Path) -> str:
    """What the kernel did wrong; empty where nothing."""
    kernel = launch.kernel
    values = [
        _value(kind, operand, addresses)
        for (_, kind), operand in zip(kernel.arguments, launch.operands, strict=True)
    ]
    pointers = [ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values]
    run = ctypes.CDLL(str(_library(kernel, folder))).run
    run.restype = ctypes.c_char_p
    said: bytes = run((ctypes.c_void_p * len(pointers))(*pointers), *launch.grid, 32 * kernel.warps)
    return said.decode()


def _value(kind: str, operand: Operand, addresses: Mapping[str, int]) -> Any:
    if isinstance(operand, Tensor):
        at = addresses.get(operand.name, 0)
        return ctypes.c_void_p(at and at + operand.offset)
    if operand is None:
        return ctypes.c_void_p(0)
    if kind == "f32":
        return ctypes.c_float(operand)
    return {"i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind.partition(":")[0]](int(operand))


def _library(kernel: Kernel, folder: Path) -> Path:
    """The kernel as a library of the host; compiled once."""
    sources = dict(cuda_sources(kernel.source))
    name = kernel.source.rpartition("/")[2]
    text = _SHARED.sub(r"\1* \2 = (\1*)emulator::shared;", sources.pop(name))
    text += f"""
extern "C" const char* run(void** arguments, int x, int y, int z, int threads) {{
  emulator::launch({kernel.entry}, Index{{x, y, z}}, threads, {kernel.shared_bytes}, arguments);
  return emulator::problem;
}}
"""
    mine = {path.name: path.read_text(encoding="utf-8") for path in sorted(EMULATOR.iterdir())}
    rest = {key: value for key, value in sources.items() if key not in _OWN_HEADERS}
    whole = repr((text, mine, rest, kernel.constants))
    made = folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.so"
    if made.exists():
        return made
    for header, value in (rest | mine).items():
        (folder / header).write_text(value, encoding="utf-8")
    code = made.with_suffix(".cpp")
    code.write_text(text, encoding="utf-8")
    assert COMPILER is not None
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}"]
    macros = [f"-D{key}={value}" for key, value in kernel.constants]
    done = subprocess.run(
        [COMPILER, *flags, *macros, "-o", str(made), str(code)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{kernel.source} with {dict(kernel.constants)}:\n{done.stderr}"
    return made
