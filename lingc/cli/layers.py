"""What `lingc inspect --layers` shows of a TensorRT engine: the layers that TensorRT made of it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingc.cli.output import Output, bytes_text
from lingc.engine.choosing import choose
from lingc.engine.contents import read_listed, variant_info
from lingc.engine.reading import package_root, read_manifest
from lingc.errors import IncompatibleError, IntegrityError, UsageError
from lingc.runtime.cuda_code import TABLE_BYTES, unpacked

_LAYER = re.compile(r"^layers\.\d+\.")
_SERIAL = re.compile(r"\.\d+(?=$|\.|/)")


@dataclass(frozen=True, slots=True)
class Layers:
    """What the build of an engine said of its layers.

    Attributes:
        phases: Phase -> its layers and its memory, of those whose log could be read.
        faults: Phase -> what was made otherwise than was meant, or cannot be told, in sentences.
    """

    phases: Mapping[str, Any]
    faults: Mapping[str, Sequence[str]]


def read(path: Path, target: str | None = None) -> Layers:
    """The report of a package. Nothing else is read.

    Raises:
        IncompatibleError: It is no TensorRT engine.
        IntegrityError: The report is not what was written.
        UsageError: It has no code for that target.
    """
    manifest, root = read_manifest(path), package_root(path)
    target = choose(manifest, None, target)
    variant = manifest.variants[target]
    if variant.engine != "tensorrt":
        raise IncompatibleError(
            f"{str(path)!r} is an engine of kind {variant.engine!r}, which TensorRT did not build",
            hint="`lingc inspect --plan` shows what it computes, `--schedule` what a CUDA engine "
            "launches",
        )
    try:
        info = variant_info(root, manifest, target)
        name = info["report"]
        entry = manifest.files[f"variants/{target}/{name}"]
        value = json.loads(unpacked(read_listed(root, entry), name, TABLE_BYTES))
        faults = {phase: [*map(str, told)] for phase, told in info.get("faults", {}).items()}
        return Layers(value["phases"], faults)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the layers of {str(path)!r} cannot be read: {error}",
            hint="`lingc verify` lists everything that is wrong",
        ) from error


def show(out: Output, path: Path, phase: str, target: str | None = None) -> None:
    """Print the layers of one phase, alike ones once.

    Raises:
        UsageError: The engine has no such phase.
    """
    found = read(path, target)
    faults = found.faults.get(phase, ())
    if phase not in found.phases and not (faults and out.as_json):
        raise UsageError(
            f"{str(path)!r} has no layers of a {phase!r} engine",
            hint=next(iter(faults), f"it has those of: {', '.join(found.phases) or 'none'}"),
        )
    if out.as_json:
        out.emit({"path": str(path), "phases": found.phases, "faults": found.faults})
        return
    report = found.phases[phase]
    plugins = sum(bool(layer["op"]) for layer in report["layers"])
    out.table(
        (phase, ""),
        [
            ("layers", f"{len(report['layers'])}, of which {plugins} plugins"),
            ("activations", bytes_text(report["activation_bytes"])),
            ("weights inside", bytes_text(report["weight_bytes"])),
            ("scratch", bytes_text(report["scratch_bytes"])),
        ],
    )
    out.table(("count", "kind", "made of", "inputs", "constants"), list(folded(report)))
    if faults:
        out.table(("made otherwise than was meant",), [(one,) for one in faults])


def folded(report: Mapping[str, Any]) -> Iterator[tuple[int, str, str, str, str]]:
    """Layers that are alike but for their number, with how many there are, in order."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for layer in report["layers"]:
        # TensorRT lists what it fused in no order of its own.
        made_of = layer["op"] or ", ".join(sorted({*map(_plain, layer["origins"])}))
        key = (
            "plugin" if layer["op"] else layer["kind"],
            made_of,
            _types(layer["inputs"]),
            _types(layer["constants"]),
        )
        counts[key] = counts.get(key, 0) + 1
    for (kind, made_of, inputs, constants), count in counts.items():
        yield count, kind, made_of, inputs, constants


def _plain(origin: str) -> str:
    """`linear` of `layers.3.linear.1`."""
    return _SERIAL.sub("", _LAYER.sub("", origin))


def _types(operands: list[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({one["dtype"] for one in operands}))
