"""Which variant of a package a machine runs.

Variants for GPUs of one generation run on each other's, and are made for different ones: how many
multiprocessors a grid fills, how much memory there is. The one that was made for the nearest GPU is
taken, by what is known of targets.
"""

from collections.abc import Sequence

from lingc import targets
from lingc.engine.machine import Gpu, Machine
from lingc.engine.manifest import Manifest
from lingc.errors import UsageError


def choose(manifest: Manifest, machine: Machine | None, wanted: str | None = None) -> str:
    """The target of the variant to run.

    Args:
        manifest: Of the package.
        machine: What shall run it; where None, or where it has no GPU, the package's own target.
        wanted: The target that was asked for.

    Raises:
        UsageError: The package has no code for that target.
    """
    if wanted is not None:
        if wanted not in manifest.variants:
            raise UsageError(
                f"the package has no code for {wanted!r}",
                hint=f"it has code for: {', '.join(manifest.variants)}",
            )
        return wanted
    some = [name for name in manifest.variants if _generation(manifest, name) is not None]
    if len(some) < 2 or machine is None:
        return manifest.target
    gpu = machine.gpu()
    if isinstance(gpu, str):
        return manifest.target
    return nearest(
        some, gpu, [name for name in some if _generation(manifest, name) == gpu.capability]
    )


def nearest(names: Sequence[str], gpu: Gpu, alike: Sequence[str]) -> str:
    """Of targets the one whose GPU is most like this: generation, multiprocessors, then memory.

    Args:
        names: Of the targets; the first of those that are equally near is taken.
        gpu: What the machine has.
        alike: Those of its generation.
    """

    def apart(name: str) -> tuple[bool, int, int]:
        known = targets.ALL.get(name)
        sms = None if known is None else known.sms
        memory = None if known is None else known.memory_bytes
        return (
            name not in alike,
            1 << 30 if sms is None else abs(sms - gpu.sms),
            1 << 60 if memory is None else abs(memory - gpu.memory_bytes),
        )

    return min(names, key=apart)


def _generation(manifest: Manifest, name: str) -> str | None:
    """The compute capability that a variant needs; None where it needs no GPU."""
    needs = manifest.variants[name].runs_on.get("gpu")
    return None if needs is None else str(needs["capability"])
