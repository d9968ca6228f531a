"""What standard TensorRT measured of its kernels, kept from build to build.

With it, a build times only what is new, and equal measurements choose equal kernels. A build can be
held to them (`locked`), so that an engine that is built again changes in nothing that was measured.
Measurements are of one TensorRT on one kind of GPU: TensorRT refuses those of another.
"""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingc.engine import canonical
from lingc.errors import IncompatibleError, UsageError
from lingc.staging import refuse_unwritable, write_whole, writing

log = logging.getLogger("lingc")

ITERATIONS = 8
"""Runs that a kernel's time is the mean of; TensorRT's own default, 1, lets noise choose."""

OPTIMIZATION_LEVEL = 3
"""How long TensorRT looks for kernels, 0 to 5: its default, named so that it stays."""


@dataclass(slots=True)
class Timing:
    """Measurements, between a file and the configurations of engines.

    Attributes:
        path: The file that a user named, whose measurements are refused where they do not fit; or
            None, until `own` gives one of lingc's own, which is begun anew then.
        locked: Whether what was not measured before is refused rather than measured.
        data: What TensorRT wrote; empty for none yet.
    """

    path: Path | None = None
    locked: bool = False
    data: bytes = b""
    _is_own: bool = field(init=False, default=False)
    _cache: Any = field(init=False, default=None)

    @property
    def sha256(self) -> str:
        """Of what was measured."""
        return hashlib.sha256(self.data).hexdigest()

    def own(self, folder: Path | None, version: str, gpu: str, precision: str) -> None:
        """Where no file is named, take the one that lingc keeps for its next build.

        Args:
            folder: Of what lingc keeps; None where it keeps nothing.
            version: Of TensorRT.
            gpu: Name of the GPU.
            precision: Of the plan.
        """
        if self.path is None:
            self._is_own = True
            if folder is not None:
                parts = canonical.encode({"tensorrt": version, "gpu": gpu, "precision": precision})
                digest = hashlib.sha256(parts).hexdigest()
                self.path = folder / "timing" / f"{digest}.cache"

    def read(self) -> None:
        """Take what the file holds, if there is one.

        Raises:
            UsageError: There must be one, or it cannot be read.
            ResourceError: It cannot be written again after the build.
        """
        if self.path is None:
            return
        if self._is_own:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.locked:
            refuse_unwritable(self.path)
        try:
            self.data = self.path.read_bytes()
        except FileNotFoundError:
            self.data = b""
        except OSError as error:
            raise UsageError(
                f"measurements cannot be read from {str(self.path)!r}: {error.strerror}",
                hint="name a file for --timing-cache, there or not yet",
            ) from error
        if self.locked and not self.data:
            raise UsageError(
                f"--lock-tactics chooses by what was measured, and {str(self.path)!r} holds "
                "nothing",
                hint="build once without --lock-tactics: it writes the file",
            )

    def attach(self, trt: Any, config: Any) -> None:
        """Have an engine be chosen by these measurements, and add to them.

        Raises:
            IncompatibleError: They are of another TensorRT or another GPU.
        """
        config.builder_optimization_level = OPTIMIZATION_LEVEL
        config.avg_timing_iterations = ITERATIONS
        config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
        if self.locked:
            config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        if self._taken(config):
            return
        if not self._is_own:
            raise IncompatibleError(
                f"{str(self.path)!r} holds no measurements of TensorRT {trt.__version__} on this "
                "GPU",
                hint="they are of one TensorRT and one kind of GPU: name another file, or remove "
                "this one",
            )
        log.info("what TensorRT measured before is of another GPU or version: measured anew")
        self.data = b""
        self._taken(config)

    def keep(self) -> None:
        """Take what TensorRT has measured, when an engine is built."""
        if self._cache is not None:
            measured = self._cache.serialize()
            if measured is not None:  # as where a build failed
                self.data = bytes(measured)
            self._cache = None

    def write(self) -> None:
        """Write the file anew, whole or not at all.

        Raises:
            ResourceError: The place cannot be written to.
        """
        if self.path is None or self.locked or not self.data:
            return
        write_whole(self.path, self.data)

    def _taken(self, config: Any) -> bool:
        # TensorRT reads it until the engine is built.
        self._cache = config.create_timing_cache(self.data)
        return self._cache is not None and bool(config.set_timing_cache(self._cache, False))  # noqa: FBT003
