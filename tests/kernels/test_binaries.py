"""Kernels are compiled without a GPU, to the same bytes, and kept under a name that says all."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lingc.device import Binary
from lingc.errors import StageError
from lingc.kernel import Kernel
from lingc.targets.cuda import binaries
from lingc.targets.cuda.binaries import compile_all, compile_kernel, digest

READ = Kernel(
    language="cuda",
    source="kernels/ceiling.cu",
    entry="read_all",
    arguments=(("from", "*u8"), ("to", "*f32")),
    constants=(("PIECE", 32768), ("THREADS", 512)),
    warps=16,
    features=("bulk",),
)
ARCHES = [arch for arch in binaries.FEATURES if "bulk" in binaries.FEATURES[arch]]


@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_for_every_architecture_that_has_the_features(arch: str) -> None:
    binary = compile_kernel(READ, arch)

    assert binary.code[:4] == b"\x7fELF"
    assert (binary.entry, binary.threads, binary.arch) == ("read_all", 512, arch)


def test_refuses_an_architecture_without_the_features_and_names_them() -> None:
    with pytest.raises(StageError, match="needs bulk, which sm_89 has not"):
        compile_kernel(READ, "sm_89")


def test_a_fault_in_a_source_is_told_with_the_compilers_words() -> None:
    broken = replace(READ, constants=(("PIECE", "nonsense"), ("THREADS", 512)))

    with pytest.raises(StageError, match=r"ceiling\.cu does not compile.*nonsense") as caught:
        compile_kernel(broken, "sm_90a")
    assert "identifier" in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        replace(READ, constants=(("PIECE", 16384), ("THREADS", 512))),
        replace(READ, entry="copy_all"),
        replace(READ, warps=8),
        replace(READ, shared_bytes=1024),
    ],
)
def test_whatever_changes_a_binary_changes_its_name(other: Kernel) -> None:
    assert digest(other, "sm_90a") != digest(READ, "sm_90a")


def test_the_architecture_is_in_the_name() -> None:
    assert digest(READ, "sm_90a") != digest(READ, "sm_120a")


def test_a_binary_survives_its_file() -> None:
    binary = compile_kernel(READ, "sm_90a")

    assert Binary.from_bytes(binary.to_bytes()) == binary


@pytest.mark.parametrize("data", [b"", b"lingck2\n", b"lingck1\n" + b"x" * 100, b"x" * 100])
def test_other_bytes_are_no_binary(data: bytes) -> None:
    with pytest.raises(ValueError, match="no kernel binary"):
        Binary.from_bytes(data)


def test_every_flipped_byte_is_seen() -> None:
    whole = replace(compile_kernel(READ, "sm_90a"), code=b"\x7fELF and little more").to_bytes()

    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        with pytest.raises(ValueError, match="kernel binary"):
            Binary.from_bytes(bytes(flipped))


def test_the_cache_answers_and_a_torn_entry_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compile_all([READ], "sm_90a", tmp_path)[READ]
    (entry,) = (path for path in tmp_path.rglob("*") if path.is_file())
    whole = entry.read_bytes()

    def never(kernel: Kernel, arch: str) -> Binary:
        raise AssertionError(f"compiled {kernel.entry} for {arch} again")

    with monkeypatch.context() as patch:
        patch.setattr(binaries, "compile_kernel", never)
        assert compile_all([READ], "sm_90a", tmp_path)[READ] == made

    entry.write_bytes(whole[: len(whole) // 2])
    assert compile_all([READ], "sm_90a", tmp_path)[READ] == made
    assert entry.read_bytes() == whole


def test_equal_kernels_are_one_binary(tmp_path: Path) -> None:
    compile_all([READ, replace(READ)], "sm_90a", tmp_path)

    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 1


def test_same_bytes_from_another_directory(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    elsewhere = tmp_path / "a copy"
    shutil.copytree(
        root / "lingc", elsewhere / "lingc", symlinks=False, ignore=shutil.ignore_patterns("__py*")
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from lingc.bench.ceilings import ceiling_kernels\n"
        "from lingc.targets.cuda.binaries import compile_kernel\n"
        "import lingc, hashlib\n"
        "assert lingc.__file__.startswith(sys.argv[1])\n"
        "for kernel in ceiling_kernels():\n"
        "    print(hashlib.sha256(compile_kernel(kernel, 'sm_90a').to_bytes()).hexdigest())\n"
    )
    answers = [
        subprocess.run(
            (sys.executable, "-c", code, str(place)), cwd=tmp_path, capture_output=True,
            text=True, check=True,
        ).stdout
        for place in (root, elsewhere)
    ]  # fmt: skip

    assert answers[0] == answers[1]
    assert len(answers[0].split()) > 1
