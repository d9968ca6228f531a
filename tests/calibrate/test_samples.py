"""Calibration data: what is read, dropped, mixed and chosen, and what is wrong with a line."""

import json
from pathlib import Path

import pytest

from lingc.calibrate.samples import Samples, Share, parse_share, read_samples, shipped
from lingc.errors import DataError, UsageError
from lingc.runtime.tokenizer import Tokenizer
from tests.calibrate.conftest import LING_TINY, read


def _write(path: Path, *rows: list[int]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def _read(*shares: Share, count: int | None = None, seed: int = 0, max_tokens: int = 8) -> Samples:
    return read_samples(
        shares, vocab=64, tokenizer=None, count=count, max_tokens=max_tokens, seed=seed
    )


def test_what_is_said_twice_counts_once(tmp_path: Path) -> None:
    a = _write(tmp_path / "a.jsonl", [1, 2], [3], [1, 2])
    b = _write(tmp_path / "b.jsonl", [3], [4])

    found = _read(Share(path=a), Share(path=b))

    assert sorted(one.ids for one in found.samples) == [(1, 2), (3,), (4,)]
    assert [(f.rows, f.repeated, f.chosen) for f in found.files] == [(3, 1, 2), (2, 1, 1)]


def test_files_give_samples_by_their_weight(tmp_path: Path) -> None:
    a = _write(tmp_path / "a.jsonl", *([i] for i in range(30)))
    b = _write(tmp_path / "b.jsonl", *([i] for i in range(30, 60)))

    found = _read(Share(path=a, weight=3), Share(path=b, weight=1), count=20)

    assert [one.chosen for one in found.files] == [15, 5]


def test_without_a_count_the_weights_take_as_much_as_they_can(tmp_path: Path) -> None:
    a = _write(tmp_path / "a.jsonl", *([i] for i in range(30)))
    b = _write(tmp_path / "b.jsonl", *([i] for i in range(30, 35)))

    equal = _read(Share(path=a), Share(path=b))
    mixed = _read(Share(path=a, weight=0.5), Share(path=b, weight=1.0))

    assert [one.chosen for one in equal.files] == [30, 5]
    assert [one.chosen for one in mixed.files] == [2, 5]


def test_a_seed_chooses_and_orders(rows: Path) -> None:
    first, same, other = (read(rows, count=6, seed=seed) for seed in (1, 1, 2))

    assert first == same
    assert first.digest == same.digest != other.digest


def test_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    found = read(_write(tmp_path / "a.jsonl", list(range(64)) * 2, [1]))

    assert [one.cut for one in found.files] == [1]
    assert max(len(one.ids) for one in found.samples) == 64
    assert found.histogram() == [("up to 16", 1), ("up to 64", 1)]


def test_bad_lines_are_numbered(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [1], [64])
    with path.open("ab") as file:
        file.write(b'{"input_ids": [\xff]}\n')

    with pytest.raises(
        DataError, match=r"line 2: token 64 .*\n.*line 3: it is not UTF-8"
    ) as caught:
        read(path)
    assert caught.value.exit_code == 3


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")

    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [("a.jsonl", "a.jsonl", 1.0), ("a.jsonl:0.7", "a.jsonl", 0.7), ("c:/x.jsonl", "c:/x.jsonl", 1)],
)
def test_a_share_is_a_path_and_a_weight(text: str, name: str, weight: float) -> None:
    assert parse_share(text) == Share(path=Path(name), weight=weight)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_a_weight_that_is_no_share_is_refused(weight: str) -> None:
    with pytest.raises(UsageError, match=f"weight of 'a.jsonl' is '{weight}'"):
        parse_share(f"a.jsonl:{weight}")


def test_a_name_too_long_for_a_file_is_one_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match=r"'zzz.* cannot be read: File name too long"):
        read_samples(
            [parse_share("z" * 300 + ":0.5")],
            vocab=64, tokenizer=None, count=None, max_tokens=8, seed=0,
        )  # fmt: skip


def test_a_colon_may_be_part_of_a_name(tmp_path: Path) -> None:
    path = _write(tmp_path / "a:2", [1])

    assert parse_share(str(path)) == Share(path=path)


@pytest.mark.parametrize("name", shipped())
def test_the_shipped_sets_are_sound(name: str) -> None:
    found = read_samples(
        [parse_share(name)],
        vocab=4096,
        tokenizer=Tokenizer.from_directory(LING_TINY),
        count=None,
        max_tokens=4096,
        seed=0,
    )

    assert len(found.samples) >= 10
    assert found.files[0].repeated == 0
    assert all(len(one.ids) > 20 for one in found.samples)


def test_the_shipped_sets_are_of_four_kinds() -> None:
    assert shipped() == ("chinese", "code", "english", "tools")
