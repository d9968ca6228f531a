"""From a package on disk to a backend: checked first, then read, then started.

Opening reads nothing but what was verified, and loads nothing native; only `start` imports the
backend of the engine's kind.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

from lingc.engine import Package, open_package
from lingc.engine.bind import with_weights
from lingc.errors import ConfigError, IncompatibleError, UsageError
from lingc.plan import Plan
from lingc.runtime import vectors
from lingc.runtime.backend import Array, Backend, Limits
from lingc.runtime.stopping import stop_ids
from lingc.runtime.tokenizer import FILES, Tokenizer
from lingc.runtime.vectors import VectorResult
from lingc.weights import Progress, open_weights

BACKENDS: Mapping[str, tuple[str, str]] = {
    "onnx": ("lingc.runtime.onnx_backend", "OnnxBackend"),
    "cuda": ("lingc.runtime.cuda_backend", "CudaBackend"),
    "tensorrt": ("lingc.runtime.tensorrt_backend", "TensorrtBackend"),
}
"""Engine kind -> module and class of its backend."""


class StartBackend(Protocol):
    """How the class of a backend is called."""

    def __call__(
        self,
        package: Package,
        weights: Mapping[str, Array],
        limits: Limits,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Backend: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedEngine:
    """A verified package and what can be known of it before it is started.

    Attributes:
        tokenizer: None where the checkpoint had none; the engine then runs on token ids.
        stop_ids: The checkpoint's end-of-turn tokens.
    """

    package: Package
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]

    @property
    def plan(self) -> Plan:
        return self.package.plan

    def start(
        self,
        limits: Limits,
        *,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Backend:
        """Load the code and the weights, and allocate state.

        Args:
            threads: Of the steps of an engine on a CPU, or those that load one on a GPU; its own
                choice where None.
            progress: Told of the weights that are loaded.

        Raises:
            IncompatibleError: There is no backend for the engine's kind, or not on this device.
            InputError: The weights are outside and were not bound.
            ResourceError: The device has not enough memory.
        """
        kind = self.package.code().engine
        if kind not in BACKENDS:
            raise IncompatibleError(
                f"{str(self.package.root)!r} is an engine of kind {kind!r}, "
                f"which this version cannot run",
                hint=f"it runs: {', '.join(BACKENDS)}",
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}, at least 1 is needed")
        weights = open_weights(self.package.shards())
        module, name = BACKENDS[kind]
        start = cast("StartBackend", getattr(importlib.import_module(module), name))
        return start(self.package, weights, limits, threads=threads, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """A started engine. Close it, or use it as a context, to free what it holds."""

    backend: Backend
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]

    @property
    def plan(self) -> Plan:
        return self.backend.plan

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_engine(
    path: str | Path,
    *,
    checkpoint: Path | None = None,
    cache_dir: Path | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> OpenedEngine:
    """Verify a package, and find its weights where they are outside.

    Args:
        path: The package.
        checkpoint: Whose weights to run with, for a package without weights; packed into
            `cache_dir` on first use.
        cache_dir: Where packed weights lie.
        target: Of the variant that shall run; the one for this machine's GPU where None.
        progress: Of packing.

    Raises:
        InputError: There is no package there, or a file of the checkpoint's cannot be read.
        IntegrityError: The package is not what was written.
        IncompatibleError: This version or machine cannot run it.
        UsageError: It has weights of its own and a checkpoint was given, or no cache was.
    """
    package = open_package(path, target=target)
    if cache_dir is not None:
        package = with_weights(
            package, cache_dir=cache_dir, checkpoint=checkpoint, progress=progress
        )
    elif checkpoint is not None:
        raise UsageError(
            "a checkpoint was given and no directory for its packed weights",
            hint="say where they shall lie: cache_dir",
        )
    files = {name: data for name in FILES if (data := package.model_file(name)) is not None}
    return OpenedEngine(
        package=package,
        tokenizer=Tokenizer(files) if "tokenizer.json" in files else None,
        stop_ids=stop_ids(_config(package, "generation_config.json"), package.plan.config),
    )


def load(
    path: str | Path,
    *,
    checkpoint: Path | None = None,
    cache_dir: Path | None = None,
    slots: int = 1,
    tokens: int = 4096,
    threads: int | None = None,
) -> LoadedEngine:
    """Open an engine and start it; see `open_engine` and `OpenedEngine.start`.

    Args:
        path: The package.
        checkpoint: Whose weights to run with, for a package without weights.
        cache_dir: Where packed weights lie.
        slots: Sequences at once.
        tokens: Room for each of them, prompt and completion.
        threads: For an engine on a CPU.
    """
    opened = open_engine(path, checkpoint=checkpoint, cache_dir=cache_dir)
    limits = Limits.from_tokens(
        slots=slots, tokens_per_sequence=tokens, page_size=opened.plan.page_size
    )
    return LoadedEngine(
        backend=opened.start(limits, threads=threads),
        tokenizer=opened.tokenizer,
        stop_ids=opened.stop_ids,
    )


def run_vectors(package: Package) -> list[VectorResult]:
    """Start the engine and hold it against the test vectors of its package.

    Returns:
        One result a case; none where the package has no vectors.
    """
    files = {
        name: package.read(f"tests/{name}")
        for name in (vectors.CASES, vectors.VECTORS)
        if f"tests/{name}" in package.manifest.files
    }
    if not files:
        return []
    cases = vectors.decode(files)
    limits = Limits.from_tokens(
        slots=1,
        tokens_per_sequence=vectors.tokens_needed(cases),
        page_size=package.plan.page_size,
    )
    opened = OpenedEngine(package=package, tokenizer=None, stop_ids=frozenset())
    backend = opened.start(limits)
    try:
        return [vectors.check(backend, case) for case in cases]
    finally:
        backend.close()


def _config(package: Package, name: str) -> Mapping[str, Any]:
    data = package.model_file(name)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is not a JSON object")
    return value
