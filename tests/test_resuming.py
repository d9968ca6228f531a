"""What is removed, refused and counted of a `.partial` folder."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lingc import resuming
from lingc.errors import ResourceError, UsageError
from lingc.resuming import Resumable


def _begin(out: Path, inputs: dict[str, str] | None = None, *, fresh: bool = False) -> Resumable:
    with Resumable(out, inputs or {"a": "1"}, fresh=fresh) as folder:
        (folder.content / "made").write_text("made")
        (folder.state / "seen").write_text("seen")
    return folder


@pytest.mark.parametrize("has_out", [True, False])
@pytest.mark.parametrize("name", ["notes", "content/notes", "state/notes", "begun.json"])
def test_a_folder_that_was_not_begun_here_is_left_alone(
    name: str, *, has_out: bool, tmp_path: Path
) -> None:
    mine = tmp_path / "out.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    if has_out:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "whole").touch()

    for fresh in (False, True):
        with pytest.raises(UsageError, match=r"out\.partial' is in the way") as caught:
            _begin(tmp_path / "out", fresh=fresh)
        assert "choose another output" in str(caught.value.hint)
    assert mine.read_text() == "mine"
    assert [p for p in (tmp_path / "out.partial").rglob("*") if p.is_file()] == [mine]


def test_what_a_published_one_left_is_removed_unless_another_process_fills_it(
    tmp_path: Path,
) -> None:
    folder = _begin(tmp_path / "out")
    folder.content.rename(tmp_path / "out")

    lock = folder._take()
    with pytest.raises(ResourceError, match="filled by another process"):
        _begin(tmp_path / "out")
    assert (folder.state / "seen").exists()
    os.close(lock)
    with pytest.raises(UsageError, match=r"out' exists already"):
        _begin(tmp_path / "out")
    assert not folder.folder.exists()
    assert (tmp_path / "out" / "made").exists()


def test_state_counts_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _begin(tmp_path / "out")
    asked: list[int] = []
    monkeypatch.setattr(resuming, "refuse_no_room", lambda _path, needed: asked.append(needed))

    with Resumable(folder.final, {"a": "1"}, needed_bytes=10_000):
        pass

    begun = (folder.folder / "begun.json").stat().st_size
    assert asked == [10_000 - len("made") - len("seen") - begun]


def test_what_cannot_be_removed_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _begin(tmp_path / "out")

    def fail(*_: object, **given: object) -> None:
        if not given.get("ignore_errors"):
            raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(ResourceError, match="Permission denied"):
            _begin(folder.final, fresh=True)

    # What was being thrown away is not gone on with either.
    with Resumable(folder.final, {"a": "1"}) as again:
        assert not again.is_resumed
        assert not list(again.content.iterdir())
        again.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_state_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(tmp_path / "out")
    assert "lingc" in json.loads((tmp_path / "out.partial/begun.json").read_text())
    monkeypatch.setattr(resuming, "__version__", "9.9")

    with pytest.raises(UsageError, match=r"other inputs:\n  - lingc: was .*, is 9\.9"):
        _begin(tmp_path / "out")
