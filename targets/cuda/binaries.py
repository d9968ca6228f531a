"""Kernels compiled ahead of time, on any machine: no GPU, no driver.

A binary's name is a digest of all that its bytes depend on: sources, constants, architecture,
compiler and its options. So a cache needs no other key, equal kernels of different ops are one
binary, and a binary made elsewhere is found.

CUDA C++ goes through NVRTC with no include path but the package's own headers. Triton is run with
line information off, since it writes the source's path into the binary otherwise, and with FP
fusion named, since its default differs between versions.
"""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lingc.device import Binary
from lingc.errors import IncompatibleError, InputError, MissingExtraError, StageError
from lingc.kernel import Kernel, Tactic
from lingc.staging import writing

FEATURES: Mapping[str, frozenset[str]] = {
    "sm_89": frozenset({"fp8"}),
    "sm_90a": frozenset({"fp8", "bulk", "wgmma"}),
    "sm_120a": frozenset({"fp8", "bulk"}),
    "sm_121a": frozenset({"fp8", "bulk"}),
}
"""What kernels may ask for, by architecture: the CUDA programming guide's table of features."""

CUDA_OPTIONS = ("--std=c++17", "--fmad=true", "--extra-device-vectorization", "-default-device")
TRITON_OPTIONS = {"enable_fp_fusion": True}

_COMPILERS = "compilers.json"
_IMPORT = re.compile(r"^from (lingc\.kernels\.\w+) import", re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)
_FORMAT = 1


def missing_features(kernel: Kernel, arch: str) -> tuple[str, ...]:
    """What a kernel needs and an architecture has not."""
    return tuple(sorted(set(kernel.features) - FEATURES.get(arch, frozenset())))


def kernels(tactics: Iterable[Tactic]) -> list[Kernel]:
    """The kernels of tactics, each once, in order."""
    return list(dict.fromkeys(one.kernel for tactic in tactics for one in tactic.launches))


def compile_all(
    wanted: Iterable[Kernel],
    arch: str,
    cache_dir: Path,
    *,
    compilers: "Compilers | None" = None,
    jobs: int | None = None,
    advance: Callable[[int], None] = lambda _done: None,
) -> dict[Kernel, Binary]:
    """Binaries of kernels, from the cache where they are there.

    Args:
        wanted: Kernels that `arch` has the features for.
        arch: `sm_90a`, for example.
        cache_dir: Where binaries are kept, each under its digest.
        compilers: Which compilers' binaries to take; those installed here where None. Of other
            compilers, only what is in the cache can be had.
        jobs: Processes that compile; one for each core where None.
        advance: Called with the number of kernels done since the last call.

    Raises:
        MissingExtraError: A compiler is not installed.
        StageError: A kernel does not compile, with the compiler's words.
    """
    distinct = list(dict.fromkeys(wanted))
    named = {kernel: digest(kernel, arch, compilers) for kernel in distinct}
    found = {
        kernel: stored
        for kernel, name in named.items()
        if (stored := _read(_place(name, cache_dir)))
    }
    missing = [kernel for kernel in distinct if kernel not in found]
    advance(len(found))
    if not missing:
        return found
    if compilers is not None and compilers != installed():
        raise IncompatibleError(
            f"{len(missing)} of {len(distinct)} kernels are not in {str(cache_dir)!r}, the first "
            f"{missing[0].entry!r} of {missing[0].source}, and {compilers} is not what is here",
            hint="compile them again where those compilers are: `lingc bench-ops --compile DIR`",
        )
    workers = min(jobs or len(os.sched_getaffinity(0)), len(missing))
    with closing(_compiled(missing, arch, workers)) as made:
        for kernel, binary in made:
            _write(_place(named[kernel], cache_dir), binary)
            found[kernel] = binary
            advance(1)
    return {kernel: found[kernel] for kernel in distinct}


def _compiled(
    missing: list[Kernel], arch: str, workers: int
) -> Generator[tuple[Kernel, Binary], None, None]:
    if workers <= 1:
        for kernel in missing:
            yield kernel, compile_kernel(kernel, arch)
        return
    # Those that take longest first; each is handed on when it is done, so that an interrupted
    # build has kept it.
    ordered = sorted(missing, key=lambda kernel: kernel.language != "triton")
    pool = ProcessPoolExecutor(workers)
    try:
        jobs = {pool.submit(compile_kernel, kernel, arch): kernel for kernel in ordered}
        for done in as_completed(jobs):
            yield jobs[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def compile_kernel(kernel: Kernel, arch: str) -> Binary:
    """One kernel for one architecture, always compiled anew.

    Raises:
        MissingExtraError: The compiler is not installed.
        StageError: It does not compile, or the architecture lacks a feature.
    """
    lacking = missing_features(kernel, arch)
    if lacking:
        raise StageError(
            f"kernel {kernel.entry!r} of {kernel.source} needs {', '.join(lacking)}, "
            f"which {arch} has not",
            hint="choose a tactic without it, or another target",
        )
    return _nvrtc(kernel, arch) if kernel.language == "cuda" else _triton(kernel, arch)


# ------------------------------------------------------------------------------------------- name


@dataclass(frozen=True, slots=True)
class _Identity:
    """All that a binary's bytes depend on."""

    format: int
    kernel: Mapping[str, Any]
    arch: str
    compiler: str
    options: list[str]
    sources: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Compilers:
    """Versions of what compiles kernels."""

    nvrtc: str
    triton: str

    def __str__(self) -> str:
        return f"nvrtc {self.nvrtc} with triton {self.triton}"


def installed() -> Compilers:
    """The compilers here.

    Raises:
        MissingExtraError: There are none.
    """
    return Compilers(nvrtc=nvrtc_version(), triton=triton_version())


def read_compilers(folder: Path) -> Compilers:
    """Which compilers made the binaries in a folder.

    Raises:
        InputError: The folder does not say.
    """
    try:
        said = json.loads((folder / _COMPILERS).read_text(encoding="utf-8"))
        return Compilers(nvrtc=str(said["nvrtc"]), triton=str(said["triton"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(folder)!r} holds no compiled kernels ({error})",
            hint="make it with `lingc bench-ops --compile DIR`",
        ) from error


def write_compilers(folder: Path) -> None:
    """Say in a folder of binaries which compilers made them: those here."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(installed()), sort_keys=True) + "\n"
    (folder / _COMPILERS).write_text(text, encoding="utf-8")


def digest(kernel: Kernel, arch: str, compilers: Compilers | None = None) -> str:
    """The name of a binary: a SHA-256 over everything that it is made of."""
    if kernel.language == "cuda":
        version = nvrtc_version() if compilers is None else compilers.nvrtc
        compiler, options = f"nvrtc {version}", list(CUDA_OPTIONS)
        sources = tuple((name, _hash(text)) for name, text in cuda_sources(kernel.source).items())
    else:
        version = triton_version() if compilers is None else compilers.triton
        compiler = f"triton {version}"
        options = [f"{key}={value}" for key, value in TRITON_OPTIONS.items()]
        modules = triton_sources(kernel.source.partition(":")[0])
        sources = tuple((name, _hash(text)) for name, text in modules.items())
    identity = _Identity(_FORMAT, asdict(kernel), arch, compiler, options, sources)
    text = json.dumps(asdict(identity), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def triton_sources(module: str) -> Mapping[str, str]:
    """A module of Triton kernels and every such module that it imports, by name."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        full = waiting.pop()
        if full in found:
            continue
        package, _, name = full.rpartition(".")
        found[full] = (resources.files(package) / f"{name}.py").read_text(encoding="utf-8")
        waiting += _IMPORT.findall(found[full])
    return found


@cache
def cuda_sources(source: str) -> Mapping[str, str]:
    """A CUDA file below the package and every header it includes, by name."""
    found: dict[str, str] = {}
    folder, _, first = source.rpartition("/")
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = resources.files("lingc").joinpath(*folder.split("/"), name)
        found[name] = path.read_text(encoding="utf-8")
        waiting += _INCLUDE.findall(found[name])
    return found


# -------------------------------------------------------------------------------------- compilers


@cache
def nvrtc_version() -> str:
    nvrtc = _import("cuda.bindings.nvrtc")
    result, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, result)
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:  # the patch level, which the library does not tell
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return f"{major}.{minor}"


@cache
def triton_version() -> str:
    return str(_import("triton").__version__)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name.partition('.')[0]} is not installed, which compiles kernels",
            hint="pip install 'lingc[build,cuda]'",
        ) from error


def _nvrtc(kernel: Kernel, arch: str) -> Binary:
    nvrtc = _import("cuda.bindings.nvrtc")
    sources = dict(cuda_sources(kernel.source))
    name = kernel.source.rpartition("/")[2]
    text = sources.pop(name)
    options = [*CUDA_OPTIONS, f"--gpu-architecture={arch}"]
    options += [f"-D{key}={value}" for key, value in kernel.constants]
    result, program = nvrtc.nvrtcCreateProgram(
        text.encode(), name.encode(), len(sources),
        [body.encode() for body in sources.values()], [key.encode() for key in sources],
    )  # fmt: skip
    _check(nvrtc, result)
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise StageError(
                f"{kernel.source} does not compile for {arch} with "
                f"{dict(kernel.constants)}:\n{_log(nvrtc, program)}",
                hint="a fault of lingc; please report it",
            )
        result, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, result)
        code = bytes(size)
        (result,) = nvrtc.nvrtcGetCUBIN(program, code)
        _check(nvrtc, result)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Binary(
        name=digest(kernel, arch),
        arch=arch,
        code=code,
        entry=kernel.entry,
        arguments=kernel.arguments,
        hidden=0,
        threads=32 * kernel.warps,
        shared_bytes=kernel.shared_bytes,
    )


def _log(nvrtc: Any, program: Any) -> str:
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0\n").decode(errors="replace")


def _check(nvrtc: Any, result: Any) -> None:
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise StageError(f"nvrtc answered {result.name}", hint="is nvidia-cuda-nvrtc whole?")


_LINE_INFO = "TRITON_DISABLE_LINE_INFO"


def _triton(kernel: Kernel, arch: str) -> Binary:
    triton = _import("triton")
    compiler = _import("triton.compiler")
    backends = _import("triton.backends.compiler")
    module, _, name = kernel.source.partition(":")
    function = getattr(importlib.import_module(module), name)
    constants = dict(kernel.constants)
    signature = {key: kind.partition(":")[0] for key, kind in kernel.arguments}
    signature = {key: _TRITON_TYPE.get(kind, kind) for key, kind in signature.items()}
    order = {key: i for i, key in enumerate(function.arg_names)}
    aligned = {
        (order[key],): [["tt.divisibility", 16]]
        for key, kind in kernel.arguments
        if kind.startswith("*") or kind.endswith(":16")
    }
    source = compiler.ASTSource(
        function, {**signature, **dict.fromkeys(constants, "constexpr")}, constants, aligned
    )
    number = int(re.sub(r"\D", "", arch))
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, **TRITON_OPTIONS}
    with _without_line_info():
        try:
            made = triton.compile(
                source, target=backends.GPUTarget("cuda", number, 32), options=options
            )
        except (_import("triton.errors").TritonError, RuntimeError) as error:
            raise StageError(
                f"{kernel.source} does not compile for {arch} with {constants}: {error}",
                hint="a fault of lingc; please report it",
            ) from error
    data = made.metadata
    if data.global_scratch_size or data.profile_scratch_size:
        raise StageError(
            f"{kernel.source} wants {data.global_scratch_size} bytes of scratch from its launcher",
            hint="a fault of lingc; please report it",
        )
    ordered = sorted(kernel.arguments, key=lambda argument: order[argument[0]])
    if tuple(ordered) != kernel.arguments:
        raise StageError(
            f"{kernel.source}: its arguments are {[key for key, _ in ordered]} in order, not "
            f"{[key for key, _ in kernel.arguments]}",
            hint="a fault of lingc; please report it",
        )
    return Binary(
        name=digest(kernel, arch),
        arch=arch,
        code=made.asm["cubin"],
        entry=data.name,
        arguments=kernel.arguments,
        hidden=_hidden_pointers(made.asm["ptx"], data.name, len(kernel.arguments)),
        threads=32 * data.num_warps,
        shared_bytes=data.shared,
    )


_TRITON_TYPE = {"*f32": "*fp32", "*f8e4m3": "*fp8e4nv", "f32": "fp32"}


def _hidden_pointers(ptx: str, entry: str, declared: int) -> int:
    """Trailing pointers that Triton adds to the declared arguments (scratch); passed as null."""
    match = re.search(rf"\.entry {re.escape(entry)}\s*\(([^)]*)\)", ptx)
    assert match is not None, f"Triton's PTX has no entry {entry}"
    return match[1].count(".param") - declared


class _without_line_info:  # noqa: N801 (reads as what it does)
    """Line information would write the source's path into the binary."""

    def __enter__(self) -> None:
        self._before = os.environ.get(_LINE_INFO)
        os.environ[_LINE_INFO] = "1"

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del os.environ[_LINE_INFO]
        else:
            os.environ[_LINE_INFO] = self._before


# ------------------------------------------------------------------------------------------ cache


def _place(name: str, cache_dir: Path) -> Path:
    return cache_dir / "kernels" / name[:2] / name


def _read(place: Path) -> Binary | None:
    """The cached binary, or None where there is none or it is not whole."""
    try:
        return Binary.from_bytes(place.read_bytes())
    except (OSError, ValueError):
        return None


def _write(place: Path, binary: Binary) -> None:
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        part.write_bytes(binary.to_bytes())
        part.replace(place)
