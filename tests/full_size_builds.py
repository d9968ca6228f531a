"""What a build of the full-size engines takes, cold and warm; no GPU is needed.

    python -m tests.full_size_builds [TARGET,... [PRECISION,...]]

prints a table in Markdown. Each build is a process of its own, in a folder of its own; the first of
a pair begins with an empty cache, the second has what the first kept.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from click import echo

from lingc.engine import open_package

ROOT = Path(__file__).parents[1]
FULL = ROOT / "artifacts" / "checkpoints" / "ling-2.6-flash"
TARGETS = ("h20", "h20-3e", "h100-sxm", "h200-sxm")
PRECISIONS = ("fp8", "int4-fp8", "bf16")
_MEASURE = """
import resource, sys
from lingc.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build.

    Attributes:
        wall: Seconds.
        busy: Processor seconds, of the processes that compile too.
        peak_bytes: Resident memory, of the building process at its most, and of the largest that
            compiles, as often as there are cores: more than all together ever take.
        bytes: Of the package.
        kernels: In it.
    """

    bundle_id: str
    wall: float
    busy: float
    peak_bytes: int
    bytes: int
    kernels: int


def build(folder: Path, cache: Path, target: str, precision: str) -> Build:
    """Build the full-size engine without weights in a new folder."""
    folder.mkdir(parents=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = ["build", str(FULL), "--target", target, "--precision", precision,
             "--weights", "external", "-o", "x.ling", "--json", "--progress", "none"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *words],
        check=True,
        cwd=folder,
        env={**os.environ, "LINGC_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own, largest = map(int, done.stdout.split()[-2:])
    package = open_package(folder / "x.ling", level="integrity")
    return Build(
        bundle_id=package.manifest.bundle_id,
        wall=time.perf_counter() - started,
        busy=after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        peak_bytes=1024 * (own + len(os.sched_getaffinity(0)) * largest),
        bytes=sum(entry.size for entry in package.manifest.files.values()),
        kernels=len(package.names("kernel")),
    )


def pair(target: str, precision: str, folder: Path) -> tuple[Build, Build]:
    """A cold build and a warm one."""
    cache = folder / "cache"
    cold = build(folder / "cold" / "here", cache, target, precision)
    return cold, build(folder / "warm" / "somewhere else", cache, target, precision)


def main() -> None:
    """Print the table, a row as it is measured."""
    asked = [word.split(",") for word in sys.argv[1:]]
    targets = asked[0] if asked else TARGETS
    precisions = asked[1] if len(asked) > 1 else PRECISIONS
    echo("| target | precision | cold, s | warm, s | peak, MB | kernels | package, MB | digest |")
    echo("|---|---|---|---|---|---|---|---|")
    for target in targets:
        for precision in precisions:
            with tempfile.TemporaryDirectory(prefix="lingc-builds-") as folder:
                cold, warm = pair(target, precision, Path(folder))
            digest = cold.bundle_id[:12]
            if warm.bundle_id != cold.bundle_id:
                digest += f" and {warm.bundle_id[:12]}: NOT THE SAME"
            echo(
                f"| {target} | {precision} | {cold.wall:.0f} ({cold.busy:.0f}) | {warm.wall:.1f} "
                f"({warm.busy:.1f}) | {max(cold.peak_bytes, warm.peak_bytes) / 1e6:.0f} | "
                f"{cold.kernels} | {cold.bytes / 1e6:.2f} | {digest} |"
            )


if __name__ == "__main__":
    main()
