"""A record says what its side said, and is refused where it cannot."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lingc.checkpoint import SyntheticCheckpoint, write_checkpoint
from lingc.cli import main
from lingc.errors import DataError, IncompatibleError, InputError
from lingc.model.config import ModelConfig
from lingc.parity.record import RecordSide, read
from lingc.parity.run import Settings, record, run
from lingc.parity.side import Mode
from tests.parity.packages import ROWS, checkpoint, engine
from tests.programs import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With rows, and a record of the checkpoint's."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("record")
    lines = (json.dumps({"input_ids": row}) + "\n" for row in ROWS)
    (path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    record(settings(path, str(checkpoint()), modes=("prefill", "draft")), path / "truth")
    return path


def settings(folder: Path, a: str, b: str = "", **more: object) -> Settings:
    given = {"data": folder / "rows.jsonl", "cache_dir": folder / "cache", **more}
    return Settings(a=a, b=b, **given)  # type: ignore[arg-type]


def test_a_record_stands_for_its_side_in_every_figure(folder: Path) -> None:
    truth = str(folder / "truth")
    modes: tuple[Mode, ...] = ("prefill", "draft")
    more = {"modes": modes, "weights": "checkpoint"}

    again = run(settings(folder, truth, str(checkpoint()), **more))
    live = run(settings(folder, str(checkpoint()), str(engine()), **more))
    from_record = run(settings(folder, truth, str(engine()), **more))

    assert all(mode.summary.max_abs == 0 for mode in again.modes)
    assert again.modes[0].summary.states[-1].max == 0
    for one, other in zip(from_record.modes, live.modes, strict=True):
        assert one.summary == other.summary
    assert from_record.reference.stored == live.reference.stored
    assert from_record.budget.name == "quantized"


def test_rows_of_a_record_need_not_be_given_again(folder: Path) -> None:
    found = run(Settings(a=str(folder / "truth"), b=str(checkpoint()), cache_dir=folder / "cache"))

    assert (found.data, len(found.lines)) == ("rows.jsonl", len(ROWS))


def test_rows_of_a_record_are_held_to_the_positions_of_the_other_side(
    folder: Path, tmp_path: Path
) -> None:
    most = len(ROWS[0]) - 1
    short = ModelConfig.from_dict({**config("tiny").raw, "max_position_embeddings": most})
    other = write_checkpoint(SyntheticCheckpoint(short, 1), tmp_path / "short")
    sides = Settings(a=str(folder / "truth"), b=str(other), cache_dir=folder / "cache")

    with pytest.raises(DataError, match=rf"line 1 of 'rows.jsonl' .* was made for {most}"):
        run(sides)

    found = run(replace(sides, max_tokens=most))
    assert len(found.lines) == len(ROWS)


def test_a_row_answers_for_its_beginnings_and_no_other_for_it(folder: Path) -> None:
    about, tensors = read(folder / "truth")
    side = RecordSide(about, tensors)

    (whole,), (part,) = (side.score([ROWS[1][:n]], "prefill") for n in (len(ROWS[1]), 9))

    np.testing.assert_array_equal(part.logits, whole.logits[:9])
    assert all(len(choice.ids) == 9 for choice in part.experts.values())
    assert {position for _, position in part.states} == set()
    with pytest.raises(DataError, match="has no row that begins with these 3 tokens"):
        side.score([[5, 5, 5]], "prefill")
    with pytest.raises(IncompatibleError, match="has no mode 'verify'"):
        side.score([ROWS[0]], "verify")


def test_what_is_no_record_is_refused(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes((folder / "truth").read_bytes()[:-100])
    other = tmp_path / "other.txt"
    other.write_text("words", encoding="utf-8")

    with safe_open(folder / "truth", "np") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "truth")
    said = tmp_path / "said"
    save_file(tensors, said, {"lingc_record": '"words"'})
    lost = tmp_path / "lost"
    save_file({k: v for k, v in tensors.items() if k != "draft.1.logits"}, lost, metadata)

    foreign = tmp_path / "foreign"
    save_file(tensors, foreign)

    for path in (cut, other, said, lost):
        with pytest.raises(InputError, match="is not a record"):
            read(path)
    with pytest.raises(InputError, match="is not a record: it is safetensors of another kind"):
        read(foreign)


def test_the_command_records_and_leaves_nothing_when_it_cannot(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LINGC_CACHE", str(tmp_path / "cache"))
    data = ["--data", str(folder / "rows.jsonl"), "--progress", "none"]
    place = tmp_path / "none" / "truth"

    made = main(["parity", str(checkpoint()), "--record", str(tmp_path / "truth"), *data, "--json"])
    told = json.loads(capsys.readouterr().out)
    lost = main(["parity", str(checkpoint()), "--record", str(place), *data])
    both = main(["parity", str(checkpoint()), "x", "--record", str(place), *data])
    walked = main(["parity", str(tmp_path / "truth"), str(checkpoint()), "--bisect", *data])

    assert (made, lost, both, walked) == (0, 7, 2, 2)
    assert (told["kind"], told["rows"]) == ("record", len(ROWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["truth"]
    assert "has none that could be walked" in capsys.readouterr().err
