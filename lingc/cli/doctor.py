"""`lingc doctor`: what this machine is, has, and could build and run."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import click

import lingc
from lingc import targets
from lingc.cli import output
from lingc.cli.failure import cache_dir, versions
from lingc.cli.output import Output, bytes_text
from lingc.cli.targets import is_buildable
from lingc.engine.machine import Gpu, this_machine
from lingc.targets.spec import EngineKind, Target

BUILD_EXTRAS: Mapping[EngineKind, tuple[str, ...]] = {
    "onnx": ("build", "onnx"),
    "cuda": ("build", "cuda"),
    "tensorrt": ("build", "tensorrt"),
}
"""Extras without which an engine kind cannot be built."""

RUN_PACKAGES: Mapping[EngineKind, tuple[str, ...]] = {
    "onnx": ("onnxruntime",),
    "cuda": ("cuda-bindings",),
    "tensorrt": ("cuda-bindings", "tensorrt-rtx-cu13"),
}
"""Packages that run an engine kind; TensorRT is the default of the targets of its RTX flavour."""

CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "sha_ni",
)  # fmt: skip
"""Flags that change how fast an engine runs or a package verifies, of those Linux reports."""

_ROOT = Path(lingc.__file__).parents[1]


@click.command()
@output.options
def command(out: Output) -> None:
    """Describe this machine and what it can build and run; paste it into a bug report.

    Nothing heavy is imported and no GPU is touched: versions are read from what is installed, the
    driver from what it reports of itself. The exit code is 0 whatever is found. In the JSON form,
    `no_build` and `no_run` of a target say what is in the way, or null where nothing is.

    \b
    Examples:
      lingc doctor
      lingc doctor --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    machine = {
        "lingc": {"version": lingc.__version__, "commit": _commit(), "path": str(_ROOT)},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "cache": _cache(),
        "nvidia": _nvidia(),
    }
    libraries = versions()
    extras = _extras()
    ways = {
        target.name: {"no_build": _no_build(target, extras), "no_run": _no_run(target)}
        for target in targets.ALL.values()
    }
    if out.as_json:
        out.emit({**machine, "libraries": libraries, "lacking": extras, "targets": ways})
        return
    out.table(("this machine", ""), [(name, _phrase(fact)) for name, fact in machine.items()])
    out.table(("library", "version"), [(name, has or "absent") for name, has in libraries.items()])
    states = [(name, f"lacks {', '.join(no)}" if no else "complete") for name, no in extras.items()]
    out.table(("extra", "state"), states)
    out.table(
        ("target", "build here", "run here"),
        [
            (name, *(f"no: {why}" if why else "yes" for why in no.values()))
            for name, no in ways.items()
        ],
    )


def _phrase(value: object) -> str:
    """A small document on one line."""
    if not isinstance(value, Mapping):
        return "none found" if value is None else str(value)
    parts = []
    for key, part in value.items():
        if part is None or part == []:
            continue
        if isinstance(part, int) and str(key).endswith("_bytes"):
            parts.append(f"{bytes_text(part)} {str(key).removesuffix('_bytes')}")
        elif key in ("version", "model", "driver"):
            parts.append(str(part))
        elif isinstance(part, list):
            parts.append(" ".join(map(str, part)))
        else:
            parts.append(f"{key} {part}")
    return ", ".join(parts)


def _extras() -> dict[str, list[str]]:
    """What each extra of this installation lacks."""
    lacks: dict[str, list[str]] = {}
    for extra, names in _declared_extras().items():
        lacks[extra] = [name for name in names if _version(name) is None]
    return lacks


def _declared_extras() -> dict[str, list[str]]:
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        declared = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        optional: dict[str, list[str]] = declared["optional-dependencies"]
        return {extra: [_name(line) for line in lines] for extra, lines in optional.items()}
    found: dict[str, list[str]] = {}
    for line in metadata.requires("lingc") or ():
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        if extra is not None:
            found.setdefault(extra[1], []).append(_name(line))
    return found


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    assert found is not None, requirement
    return found[0]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout, with a plus where files differ from it."""
    git = shutil.which("git")
    if git is None or not (_ROOT / ".git").exists():
        return None
    answers = []
    for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno")):
        asked = (git, "-C", str(_ROOT), *words)
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
        if answer.returncode != 0:
            return None
        answers.append(answer.stdout.strip())
    commit, changes = answers
    return commit + ("+" if changes else "")


def _cpu() -> dict[str, object]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    words = frozenset(flags[1].split()) if flags else frozenset()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in CPU_FLAGS if flag in words],
    }


def _memory() -> dict[str, int] | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = dict(re.findall(r"^(\w+): *(\d+) kB$", text, re.MULTILINE))
    return {
        "total_bytes": int(sizes["MemTotal"]) * 1024,
        "available_bytes": int(sizes["MemAvailable"]) * 1024,
    }


def _cache() -> dict[str, object]:
    folder = cache_dir()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "path": str(folder),
        "free_bytes": shutil.disk_usage(there).free,
        "writable": os.access(there, os.W_OK),
    }


def _nvidia() -> dict[str, object] | None:
    """The driver and its GPUs, as the driver's own files name them."""
    home = Path("/proc/driver/nvidia")
    try:
        text = (home / "version").read_text(encoding="utf-8")
    except OSError:
        return None
    driver = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    models = []
    for card in sorted(home.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
        models.append(model[1].strip() if model else "unnamed GPU")
    return {"driver": driver[0] if driver else text.splitlines()[0], "gpus": models}


def _no_build(target: Target, extras: Mapping[str, list[str]]) -> str | None:
    """What is in the way of building the target's default engine kind, or None."""
    kind = target.default_engine
    if not is_buildable(kind):
        return f"this version builds no {kind} engines"
    lacking = [extra for extra in BUILD_EXTRAS[kind] if extras.get(extra, ["all of it"])]
    return f"pip install 'lingc[{','.join(lacking)}]'" if lacking else None


def _no_run(target: Target) -> str | None:
    """What is in the way of running the target's default engine kind, or None."""
    kind = target.default_engine
    lacking = [package for package in RUN_PACKAGES[kind] if not _version(package)]
    if lacking:
        return f"pip install {' '.join(lacking)}"
    if target.compute_capability is None:
        return None
    wanted, gpu = ".".join(map(str, target.compute_capability)), this_machine().gpu()
    if isinstance(gpu, Gpu) and gpu.capability == wanted:
        return None
    have = gpu if isinstance(gpu, str) else f"{gpu.name} has {gpu.capability}"
    return f"it needs a GPU of compute capability {wanted}: {have}"
