"""Prompts and data files that cannot be run are refused before an engine is started."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.robustness.conftest import Refuses

ONES = ",".join(["1"] * 600)
GOOD = b'{"messages": [{"role": "user", "content": "x"}]}\n'

PROMPTS: dict[str, tuple[int, list[str], str]] = {
    "longer than the model's context": (
        3,
        ["--ids", ONES],
        r"prompt 0 has 600 tokens, the \w+ \w+ (made )?(for )?512",
    ),
    "longer than the cache": (
        3,
        ["--ids", ONES[:199], "--cache-tokens", "32"],
        r"prompt 0 has 100 tokens, the cache holds 64",
    ),
    "a token out of range": (
        3,
        ["--ids", "1,2", "--ids", "1,128"],
        r"token 128 at position 1 of prompt 1 is out of range.*128 tokens, 0 to 127",
    ),
    "a negative token": (3, ["--ids", "-1"], r"token -1 at position 0 .* is out of range"),
    "a token that is no number": (2, ["--ids", "1,a"], r"'a' is not a token id.*look like 1,2,3"),
    "a token of many digits": (2, ["--ids", "9" * 5000], r"'9{39} is not a token id"),
    "no tokens": (3, ["--ids", " "], r"prompt 0 is empty.*at least one token"),
    "text without a tokenizer": (2, ["--prompt", "x"], r"has no tokenizer.*give token ids: --ids"),
    "more drafts than verified": (2, ["--ids", "1", "--mtp", "4"], r"4 drafts .* at most 3.*--mtp"),
    "a negative temperature": (2, ["--ids", "1", "--temperature", "-1"], r"temperature is -1"),
    "a share above all": (2, ["--ids", "1", "--top-p", "2"], r"top_p is 2"),
    "a vast cache": (2, ["--ids", "1", "--cache-tokens", "9" * 30], r"can be numbered.*lingc plan"),
    "a large cache": (
        7,
        ["--ids", "1", "--cache-tokens", "9" * 11],
        r"not enough memory.*lingc pl",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_cannot_be_run_is_refused(name: str, built: Path, refuses: "Refuses") -> None:
    code, words, message = PROMPTS[name]

    said = refuses(code, "run", built, *words, "-q")

    assert re.search(message, said, re.DOTALL)
    assert len(said) < 600


MESSAGES: dict[str, tuple[str, bytes, str]] = {
    "a broken line": (
        "m.jsonl",
        GOOD + b"\n" + b'{"messages":\n',
        r"line 3 of '.*m\.jsonl' is not J",
    ),
    "a line that is no conversation": (
        "m.jsonl",
        GOOD + b'"x"\n',
        r"line 2 of .* is not a convers",
    ),
    "a message without content": (
        "m.jsonl",
        GOOD * 2 + b'{"messages": [{"role": "user"}]}',
        r"line 3 of .*: message 0 has content None",
    ),
    "a line in another encoding": (
        "m.jsonl",
        GOOD + GOOD.replace(b"x", b"\xff"),
        r"line 2 of .* is not UTF-8.*iconv",
    ),
    "a line of brackets": ("m.jsonl", GOOD + b"[" * 100_000, r"line 2 of .* is not JSON: max"),
    "an empty file": ("m.jsonl", b"\n", r"m\.jsonl' has no conversation"),
    "a broken file": ("m.json", b'[\n{"role": 1,}]', r"m\.json' is not JSON: .* at line 2, column"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_cannot_be_read_are_refused_by_line(
    name: str, built: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    file, data, message = MESSAGES[name]
    (tmp_path / file).write_bytes(data)

    said = refuses(3, "run", built, "--messages", tmp_path / file, "-q")

    assert re.search(message, said, re.DOTALL)


def test_rows_that_cannot_be_scored_are_refused_by_line(
    built: Path, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"input_ids": [1, 2]}\n{"input_ids": [1,\n{"input_ids": [1, 999]}\n{"txt": ""}\n'
    )

    said = refuses(3, "parity", built, small, "--data", data, "-q")

    assert re.search(r"has 3 bad lines", said)
    assert re.search(r"line 2: it is not JSON: .* at column", said)
    assert re.search(r"line 3: token 999 at position 1 is out of range", said)
    assert re.search(r"line 4: .*text", said)
