"""What runs a TensorRT package without Python: engines, plugin tables and kernels as plain files.

    FOLDER/
      deploy.json             what to bind to each engine, and where its weights are
      engines/<phase>.engine
      plugins/<sha256>.json   the table that the engines' plugins launch from
      plugins/<sha256>.kernel what it launches
      source/                 the plugins in C++, to be compiled against the host's TensorRT
      libling_plugins.so      the same, compiled, where headers were given

Weights stay in the package: safetensors files, which hold them as they are bound.
"""

import hashlib
import importlib.resources
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lingc import plugin_table
from lingc.device import Binary
from lingc.engine import Package, canonical
from lingc.errors import IncompatibleError, IntegrityError, MissingExtraError, StageError
from lingc.plan import TensorType
from lingc.plugin_table import PluginTable
from lingc.runtime.tensorrt_package import HINT, TensorrtCode, read_code
from lingc.runtime.tensorrt_plugin import has_registered
from lingc.staging import Staging, writing

FORMAT = 1
"""Version of `deploy.json`."""

DESCRIPTION, ENGINES, PLUGINS, SOURCE = "deploy.json", "engines", "plugins", "source"
LIBRARY = "libling_plugins.so"
_WRITTEN = frozenset((DESCRIPTION, ENGINES, PLUGINS, SOURCE, LIBRARY))
COMPILER = "g++"
_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_HEADERS = ("NvInfer.h", "cuda_runtime_api.h")


def deploy(
    package: Package,
    folder: Path,
    *,
    includes: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Write what a program without Python needs, whole or not at all.

    Args:
        package: With a TensorRT variant as the one that was chosen.
        folder: Where it shall be.
        includes: Folders with the headers of TensorRT and CUDA, to compile the plugins with; they
            are left as source where none is given.
        overwrite: Replace what an earlier call left there.

    Returns:
        The folder.

    Raises:
        IncompatibleError: It is no TensorRT engine.
        IntegrityError: The package is not what was written.
        MissingExtraError: There is no compiler, or a header is in none of the folders.
        StageError: The compiler refuses.
        UsageError: Something is at `folder` that may not be replaced.
        ResourceError: The place cannot be written to.
    """
    kind = package.code().engine
    if kind != "tensorrt":
        raise IncompatibleError(
            f"{str(package.root)!r} is an engine of kind {kind!r}, which has no plugins to deploy",
            hint="`lingc build --engine tensorrt` makes one that has",
        )
    code = read_code(package)
    replaceable = _is_deployed if overwrite else None
    with Staging(folder, replaceable=replaceable) as staging, writing(staging.final):
        inside = staging.content
        (inside / ENGINES).mkdir()
        for phase, engine in code.engines.items():
            (inside / ENGINES / f"{phase}.engine").write_bytes(engine())
        write_bundle(inside / PLUGINS, code.table, code.digest, code.kernel)
        shutil.copytree(source(), inside / SOURCE)
        if includes:
            compile_plugins(inside / SOURCE, inside / LIBRARY, includes)
        described = description(package, code)
        (inside / DESCRIPTION).write_bytes(canonical.encode(described))
        staging.publish()
    return staging.final


def source() -> Path:
    """Where the C++ of the plugins is installed."""
    found = importlib.resources.files("lingc").joinpath("targets", "tensorrt", "cpp")
    assert isinstance(found, Path), "lingc is installed as files"
    return found


def write_bundle(
    folder: Path, table: PluginTable, digest: str, kernel: Callable[[int], Binary]
) -> None:
    """A table and its kernels as files of a folder, each named by its SHA-256.

    Args:
        folder: Made where it is not there.
        digest: Of the table, by which engines name it.
        kernel: A kernel by its number in the table.

    Raises:
        IntegrityError: One would have another, for the package spells it otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, digest, "json", canonical.encode(plugin_table.to_value(table)))
    for number, image in enumerate(table.images):
        _write(folder, image, "kernel", kernel(number).to_bytes())


def _write(folder: Path, digest: str, kind: str, data: bytes) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise IntegrityError(
            f"'{folder.name}/{digest[:12]}….{kind}' would have the SHA-256 {found[:12]}…", hint=HINT
        )
    (folder / f"{digest}.{kind}").write_bytes(data)


def compilation(sources: Path, library: Path, includes: Sequence[Path]) -> tuple[str, ...]:
    """The command that compiles the C++ plugins; docs/tensorrt.md has it for people."""
    folders = [word for folder in includes for word in ("-isystem", str(folder))]
    return (COMPILER, *_FLAGS, *folders, str(sources / "plugin.cpp"), "-o", str(library), "-ldl")


def compile_plugins(sources: Path, library: Path, includes: Sequence[Path]) -> None:
    """Compile the C++ plugins: some seconds.

    Raises:
        MissingExtraError: There is no compiler, or a header is in none of the folders.
        StageError: The compiler refuses, with its own words.
    """
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise MissingExtraError(
            f"the plugins are C++, and there is no {COMPILER} here to compile them",
            hint="apt install g++, version 11 or newer; or leave out --include, and compile them "
            "where they shall run: docs/tensorrt.md has the command",
        )
    for header in _HEADERS:
        if not any((folder / header).is_file() for folder in includes):
            looked = ", ".join(map(str, includes))
            raise MissingExtraError(
                f"{header!r} is in none of the folders to include: {looked}",
                hint="NvInfer.h comes with TensorRT's archive, or from github.com/NVIDIA/TensorRT, "
                "include/, of the installed version; cuda_runtime_api.h with CUDA, or with pip "
                "install nvidia-cuda-runtime nvidia-cuda-crt",
            )
    command = compilation(sources, library, includes)
    done = subprocess.run(  # noqa: S603
        (compiler, *command[1:]), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StageError(
            f"{COMPILER} does not compile the plugins: {done.stderr.strip()[:600]}",
            hint="they are for TensorRT 10.16, 11.x and TensorRT for RTX 1.7, and C++17",
        )


_LOADED: dict[str, frozenset[str]] = {}
"""By module, the tables of the library that it has: TensorRT's registry is one of the process, and
takes no second plugin of a name."""


def load_plugins(trt: Any, folder: Path, digest: str) -> None:
    """Have a deployed folder's library make the plugins of this process, in the place of Python's.

    It finds the tables in the same folder, unless the environment variable `LINGC_PLUGINS` names
    others. A process loads one library, once: a later call is served by it where it has the table.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        folder: That `deploy` wrote.
        digest: Of the table that the engines name.

    Raises:
        MissingExtraError: The plugins were not compiled.
        IncompatibleError: The folder is of another package, TensorRT does not take the library, or
            other plugins, C++ or Python's, were there before.
    """
    library = (folder / LIBRARY).resolve()  # a bare name is looked for among the system's
    if not library.is_file():
        raise MissingExtraError(
            f"{str(library)!r} is not there: the plugins were not compiled",
            hint="lingc deploy --include TENSORRT/include --include CUDA/include does",
        )
    named = [Path(one) for one in os.environ.get("LINGC_PLUGINS", "").split(":") if one]
    folders = named or [library.parent / PLUGINS]
    if not any((one / f"{digest}.json").is_file() for one in folders):
        raise IncompatibleError(
            f"the engines' plugins launch from table {digest[:12]}…, which is not in "
            f"{', '.join(map(repr, map(str, folders)))}",
            hint="take the folder that `lingc deploy` writes of this package",
        )
    loaded = _LOADED.get(trt.__name__)
    if loaded is not None:
        if digest in loaded:
            return
        raise IncompatibleError(
            f"this process has loaded C++ plugins before, without table {digest[:12]}…, and "
            "TensorRT takes one library of them",
            hint="run one of the engines in another process, or name the `plugins` folders of both "
            "in LINGC_PLUGINS, by a colon, before the first is loaded",
        )
    if has_registered(trt):
        raise IncompatibleError(
            "this process has Python's plugins, and TensorRT takes no others of the same names",
            hint="run the C++ plugins in a process that has not built or run an engine by Python's",
        )
    if trt.get_plugin_registry().load_library(str(library)) is None:
        raise IncompatibleError(
            f"TensorRT {trt.__version__} does not load {str(library)!r}",
            hint="its own log, above, says why; compile it against the headers of this version",
        )
    _LOADED[trt.__name__] = frozenset(path.stem for one in folders for path in one.glob("*.json"))


def description(package: Package, code: TensorrtCode) -> dict[str, Any]:
    """`deploy.json`: what to bind to each engine, in what shapes; letters are open sizes."""
    plan = code.plan
    phases = {}
    for phase, program in plan.programs.items():
        phases[phase] = {
            "engine": f"{ENGINES}/{phase}.engine",
            "inputs": {name: _type(program.types[name]) for name in program.inputs},
            "outputs": {
                role: {"name": name, **_type(program.types[name])}
                for role, name in program.outputs.items()
            },
            # Bound to the address of the state that it updates.
            "updates": {value: state for state, value in program.updates.items()},
            "states": list(program.states),
            "weights": [name for name in program.weights if name not in code.embedded],
            "sizes": [dict(one.sizes) for one in code.buckets if one.phase == phase],
        }
    return {
        "format": FORMAT,
        "target": code.target,
        "bundle_id": package.manifest.bundle_id,
        "library": {"module": code.module, "version": code.version},
        "page_size": plan.page_size,
        "plugins": PLUGINS,
        "table": code.digest,
        "phases": phases,
        "states": {name: _type(kind) for name, kind in plan.states.items()},
        "weights": {name: _type(spec.type) for name, spec in plan.weights.items()},
        "weight_files": list(package.names("weights")),
    }


def _type(kind: TensorType) -> dict[str, Any]:
    return {"dtype": kind.dtype, "shape": list(kind.shape)}


def _is_deployed(folder: Path) -> bool:
    """Whether a folder holds what `deploy` writes and nothing else that would be lost."""
    names = {path.name for path in folder.iterdir()}
    return not names or (DESCRIPTION in names and names <= _WRITTEN)
