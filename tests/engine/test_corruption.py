"""Whatever happens to the bytes of a package, it is noticed, and nothing else happens."""

import errno
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lingc.engine import read_manifest, verify
from lingc.engine.machine import Machine
from lingc.errors import IncompatibleError, IntegrityError, ResourceError

FLIPS = 1000


def files(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*") if path.is_file())


def code(package: Path, machine: Machine) -> int:
    return verify(package, machine=machine).exit_code


def damaged(path: Path, data: bytes) -> Iterator[None]:
    """Put other bytes in a file, and its own back afterwards."""
    whole = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(whole)


def test_a_whole_package_passes_every_check(package: Path, machine: Machine) -> None:
    report = verify(package, machine=machine)

    assert report.exit_code == 0
    assert {check.verdict for check in report.checks} == {"ok"}


def test_every_flipped_byte_is_caught(package: Path, machine: Machine) -> None:
    draw = random.Random(2606)  # noqa: S311 a seeded choice of bytes
    candidates = files(package)
    codes = set()

    for number in range(FLIPS):
        path = candidates[number % len(candidates)]
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        flipped = whole[at] ^ draw.randrange(1, 256)
        for _ in damaged(path, whole[:at] + bytes([flipped]) + whole[at + 1 :]):
            codes.add(code(package, machine))

    assert codes == {6}
    assert code(package, machine) == 0


def test_the_whole_manifest_is_guarded(package: Path) -> None:
    path = package / "manifest.json"
    whole = path.read_bytes()

    for at in range(0, len(whole), 3):
        other = b"0" if whole[at : at + 1] != b"0" else b"1"
        for _ in damaged(path, whole[:at] + other + whole[at + 1 :]):
            with pytest.raises(IntegrityError, match="is not what was written"):
                read_manifest(package)


def test_every_truncation_and_growth_is_caught(package: Path, machine: Machine) -> None:
    for path in files(package):
        whole = path.read_bytes()
        changed = [whole[:length] for length in {0, 1, len(whole) // 2, len(whole) - 1}]
        changed = [data for data in changed if data != whole]
        for data in [*changed, whole + b"\n", whole + b"\0" * 4096]:
            for _ in damaged(path, data):
                assert code(package, machine) == 6, (path, len(data))


def test_every_deleted_file_is_named(package: Path, machine: Machine) -> None:
    for path in files(package):
        whole = path.read_bytes()
        path.unlink()
        report = verify(package, machine=machine)
        path.write_bytes(whole)

        name = path.relative_to(package).as_posix()
        assert report.exit_code == 6
        assert [c.subject for c in report.failed if c.id in ("missing", "manifest")] == [name]


def test_every_file_swapped_for_another_is_caught(package: Path, machine: Machine) -> None:
    candidates = files(package)
    for path, other in zip(candidates, candidates[1:] + candidates[:1], strict=True):
        for _ in damaged(path, other.read_bytes()):
            assert code(package, machine) == 6


def test_a_renamed_file_is_missing_and_extra(package: Path, machine: Machine) -> None:
    (package / "plan.json").rename(package / "plan2.json")

    report = verify(package, machine=machine)

    assert {(c.id, c.subject) for c in report.failed if c.id in ("missing", "extra")} == {
        ("missing", "plan.json"),
        ("extra", "'plan2.json'"),
    }


@pytest.mark.parametrize("name", ["notes.txt", "model/extra.json", ".hidden", "weights/a.bin"])
def test_an_extra_file_is_refused_and_named(package: Path, machine: Machine, name: str) -> None:
    (package / name).write_bytes(b"")

    report = verify(package, machine=machine)

    assert [(c.id, c.subject) for c in report.failed] == [("extra", repr(name))]
    assert report.exit_code == 6


def test_an_extra_directory_is_refused(package: Path, machine: Machine) -> None:
    (package / "reports").mkdir()

    assert [c.id for c in verify(package, machine=machine).failed] == ["extra"]


def test_all_faults_are_told_at_once(package: Path) -> None:
    (package / "plan.json").write_bytes(b"{}\n")
    (package / "tests" / "cases.json").unlink()
    (package / "extra").write_bytes(b"")
    nowhere = Machine(os="plan9", arch="vax", version_of=lambda _: None)

    report = verify(package, machine=nowhere)

    failed = {check.id for check in report.failed}
    assert failed == {"size", "digest", "missing", "extra", "os", "arch", "library"}
    assert report.exit_code == 6
    assert all(check.expected and check.found and check.fix for check in report.failed)


def test_what_depends_on_broken_bytes_is_not_run(package: Path, machine: Machine) -> None:
    plan = package / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"lingc.linear", b"lingc.linxar"))

    report = verify(package, machine=machine)

    assert [(c.id, c.subject) for c in report.failed] == [("digest", "plan.json")]
    not_run = {c.id for c in report.checks if c.verdict == "not run"}
    assert not_run == {"plan-format", "plan", "agreement", "weights", "bound-weights"}


def test_a_copy_is_as_good_as_the_package(package: Path, machine: Machine, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "copy.ling")

    assert code(tmp_path / "copy.ling", machine) == 0


def test_errors_name_what_was_changed(package: Path, machine: Machine) -> None:
    (package / "model" / "config.json").write_bytes(b'{"hidden_size": 9}\n')

    report = verify(package, machine=machine)

    with pytest.raises(IntegrityError, match=r"digest: model/config\.json expected [0-9a-f]{64}"):
        report.raise_if_bad()


def test_a_file_that_may_not_be_read_is_no_damage(
    package: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("lingc.engine.tree.digest", refuse)

    with pytest.raises(ResourceError, match="cannot be read: Permission denied"):
        verify(package, machine=machine)


def test_another_machine_is_told_why(package: Path) -> None:
    report = verify(package, machine=Machine(os="linux", arch="riscv64", version_of=lambda _: None))

    with pytest.raises(IncompatibleError, match=r"(?s)arch: cpu expected x86_64.*library: onnxrun"):
        report.raise_if_bad()
    assert report.exit_code == 4
