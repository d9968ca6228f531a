"""What only values show: scales that are not positive, vectors that are not finite."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from lingc.checkpoint.layout import Entry
from lingc.checkpoint.listing import of_tensors
from lingc.checkpoint.tensorfile import Maps, Stored
from lingc.quantize.formats import F32, U16, widen_bf16


def value_faults(entries: Iterable[Entry], maps: Maps) -> list[str]:
    """Every fault among scales, stored shapes and vectors; no matrix is read."""
    found: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        for fault in _faults(entry, maps):
            found[fault].append(entry.name)
    return [line for fault, names in found.items() for line in of_tensors(names, fault)]


def input_scale(stored: Stored, maps: Maps) -> float:
    """The one number of a scale of inputs."""
    values = maps.read(stored).reshape(-1)
    return float((widen_bf16(values) if stored.dtype == "BF16" else values)[0])


def _faults(entry: Entry, maps: Maps) -> Iterator[str]:
    if entry.input_scale is not None:
        scale = input_scale(entry.input_scale, maps)
        if not (np.isfinite(scale) and scale > 0):
            yield f"has an 'input_scale' of {scale}, which is no positive number"
    if entry.kind == "plain":
        if len(entry.shape) == 1 and not np.isfinite(_wide(entry, maps)).all():
            yield "has a value that is NaN or infinite"
        return
    if entry.kind in ("fp8_block", "fp8_tensor"):
        scales: F32 = maps.read(entry.parts[1])
        if not (np.isfinite(scales) & (scales > 0)).all():
            yield from _bad_scale(scales)
        return
    bits: U16 = maps.read(entry.parts[1])
    # 1 .. 0x7F7F are the positive finite BF16 values; 0 wraps to the top.
    if (bits - np.uint16(1) >= 0x7F7F).any():
        yield from _bad_scale(widen_bf16(bits))
    shape = maps.read(entry.parts[2]).tolist()
    if shape != list(entry.shape):
        yield f"has a 'weight_shape' that says {shape}, {list(entry.shape)} is due"


def _bad_scale(scales: F32) -> Iterator[str]:
    if np.isnan(scales).any():
        yield "has a scale that is NaN"
    if np.isinf(scales).any():
        yield "has a scale that is infinite"
    if (scales <= 0).any():
        yield "has a scale that is zero or negative"


def _wide(entry: Entry, maps: Maps) -> F32:
    values = maps.read(entry.parts[0])
    return widen_bf16(values) if entry.parts[0].dtype == "BF16" else values
