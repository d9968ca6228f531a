"""A package appears whole or not at all, whoever else writes, and whatever goes wrong."""

import concurrent.futures
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingc import staging
from lingc.engine import Contents, PackageWriter, read_manifest, verify, write_package
from lingc.engine.machine import Machine
from lingc.errors import LingcError, ResourceError, StageError, UsageError

ROOT = Path(__file__).parents[2]

# Writes the contents of the package at argv[1] to argv[2] again and again, with a large file more.
WRITER = """
import json, sys
from pathlib import Path
from lingc.engine import Contents, write_package, read_manifest

source, target = map(Path, sys.argv[1:3])
overwrite = "overwrite" in sys.argv
read = lambda path: (source / path).read_bytes()
value = read_manifest(source).value
contents = Contents(
    plan=read("plan.json").decode(),
    model_files={"config.json": read("model/config.json")},
    variants={"cpu": {"decode.onnx": bytes(4_000_000)}},
    variant_info={"cpu": json.loads(read("variants/cpu/variant.json"))},
    weights=None,
    architecture="x", checkpoint=None, request=value["request"],
)
print("ready", flush=True)
for number in range(1_000_000):
    path = target if overwrite else target.with_name(f"{target.stem}-{number}.ling")
    write_package(path, contents, overwrite=overwrite)
"""


def litter(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if ".tmp-" in path.name]


def kill_a_writer(source: Path, target: Path, *, after_s: float, words: tuple[str, ...]) -> None:
    command = (sys.executable, "-c", WRITER, str(source), str(target), *words)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)


def assert_survives_kills(
    package: Path, contents: Contents, machine: Machine, *, kills: int
) -> None:
    draw = random.Random(kills)  # noqa: S311 a seeded choice of moments
    place = package.parent / "out"
    place.mkdir()
    target = place / "y.ling"
    write_package(target, contents)
    for number in range(kills):
        words = ("overwrite",) if number % 2 else ()
        kill_a_writer(package, target, after_s=draw.uniform(0, 0.06), words=words)

        for path in place.glob("*.ling"):
            assert verify(path, machine=machine).exit_code == 0, path
        assert target in place.iterdir()

    write_package(target, contents, overwrite=True)
    for path in place.glob("y-*.ling"):
        write_package(path, contents, overwrite=True)
    # A name that was never finished is only tidied by the next write of that name.
    for name in litter(place):
        write_package(place / name[1:].partition(".tmp-")[0], contents, overwrite=True)
    assert litter(place) == []


def test_killed_writers_leave_whole_packages_and_no_lasting_litter(
    package: Path, contents: Contents, machine: Machine
) -> None:
    assert_survives_kills(package, contents, machine, kills=5)


@pytest.mark.long
def test_thirty_killed_writers_leave_whole_packages(
    package: Path, contents: Contents, machine: Machine
) -> None:
    assert_survives_kills(package, contents, machine, kills=30)


def test_an_existing_output_is_refused(package: Path, contents: Contents) -> None:
    before = read_manifest(package).bundle_id

    with pytest.raises(UsageError, match=r"x\.ling' exists already\nhint: choose another"):
        write_package(package, contents)

    assert read_manifest(package).bundle_id == before
    assert litter(package.parent) == []


def test_overwriting_replaces_the_whole_package(package: Path, contents: Contents) -> None:
    written = write_package(package, contents, overwrite=True)

    assert read_manifest(package).bundle_id == written.bundle_id
    assert not (package / "weights").exists()
    assert litter(package.parent) == []


def test_overwriting_destroys_nothing_but_a_package(contents: Contents, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "manifest.json").write_text("{}")
    (home / "thesis.tex").write_text("years of work")

    with pytest.raises(UsageError, match="holds other things than what would replace it"):
        write_package(home, contents, overwrite=True)
    with pytest.raises(UsageError, match="is not a directory, so it is not replaced"):
        write_package(home / "thesis.tex", contents, overwrite=True)

    assert (home / "thesis.tex").read_text() == "years of work"


def test_a_link_is_not_replaced_by_a_package(package: Path, contents: Contents) -> None:
    link = package.parent / "link.ling"
    link.symlink_to(package)

    with pytest.raises(UsageError, match="is not a directory, so it is not replaced"):
        write_package(link, contents, overwrite=True)


def test_an_empty_directory_can_be_overwritten(contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "y.ling").mkdir()

    write_package(tmp_path / "y.ling", contents, overwrite=True)

    assert read_manifest(tmp_path / "y.ling")


@pytest.mark.parametrize("name", ["..", "sub/.."])
def test_a_path_without_a_name_is_refused(contents: Contents, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="names no new directory"):
        write_package(tmp_path / name, contents)


def test_missing_parents_are_made(contents: Contents, tmp_path: Path) -> None:
    write_package(tmp_path / "a" / "b" / "y.ling", contents)

    assert verify(tmp_path / "a" / "b" / "y.ling", level="integrity").exit_code == 0


def test_a_file_system_that_cannot_swap_still_replaces(
    package: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(staging, "_renameat2", unsupported)

    with pytest.raises(UsageError, match="exists already"):
        write_package(package, contents)
    written = write_package(package, contents, overwrite=True)
    other = write_package(package.with_name("z.ling"), contents)

    assert read_manifest(package).bundle_id == written.bundle_id == other.bundle_id
    assert litter(package.parent) == []


def test_a_file_system_without_locks_is_written_all_the_same(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)

    write_package(tmp_path / "y.ling", contents)

    assert litter(tmp_path) == []


# ------------------------------------------------------------------------------------- no room


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free space on that file system"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "check the file system"),
    ],
)
def test_no_room_leaves_nothing_and_says_what_helps(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    calls = iter(range(3))

    def write(_path: Path, data: bytes) -> int:
        if next(calls, None) is None:
            raise OSError(code, os.strerror(code))
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", write)

    with pytest.raises(ResourceError, match=rf"(?s)y\.ling' cannot be written: .*\nhint: .*{hint}"):
        write_package(tmp_path / "y.ling", contents)

    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_weights_are_written_leaves_nothing(
    contents: Contents, tmp_path: Path
) -> None:
    whole = replace(contents, variants={"cpu": {"decode.onnx": bytes(1 << 20)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ: the write fails with EFBIG, as on a full disk with ENOSPC.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(ResourceError, match=r"File too large\nhint: raise the limit"):
            write_package(tmp_path / "y.ling", whole)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert list(tmp_path.iterdir()) == []


def test_an_output_below_a_file_is_answered(contents: Contents, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ResourceError, match=r"cannot be written: .*\nhint: a part of that path"):
        write_package(tmp_path / "file" / "y.ling", contents)


def test_a_directory_that_refuses_writing_is_answered(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refuse(
        path: Path, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        if ".tmp-" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(ResourceError, match="Permission denied"):
        write_package(tmp_path / "y.ling", contents)
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "y.ling") as writer:
        (writer.weights_dir / "0.safetensors").write_bytes(b"half")

    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with PackageWriter(tmp_path / "y.ling") as writer:
            (writer.weights_dir / "0.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ others at work


def test_what_a_dead_process_left_is_removed(contents: Contents, tmp_path: Path) -> None:
    # As after kill -9 at any moment: made, locked once, filled in part. Its pid may be anyone's.
    for number, name in enumerate(
        (f".y.ling.tmp-{os.getpid()}-00000000", ".y.ling.tmp-1-ffffffff")
    ):
        left = tmp_path / name
        left.mkdir()
        if number:
            (left / "lock").write_bytes(b"")
            (left / "content" / "weights").mkdir(parents=True)
            (left / "content" / "weights" / "x").write_bytes(b"half")

    write_package(tmp_path / "y.ling", contents)

    assert [path.name for path in tmp_path.iterdir()] == ["y.ling"]


def test_what_is_not_ours_is_not_removed(contents: Contents, tmp_path: Path) -> None:
    names = {".z.ling.tmp-1-00000000", ".y.ling.tmp-x-00000000", "y.ling.tmp-1-00000000"}
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".y.ling.tmp-1-0000000a").symlink_to(tmp_path / ".z.ling.tmp-1-00000000")

    write_package(tmp_path / "y.ling", contents)

    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {*names, "y.ling", ".y.ling.tmp-1-0000000a"}


def test_a_writer_at_work_is_left_alone(contents: Contents, tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "y.ling") as slow:
        write_package(tmp_path / "y.ling", contents)

        assert slow.weights_dir.is_dir()
        with pytest.raises(UsageError, match="exists already"):
            slow.commit(contents)

    assert verify(tmp_path / "y.ling", level="integrity").exit_code == 0
    assert litter(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_many_writers_of_one_path_leave_one_whole_package(
    contents: Contents, tmp_path: Path, machine: Machine, *, overwrite: bool
) -> None:
    path = tmp_path / "y.ling"

    def write(number: int) -> str:
        mine = replace(contents, producer={"writer": str(number)})
        try:
            return write_package(path, mine, overwrite=overwrite).bundle_id
        except (UsageError, ResourceError):
            return ""

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        written = [bundle_id for bundle_id in pool.map(write, range(32)) if bundle_id]

    report = verify(path, machine=machine)
    assert report.exit_code == 0
    assert report.bundle_id in written
    assert overwrite or len(written) == 1
    assert litter(tmp_path) == []


# -------------------------------------------------------------------------------- what is written


def test_every_file_and_directory_is_forced_to_disk(
    embed: Callable[[], Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))

    monkeypatch.setattr("os.fsync", fsync)

    write_package(tmp_path / "y.ling", embed())

    whole = [path for path in (tmp_path / "y.ling").rglob("*") if "shards-" not in str(path)]
    names = {path.partition("/content")[2].lstrip("/") for path in synced if "/content" in path}
    assert names == {"", *(path.relative_to(tmp_path / "y.ling").as_posix() for path in whole)}
    assert synced[-1] == str(tmp_path)


def test_modes_do_not_depend_on_the_umask(contents: Contents, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_package(tmp_path / "y.ling", contents)
    finally:
        os.umask(before)

    modes = {(p.is_dir(), oct(p.stat().st_mode & 0o7777)) for p in tmp_path.rglob("y.ling/**/*")}
    assert modes == {(True, "0o755"), (False, "0o644")}
    assert (tmp_path / "y.ling").stat().st_mode & 0o777 == 0o755


def test_shards_with_a_second_name_are_copied(
    embed: Callable[[], Contents], tmp_path: Path, machine: Machine
) -> None:
    contents = embed()
    assert contents.weights is not None
    for shard in contents.weights:
        os.link(shard, shard.with_name(f"other-{shard.name}"))

    write_package(tmp_path / "y.ling", contents)

    assert verify(tmp_path / "y.ling", machine=machine).exit_code == 0


def test_weights_can_be_written_in_place(
    embed: Callable[[], Contents], tmp_path: Path, machine: Machine
) -> None:
    source = embed()
    assert source.weights is not None
    with PackageWriter(tmp_path / "y.ling") as writer:
        shards = []
        for shard in source.weights:
            shards.append(writer.weights_dir / shard.name)
            shards[-1].write_bytes(shard.read_bytes())
        written = writer.commit(replace(source, weights=shards))

    assert written.has_weights
    assert verify(tmp_path / "y.ling", machine=machine).exit_code == 0


def test_two_writers_at_once_do_not_share_a_directory(tmp_path: Path) -> None:
    with PackageWriter(tmp_path / "a") as first, PackageWriter(tmp_path / "a") as second:
        assert first.weights_dir != second.weights_dir


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "{}"}, "the plan cannot be read"),
        ({"model_files": {}}, r"expected 'model/config\.json', got nothing"),
        ({"model_files": {"config.json": b"", "../x": b""}}, r"'model/\.\./x' has no place"),
        ({"variants": {}}, r"files for the targets \[\] and facts for \['cpu'\]"),
        ({"variant_info": {"cpu": {"engine": "onnx"}}}, r"variants\[0\]\.runs_on: expected"),
        ({"variant_info": {"cpu": {"engine": {1, 2}}}}, "is a set, which JSON cannot say"),
        ({"request": {"target": "cpu"}}, r"request\.precision: expected a value"),
        ({"producer": {"source": "/home/me"}}, "producer.source is the path '/home/me'"),
        ({"passes": ({"phase": "decode"},)}, r"graph\.passes\[0\]\.name: expected a value"),
        ({"quant": {"loss": float("nan")}}, "is nan, which JSON cannot say"),
        ({"weights": ()}, r"layers\.0\.decay': expected F32 \[2\], found nothing"),
    ],
)
def test_contents_that_make_no_package_are_refused(
    contents: Contents, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    wrong = Contents(**{**{f: getattr(contents, f) for f in contents.__slots__}, **change})

    with pytest.raises(LingcError, match=message):
        write_package(tmp_path / "y.ling", wrong)

    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_are_refused(
    embed: Callable[[], Contents], tmp_path: Path
) -> None:
    contents = embed()
    plan = json.loads(contents.plan)
    plan["weights"]["layers.0.decay"]["type"] = "f32[3]"
    text = json.dumps(plan, sort_keys=True, separators=(",", ":")) + "\n"

    with pytest.raises(StageError, match=r"layers\.0\.decay': expected F32 \[3\], found F32 \[2\]"):
        write_package(tmp_path / "y.ling", replace(contents, plan=text))
