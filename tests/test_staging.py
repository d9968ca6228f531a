"""A directory appears whole or not at all; see also tests/engine/test_atomic.py."""

import errno
import os
import stat
from pathlib import Path

import pytest

from lingc.errors import IntegrityError, ResourceError, UsageError
from lingc.staging import Scratch, Staging, is_empty, refuse_unwritable, writing


def test_what_a_killed_writer_left_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    left = tmp_path / ".x.tmp-1-0000dead" / "content"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")

    with Scratch(tmp_path / "x") as live, Staging(tmp_path / "x") as staging:
        assert live.content.exists()
        assert not left.parent.exists()
        staging.publish()

    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_slower_of_two_writers_gives_way(tmp_path: Path) -> None:
    def write(content: bytes) -> None:
        with Staging(tmp_path / "x", replaceable=is_empty) as staging:
            (staging.content / "a").write_bytes(content)
            if content == b"slow":
                write(b"fast")
            staging.publish()

    with pytest.raises(UsageError, match="exists already"):
        write(b"slow")
    assert (tmp_path / "x" / "a").read_bytes() == b"fast"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_permissions_are_those_of_any_directory_and_not_of_a_private_one(tmp_path: Path) -> None:
    with Staging(tmp_path / "x") as staging:
        staging.publish()
    (tmp_path / "plain").mkdir()

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "plain")]
    assert modes[0] == modes[1]


def test_an_empty_directory_gives_way_where_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()

    with Staging(tmp_path / "x", replaceable=is_empty) as staging:
        (staging.content / "a").write_bytes(b"")
        staging.publish()

    assert [path.name for path in tmp_path.rglob("*")] == ["x", "a"]


def test_what_was_not_published_does_not_appear(tmp_path: Path) -> None:
    with Staging(tmp_path / "x") as staging:
        (staging.content / "a").write_bytes(b"")

    assert list(tmp_path.iterdir()) == []


def test_a_link_is_not_published(tmp_path: Path) -> None:
    with Staging(tmp_path / "x") as staging:
        (staging.content / "deep").mkdir()
        (staging.content / "deep" / "link").symlink_to(tmp_path)

        with pytest.raises(IntegrityError, match="link' is neither a file nor a directory"):
            staging.publish()

    assert list(tmp_path.iterdir()) == []


def test_a_place_without_room_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs 1000000000\.00 GB, .*\nhint: free space"):
        Scratch(tmp_path / "x", needed_bytes=10**18).__enter__()

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_at_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refuse(
        path: Path, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False
    ) -> None:
        if path.name == "content":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, mode, parents, exist_ok)

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(ResourceError, match="No space left on device"):
        Staging(tmp_path / "x").__enter__()

    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_progress_that_went_away_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), writing(tmp_path):
        raise BrokenPipeError


def test_a_file_that_cannot_be_written_is_refused_before_the_work_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("kept")

    refuse_unwritable(tmp_path / "there", None, tmp_path / "new")
    with pytest.raises(ResourceError, match=r"cannot be written: No such file") as caught:
        refuse_unwritable(tmp_path / "new", tmp_path / "nowhere" / "new")
    assert caught.value.hint == "make the directory that it shall be in first"

    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_a_directory_is_refused_as_a_file_before_the_work_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    with pytest.raises(ResourceError, match=r"there' cannot be written: Is a directory") as caught:
        refuse_unwritable(tmp_path / "there")

    assert caught.value.hint == "that is a directory; give the name of a file"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
