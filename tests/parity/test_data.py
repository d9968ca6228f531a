"""Rows from JSONL: every form that is taken, and every bad line with its own sentence."""

import json
from pathlib import Path

import pytest

from lingc.errors import DataError
from lingc.parity import data
from lingc.parity.data import SAMPLE, Row, read_rows
from lingc.runtime.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-tiny"
VOCAB = 4096


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_directory(TINY)
    assert found is not None
    return found


def write(tmp_path: Path, *lines: bytes | str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def problem(path: Path, tokenizer: Tokenizer | None) -> str:
    with pytest.raises(DataError) as raised:
        read_rows(path, vocab=VOCAB, tokenizer=tokenizer)
    return raised.value.problem


def test_the_three_forms_are_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    user = {"role": "user", "content": "Sort a list."}
    path = write(
        tmp_path,
        json.dumps({"text": "def main():", "licence": "CC0-1.0"}),
        "",
        json.dumps({"messages": [user]}),
        json.dumps({"messages": [user, {"role": "assistant", "content": "list.sort()"}]}),
        json.dumps({"input_ids": [1, 2, 4095]}),
    )

    text, asked, answered, given = read_rows(path, vocab=VOCAB, tokenizer=tokenizer)

    assert text == Row(line=1, ids=tuple(tokenizer.encode("def main():")), bytes=11)
    assert asked.ids == tuple(tokenizer.encode(tokenizer.chat([user])))
    assert "list.sort()" in tokenizer.decode(answered.ids)
    assert answered.ids[-1] == tokenizer.encode("<|role_end|>")[0]
    assert given == Row(line=5, ids=(1, 2, 4095))


def test_rows_are_counted_and_cut(tmp_path: Path) -> None:
    path = write(tmp_path, *['{"input_ids": [1, 2, 3, 4]}'] * 3, "not looked at")

    found = read_rows(path, vocab=VOCAB, samples=3, max_tokens=2)

    assert [row.ids for row in found] == [(1, 2)] * 3


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"input_ids": [1]}\r', b"\r", b'{"input_ids": [2]}\r')

    assert [row.ids for row in read_rows(path, vocab=VOCAB)] == [(1,), (2,)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "it is not JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "\xff"}', "it is not UTF-8: byte 0xff at column 11"),
        (b'["a"]', "it holds a list, not an object"),
        (b"{}", "it is an empty object; one of 'text', 'messages', 'input_ids' is needed"),
        (b'{"txt": "a"}', "is 'txt' meant as 'text'?"),
        (b'{"prompt": "a", "n": 1}', "it has 'prompt', 'n'"),
        (b'{"text": "a", "input_ids": [1]}', "it has both 'text' and 'input_ids'; keep one"),
        (b'{"text": 3}', "'text' is 3, not text"),
        (b'{"text": ""}', "'text' is empty: it gives no token"),
        (b'{"text": "\\ud800"}', "is not Unicode text"),
        (b'{"messages": "hi"}', "'messages' is 'hi', not a list"),
        (b'{"messages": []}', "there are no messages"),
        (b'{"messages": [{"role": "user"}]}', "message 0 has content None, it must be text"),
        (b'{"messages": [3]}', "message 0 is 3, it must be an object"),
        (b'{"input_ids": 7}', "'input_ids' is 7, not a list"),
        (b'{"input_ids": []}', "'input_ids' is empty: it gives no token"),
        (b'{"input_ids": [1, "2"]}', "'input_ids' has '2' at 1, which is no token"),
        (b'{"input_ids": [true]}', "'input_ids' has True at 0, which is no token"),
        (b'{"input_ids": [4096]}', "token 4096 at position 0 is out of range; the vocabulary has"),
        (b'{"input_ids": [1, -1]}', "token -1 at position 1 is out of range"),
        (b"[" * 100_000, "it is not a row: it is nested too deeply"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "it is not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_and_explained(
    tmp_path: Path, tokenizer: Tokenizer, line: bytes, message: str
) -> None:
    found = problem(write(tmp_path, '{"input_ids": [1]}', line), tokenizer)

    assert "line 2: " in found
    assert message in found


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_blamed(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write(tmp_path, '{"text": "hello"}')

    with pytest.raises(DataError, match="0 to 15, so the tokenizer is not the model's"):
        read_rows(path, vocab=16, tokenizer=tokenizer)


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    found = problem(write(tmp_path, "{", '{"input_ids": [1]}', "{}", "[]"), None)

    assert "3 bad lines" in found
    assert [n for n in range(1, 5) if f"line {n}:" in found] == [1, 3, 4]


def test_a_file_of_rubbish_is_not_read_to_its_end(tmp_path: Path) -> None:
    found = problem(write(tmp_path, *["rubbish"] * 50), None)

    assert "20 bad lines, and was not read further" in found


def test_a_giant_line_is_refused_and_the_next_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path, '{"text": "' + "a" * (3 << 20) + '"}', "{")

    found = problem(path, None)

    assert "line 1: it is longer than 1 MiB" in found
    assert "line 2: it is not JSON" in found


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    found = problem(write(tmp_path, '{"text": "a"}'), None)

    assert "line 1: it has 'text', but there is no tokenizer; give 'input_ids'" in found


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)

    assert "holds no rows" in problem(path, None)


def test_a_file_that_cannot_be_read_is_answered(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in problem(tmp_path / "none.jsonl", None)
    assert "cannot be read: Is a directory" in problem(tmp_path, None)


def test_the_sample_reads_and_every_row_has_a_licence(tokenizer: Tokenizer) -> None:
    licences = (SAMPLE.parent / "LICENSES.txt").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]

    found = read_rows(SAMPLE, vocab=VOCAB, tokenizer=tokenizer, max_tokens=512)

    assert len(found) == len(lines) == 16
    assert {line["licence"] for line in lines} <= {
        "PSF-2.0", "PostgreSQL", "BSD-3-Clause", "CC0-1.0", "public domain",
    }  # fmt: skip
    assert all(line["source"] in licences or line["licence"] == "CC0-1.0" for line in lines)
