"""One safetensors file: what is written is read, and nothing unsound is believed."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lingc.checkpoint.tensorfile import HEADER_LIMIT_BYTES, Maps, TensorWriter, read_header
from lingc.errors import CheckpointError

DATA = bytes(range(24))
GOOD: Mapping[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
    "c": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [22, 24]},
}


def _bytes(header: str | bytes, data: bytes = DATA) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def _changed(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes})


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------- reading


def test_a_sound_file_is_read_where_its_tensors_are(tmp_path: Path) -> None:
    path = _write(tmp_path / "x", _bytes(json.dumps(GOOD)))

    tensors = read_header(path)

    base = path.stat().st_size - len(DATA)
    assert [(t.name, t.dtype, t.shape) for t in tensors.values()] == [
        ("a", "F32", (2, 2)),
        ("b", "BF16", (3,)),
        ("c", "F8_E4M3", (2,)),
    ]
    assert [(t.offset_bytes - base, t.length_bytes) for t in tensors.values()] == [
        (0, 16),
        (16, 6),
        (22, 2),
    ]


def test_tensors_are_found_by_their_offsets_whatever_the_order_of_the_header(
    tmp_path: Path,
) -> None:
    turned = json.dumps(dict(reversed(list(GOOD.items()))))

    tensors = read_header(_write(tmp_path / "x", _bytes(turned)))

    assert list(tensors) == ["a", "b", "c"]


def test_a_tensor_may_start_at_any_byte(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    header = '{"x":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    header += " " * (-len(header) % 8 + 3)

    found = read_header(_write(tmp_path / "x", _bytes(header, values.tobytes())))

    assert np.array_equal(Maps().read(found["x"]), values)


def test_a_mapped_tensor_cannot_be_written_to(tmp_path: Path) -> None:
    found = read_header(_write(tmp_path / "x", _bytes(json.dumps(GOOD))))

    assert not Maps().read(found["a"]).flags.writeable


BAD_HEADERS: Mapping[str, tuple[str | bytes, str]] = {
    "not JSON": ("{]", "broken header"),
    "not an object": ("[1, 2]", "does not start with"),
    "empty": ("", "does not start with"),
    "not UTF-8": (b'{"\xff": 1}', "broken header"),
    "nested without end": ("{" + '"a":[' * 5000, "broken header"),
    "number without end": ('{"a": ' + "9" * 5000 + "}", "broken header"),
    "key twice": ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
    "metadata not text": (_changed(__metadata__={"n": 1}), "__metadata__"),
    "metadata a list": (_changed(__metadata__=[]), "__metadata__"),
    "entry not an object": (_changed(a=7), "'a'.*broken header entry"),
    "entry without dtype": (
        _changed(a={"shape": [2, 2], "data_offsets": [0, 16]}),
        "'a'.*broken header entry",
    ),
    "entry with more": (_changed(a={**GOOD["a"], "x": 1}), "'a'.*broken header entry"),
    "unknown dtype": (_changed(a={**GOOD["a"], "dtype": "F31"}), "'a'.*unknown dtype 'F31'"),
    "dtype a list": (_changed(a={**GOOD["a"], "dtype": ["F32"]}), "'a'.*unknown dtype"),
    "negative size": (_changed(a={**GOOD["a"], "shape": [-2, -2]}), "'a'.*shape"),
    "fractional size": (_changed(a={**GOOD["a"], "shape": [2.0, 2]}), "'a'.*shape"),
    "boolean size": (_changed(a={**GOOD["a"], "shape": [True, 4]}), "'a'.*shape"),
    "shape a number": (_changed(a={**GOOD["a"], "shape": 4}), "'a'.*shape"),
    "size beyond 64 bits": (_changed(a={**GOOD["a"], "shape": [2**64, 0]}), "'a'.*shape"),
    "too many axes": (_changed(a={**GOOD["a"], "shape": [1] * 99}), "'a'.*shape"),
    "offsets swapped": (_changed(a={**GOOD["a"], "data_offsets": [16, 0]}), "data_offsets"),
    "offsets negative": (_changed(a={**GOOD["a"], "data_offsets": [-16, 0]}), "data_offsets"),
    "three offsets": (_changed(a={**GOOD["a"], "data_offsets": [0, 8, 16]}), "data_offsets"),
    "too few bytes": (
        _changed(a={**GOOD["a"], "data_offsets": [0, 12]}),
        r"'a'.*needs 16 bytes.*gives it 12",
    ),
    "product overflows": (
        _changed(a={**GOOD["a"], "shape": [2**62, 2**62]}),
        "'a'.*needs .* bytes",
    ),
    "overlap": (
        _changed(b={**GOOD["b"], "data_offsets": [14, 20]}),
        "'b'.*overlaps",
    ),
    "same place": (_changed(d=GOOD["a"]), "overlaps"),
    "hole": (_changed(b={**GOOD["b"], "data_offsets": [18, 24]}), "'c'.*overlaps|'b'.*hole"),
    "hole at the start": (
        json.dumps({"b": {"dtype": "U8", "shape": [20], "data_offsets": [4, 24]}}),
        "'b'.*leaves a hole",
    ),
    "bytes left over": (
        json.dumps({"b": {"dtype": "U8", "shape": [20], "data_offsets": [0, 20]}}),
        "bytes that no tensor owns",
    ),
    "beyond the end": (
        json.dumps({"b": {"dtype": "U8", "shape": [25], "data_offsets": [0, 25]}}),
        "is truncated",
    ),
}


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_an_unsound_header_is_refused_by_file_and_tensor(
    header: str | bytes, message: str, tmp_path: Path
) -> None:
    path = _write(tmp_path / "bad.safetensors", _bytes(header))

    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)

    assert "'bad.safetensors'" in caught.value.problem


@pytest.mark.parametrize("length_bytes", [HEADER_LIMIT_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_that_is_too_large_is_refused_before_it_is_read(
    length_bytes: int, tmp_path: Path
) -> None:
    path = _write(tmp_path / "x", struct.pack("<Q", length_bytes) + b"{}")

    with pytest.raises(CheckpointError, match=f"not a safetensors file.*{length_bytes}"):
        read_header(path)


def test_a_file_cut_anywhere_or_too_long_is_refused(tmp_path: Path) -> None:
    whole = _bytes(json.dumps(GOOD))
    borders = {0, 8, len(whole) - 24, len(whole) - 8, len(whole) - 2}
    cuts = {border + by for border in borders for by in (-1, 0, 1)} | {len(whole) - 1}

    for cut in sorted(cuts & set(range(len(whole)))):
        with pytest.raises(CheckpointError, match="is truncated"):
            read_header(_write(tmp_path / "x", whole[:cut]))
    with pytest.raises(CheckpointError, match="no tensor owns"):
        read_header(_write(tmp_path / "x", whole + b"\0"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'gone\.safetensors' cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=300)
def test_a_damaged_header_is_refused_or_read_but_never_crashes(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(_bytes(json.dumps(GOOD)))
    for _ in range(rng.integers(1, 5)):
        content[rng.integers(len(content) - len(DATA))] = rng.integers(256)
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)

    try:
        tensors = read_header(path)
    except CheckpointError:
        return

    maps = Maps()
    assert sum(maps.read(tensor).nbytes for tensor in tensors.values()) == len(DATA)


def test_a_file_that_went_away_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x", _bytes(json.dumps(GOOD)))
    tensor = read_header(path)["a"]
    path.unlink()

    with pytest.raises(CheckpointError, match="'x' cannot be read: No such file"):
        Maps().read(tensor)


# ---------------------------------------------------------------------------------------- writing

TENSORS: Mapping[str, tuple[str, NDArray[Any]]] = {
    "w.codes": ("F8_E4M3", np.arange(64, dtype=np.uint8).reshape(4, 16)),
    "w.scale": ("F32", np.ones((1, 1), np.float32)),
    "odd": ("U8", np.arange(3, dtype=np.uint8)),
    "norm": ("BF16", np.arange(5, dtype=np.uint16)),
    "shape": ("I64", np.array([4, 16])),
}


def _written(path: Path, names: list[str]) -> bytes:
    with TensorWriter(path, {n: (d, v.shape) for n, (d, v) in TENSORS.items()}) as writer:
        for name in names:
            writer.write(name, TENSORS[name][1])
        writer.finish()
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    _written(tmp_path / "x", list(TENSORS))

    found = read_header(tmp_path / "x")

    maps = Maps()
    for name, (dtype, values) in TENSORS.items():
        assert found[name].dtype == dtype
        assert np.array_equal(maps.read(found[name]), values)


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32)
    with TensorWriter(tmp_path / "x", {"a": ("F32", (7, 9))}, {"format": "pt"}) as writer:
        writer.write("a", values)
        writer.finish()

    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "x")["a"], values)


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    tensors: dict[str, NDArray[Any]] = {
        "b": np.arange(7, dtype=np.int32),
        "a": np.ones((2, 3), np.float16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "x")

    found = read_header(tmp_path / "x")

    assert {n: t.shape for n, t in found.items()} == {"a": (2, 3), "b": (7,)}
    assert np.array_equal(Maps().read(found["b"]), tensors["b"])


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    forward = _written(tmp_path / "x", list(TENSORS))

    assert _written(tmp_path / "y", list(reversed(list(TENSORS)))) == forward


def test_every_tensor_is_aligned_to_its_element_and_whole_lines_to_lines(tmp_path: Path) -> None:
    _written(tmp_path / "x", list(TENSORS))

    found = read_header(tmp_path / "x")

    assert {n: t.offset_bytes % 64 for n, t in found.items() if t.length_bytes % 64 == 0} == {
        "w.codes": 0
    }
    maps = Maps()
    assert all(maps.read(tensor).flags.aligned for tensor in found.values())


def test_a_tensor_may_be_written_in_parts(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    with TensorWriter(tmp_path / "x", {"a": ("I32", (3, 4))}) as writer:
        for row in (2, 0, 1):
            writer.write("a", values[row], at_bytes=row * 16)
        writer.finish()

    assert np.array_equal(Maps().read(read_header(tmp_path / "x")["a"]), values)


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = _write(tmp_path / "x", b"mine")

    with pytest.raises(FileExistsError, match="x"):
        TensorWriter(path, {"a": ("U8", (1,))})
    assert path.read_bytes() == b"mine"
