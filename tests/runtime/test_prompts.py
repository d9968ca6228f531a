"""Prompts from files and arguments."""

from pathlib import Path

import pytest

from lingc.errors import DataError, InputError, UsageError
from lingc.runtime.prompts import decode_text, parse_ids, read_conversations

HI = '{"role": "user", "content": "Hi"}'


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_are_separated_by_commas_or_blanks() -> None:
    assert parse_ids("1, 2,3 4") == (1, 2, 3, 4)
    assert parse_ids("") == ()
    assert parse_ids("-1") == (-1,), "the range is the model's to know"


@pytest.mark.parametrize("bad", ["1,x", "1.5", "0x10", "\u0661", "9" * 30])
def test_what_is_no_id_is_named(bad: str) -> None:
    with pytest.raises(UsageError, match="is not a token id"):
        parse_ids(bad)


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"one\n", "one"), (b"one\r\n", "one"), (b"one\n\n", "one\n"), (b"", ""), (b" a ", " a ")],
)
def test_one_final_line_break_is_not_part_of_a_prompt(data: bytes, text: str) -> None:
    assert decode_text(data, name="x") == text


def test_a_file_that_is_not_utf8_is_named_with_the_place() -> None:
    with pytest.raises(InputError, match=r"p\.txt is not UTF-8: .* at byte 2"):
        decode_text(b"ab\xff", name="p.txt")


@pytest.mark.parametrize(
    "text",
    [f"[{HI}]", f'{{"messages": [{HI}]}}', f"[[{HI}]]", f'[{{"messages": [{HI}]}}]'],
)
def test_one_conversation_may_be_written_in_several_ways(tmp_path: Path, text: str) -> None:
    found = read_conversations(written(tmp_path / "chat.json", text))

    assert found == [[{"role": "user", "content": "Hi"}]]


def test_a_jsonl_file_has_a_conversation_a_line(tmp_path: Path) -> None:
    lines = f'[{HI}]\n\n{{"messages": [{HI}, {HI}]}}\n'

    found = read_conversations(written(tmp_path / "chat.jsonl", lines))

    assert [len(messages) for messages in found] == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", f"[{HI}]\n[{HI}", "line 2 of .* is not JSON"),
        ("c.jsonl", f"[{HI}]\n3", "line 2 of .* is not a conversation"),
        ("c.jsonl", '[{"role": "user"}]', "line 1 of .*: message 0 has content None"),
        ("c.jsonl", "\n", "has no conversation"),
        ("c.json", "", "is not JSON"),
        ("c.json", "[]", "there are no messages"),
        ("c.json", '"hello"', "is not a conversation"),
        ("c.json", f"[[{HI}], [3]]", "conversation 1 of .*: message 0 is 3"),
        ("c.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_file_is_named_with_the_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_conversations(written(tmp_path / name, text))
