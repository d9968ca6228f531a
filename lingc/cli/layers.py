"""What `lingc inspect --layers` shows of a TensorRT engine: the layers that TensorRT made of it."""

import json
import re
from collections.abc import Iterator, Mapping
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


def read(path: Path, target: str | None = None) -> Mapping[str, Any]:
    """The report of a package: phase -> its layers and its memory. Nothing else is read.

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
        name = variant_info(root, manifest, target)["report"]
        entry = manifest.files[f"variants/{target}/{name}"]
        value = json.loads(unpacked(read_listed(root, entry), name, TABLE_BYTES))
        found: Mapping[str, Any] = value["phases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"the layers of {str(path)!r} cannot be read: {error}",
            hint="`lingc verify` lists everything that is wrong",
        ) from error
    return found


def show(out: Output, path: Path, phase: str, target: str | None = None) -> None:
    """Print the layers of one phase, alike ones once.

    Raises:
        UsageError: The engine has no such phase.
    """
    phases = read(path, target)
    if phase not in phases:
        raise UsageError(
            f"{str(path)!r} has no layers of a {phase!r} engine",
            hint=f"it has those of: {', '.join(phases)}"
            if phases
            else "TensorRT's log could not be read when it was built, as the build said",
        )
    if out.as_json:
        out.emit({"path": str(path), "phases": phases})
        return
    report = phases[phase]
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
