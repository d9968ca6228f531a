"""One safetensors file: a header read with suspicion, tensors by memory map, a writer.

    u64 header length | header, JSON: name -> dtype, shape, data_offsets | tensors without gaps

A file comes from outside, so nothing in its header is believed before it is checked: the length,
the JSON, every key, that each tensor has the bytes its shape needs, and that the tensors cover the
rest of the file once and wholly.
"""

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from lingc import strict_json
from lingc.errors import CheckpointError

HEADER_LIMIT_BYTES = 100_000_000
"""As in the safetensors library."""

ALIGNMENT_BYTES = 64
"""Where a written file's first tensor starts, a multiple of this; see `TensorWriter`."""

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(np.uint8), "F8_E5M2": np.dtype(np.uint8),
    "U16": np.dtype("<u2"), "I16": np.dtype("<i2"), "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}  # fmt: skip
"""Tag in the file -> what NumPy holds it as. BF16 and FP8 are held as bits."""

TAGS: Mapping[str, str] = {
    "f64": "F64", "f32": "F32", "bf16": "BF16", "f8e4m3": "F8_E4M3",
    "i64": "I64", "i32": "I32", "u8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Element type in a plan -> tag."""

_MAX_RANK = 16
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where one tensor is.

    Attributes:
        dtype: A key of `DTYPES`.
        offset_bytes: From the start of the file.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    length_bytes: int


# ---------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file, by name, in file order.

    Raises:
        CheckpointError: The file cannot be read, or is not a whole and sound safetensors file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length_bytes = _header_length(path, file.read(8), file_bytes)
            text = file.read(length_bytes)
    except OSError as error:
        raise _unreadable(path, error) from error
    tensors = _parse(path, text)
    _check_cover(path, tensors, 8 + length_bytes, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def read_note(path: Path, key: str) -> Any:
    """What a file says of itself, JSON under a key of its metadata.

    Raises:
        OSError: It cannot be read.
        SafetensorError: It is not a safetensors file.
        ValueError: It is a directory, it has no such key, or the value is no JSON.
    """
    if path.is_dir():
        raise ValueError("it is a directory")
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    if key not in metadata:
        raise ValueError(f"it is safetensors of another kind, without {key!r} in its metadata")
    return json.loads(metadata[key])


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path.name!r} cannot be read: {error.strerror or error}")


def _header_length(path: Path, head: bytes, file_bytes: int) -> int:
    if len(head) < 8:
        raise CheckpointError(
            f"{path.name!r} is truncated: it has {file_bytes} bytes, a header length alone takes 8"
        )
    (length_bytes,) = struct.unpack("<Q", head)
    if length_bytes > HEADER_LIMIT_BYTES:
        raise CheckpointError(
            f"{path.name!r} is not a safetensors file: it announces a header of {length_bytes} "
            f"bytes, more than the {HEADER_LIMIT_BYTES} that are allowed"
        )
    if 8 + length_bytes > file_bytes:
        raise CheckpointError(
            f"{path.name!r} is truncated: its header ends at byte {8 + length_bytes}, "
            f"it has {file_bytes} bytes"
        )
    return int(length_bytes)


def _parse(path: Path, text: bytes) -> list[Stored]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path.name!r} has a broken header: it does not start with '{{'")
    try:
        header = strict_json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name!r} has a broken header: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path.name!r} has a broken header: __metadata__ is not all text")
    base_bytes = 8 + len(text)
    tensors = [_tensor(path, base_bytes, name, entry) for name, entry in header.items()]
    return sorted(tensors, key=lambda tensor: (tensor.offset_bytes, tensor.length_bytes))


def _tensor(path: Path, base_bytes: int, name: str, entry: object) -> Stored:
    where = f"tensor {name!r} of {path.name!r}"
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise CheckpointError(f"{where} has a broken header entry: {entry!r:.200}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r:.200}")
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has the shape {shape!r:.200}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has the data_offsets {offsets!r:.200}")
    length_bytes = offsets[1] - offsets[0]
    needed_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if length_bytes != needed_bytes:
        raise CheckpointError(
            f"{where}, {dtype} {shape}, needs {needed_bytes} bytes; its header entry gives it "
            f"{length_bytes}"
        )
    return Stored(
        path=path,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        offset_bytes=base_bytes + offsets[0],
        length_bytes=length_bytes,
    )


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and len(values) <= _MAX_RANK and all(map(_is_count, values))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _check_cover(path: Path, tensors: Sequence[Stored], end: int, file_bytes: int) -> None:
    """Refuse tensors that overlap, leave a hole, or end elsewhere than the file does."""
    for tensor in tensors:
        if tensor.offset_bytes != end:
            how = "overlaps the one before it" if tensor.offset_bytes < end else "leaves a hole"
            raise CheckpointError(
                f"tensor {tensor.name!r} of {path.name!r} {how}: it starts at byte "
                f"{tensor.offset_bytes}, due is {end}"
            )
        end += tensor.length_bytes
    if end != file_bytes:
        how = "is truncated" if end > file_bytes else "has bytes that no tensor owns"
        raise CheckpointError(
            f"{path.name!r} {how}: its tensors end at byte {end}, it has {file_bytes} bytes"
        )


class Maps:
    """Memory maps of files, each opened on first use and kept."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, tensor: Stored) -> NDArray[Any]:
        """A read-only view of a tensor; its bytes are read as they are touched.

        Raises:
            CheckpointError: The file is gone, or may not be read any more.
        """
        if tensor.path not in self._maps:
            try:
                with tensor.path.open("rb") as file:
                    self._maps[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise _unreadable(tensor.path, error) from error
        flat = np.frombuffer(
            self._maps[tensor.path],
            DTYPES[tensor.dtype],
            math.prod(tensor.shape),
            tensor.offset_bytes,
        )
        return flat.reshape(tensor.shape)


# ---------------------------------------------------------------------------------------- writing


class TensorWriter:
    """Writes one file; where each tensor goes is settled before the first value is known.

    The same tensors give the same bytes, whatever the order in which they are written. The first
    tensor starts at a multiple of 64 bytes, and so does each whose length is such a multiple: they
    come first. The others follow, wide elements first, each aligned to its element.

    Args:
        path: Must not exist.
        tensors: Name -> dtype (a key of `DTYPES`) and shape.
        metadata: The header's `__metadata__`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._places, header = _place(tensors, metadata or {})
        self._left = {name: end - start for name, (start, end) in self._places.items()}
        self._itemsize = {name: DTYPES[dtype].itemsize for name, (dtype, _) in tensors.items()}
        self._file: BufferedWriter = path.open("xb")
        self._file.write(header)

    def write(self, name: str, values: NDArray[Any], *, at_bytes: int = 0) -> None:
        """Write a tensor, or the part of it that starts `at_bytes` into it."""
        start, end = self._places[name]
        assert values.itemsize == self._itemsize[name], f"{name!r} is given as {values.dtype}"
        assert start + at_bytes + values.nbytes <= end, f"{name!r} is longer than announced"
        self._file.seek(start + at_bytes)
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._left[name] -= values.nbytes

    def finish(self) -> None:
        """Bring the file to the disk; every tensor must have been written."""
        unwritten = [name for name, left_bytes in self._left.items() if left_bytes]
        assert not unwritten, f"{unwritten} are not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _place(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Start and end of each tensor from the start of the file, and the file's head."""

    def order(name: str) -> tuple[bool, int, str]:
        dtype, shape = tensors[name]
        length_bytes = tensor_bytes(dtype, shape)
        return length_bytes % ALIGNMENT_BYTES != 0, -DTYPES[dtype].itemsize, name

    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(tensors, key=order):
        dtype, shape = tensors[name]
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    text += " " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    head = struct.pack("<Q", len(text)) + text.encode("ascii")
    ends = {name: header[name]["data_offsets"] for name in tensors}
    return {name: (len(head) + a, len(head) + b) for name, (a, b) in ends.items()}, head


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """How many bytes a tensor takes in a file."""
    return math.prod(shape) * DTYPES[dtype].itemsize
