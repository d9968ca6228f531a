r"""Rows to score, from a JSONL file.

A line is an object with one of these keys; what else it holds (a source, a licence) is left alone.

    {"text": "..."}                                      tokenized as it is, nothing added
    {"messages": [{"role": "user", "content": "..."}]}   through the checkpoint's chat template
    {"input_ids": [1, 2, 3]}                             no tokenizer needed

A conversation that ends with the assistant's words is scored as it stands; any other is followed by
the opening of the assistant's turn. Empty lines are skipped.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from lingc.errors import DataError, InputError
from lingc.runtime.tokenizer import Tokenizer

SAMPLE = Path(__file__).parent / "data" / "sample.jsonl"
"""Sixteen rows that come with lingc; their licences lie beside them."""

KEYS = ("text", "messages", "input_ids")
MAX_LINE_BYTES = 16 << 20

_MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row to score.

    Attributes:
        line: Where it stands in the file, from 1.
        ids: Its tokens, cut to the most that were asked for.
        bytes: Of its text, whole; None for tokens and messages.
    """

    line: int
    ids: tuple[int, ...]
    bytes: int | None = None


def read_rows(
    path: str | Path,
    *,
    vocab: int,
    tokenizer: Tokenizer | None = None,
    samples: int | None = None,
    max_tokens: int | None = None,
) -> list[Row]:
    """Read and check the first rows of a file.

    Args:
        path: The file.
        vocab: Token ids must lie below it.
        tokenizer: For `text` and `messages`.
        samples: How many rows to read; all where None. Lines after them are not looked at.
        max_tokens: What to cut rows to.

    Raises:
        DataError: The file cannot be read or holds no row, or lines are bad; they are listed with
            their numbers.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in _lines(Path(path)):
        if isinstance(line, str):
            problems.append(f"line {number}: {line}")
        elif line.strip():
            try:
                ids = _ids(line, vocab, tokenizer)
            except _BadLineError as error:
                problems.append(f"line {number}: {error}")
            else:
                text = _object(line).get("text")
                size = len(text.encode()) if isinstance(text, str) else None
                rows.append(Row(line=number, ids=tuple(ids[:max_tokens]), bytes=size))
        if len(problems) == _MAX_PROBLEMS or len(rows) == samples:
            break
    if problems:
        _fail(path, problems)
    if not rows:
        raise DataError(
            f"{str(path)!r} holds no rows",
            hint=f"write one JSON object a line, with one of the keys {', '.join(KEYS)}",
        )
    return rows


def refuse_longer(what: str, tokens: int, most: int, option: str) -> None:
    """Refuse what has more tokens than a model has positions.

    Args:
        what: `line 3 of 'a.jsonl'`.
        tokens: How many it has.
        most: Positions that the model was made for.
        option: Of the command, which cuts to so many.

    Raises:
        DataError: It has more.
    """
    if tokens > most:
        raise DataError(
            f"{what} has {tokens} tokens, the model was made for {most}",
            hint=f"{option} {most} cuts to that, and less takes less memory",
        )


class _BadLineError(Exception):
    """What is wrong with a line, in words."""


def _fail(path: str | Path, problems: list[str]) -> None:
    count = "a bad line" if len(problems) == 1 else f"{len(problems)} bad lines"
    if len(problems) == _MAX_PROBLEMS:
        count = f"{_MAX_PROBLEMS} bad lines, and was not read further"
    raise DataError(
        f"{str(path)!r} has {count}:" + "".join(f"\n  - {line}" for line in problems),
        hint="correct or remove those lines; each is one JSON object, in UTF-8",
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """Numbered lines; in place of one that is too long, what is wrong with it."""
    try:
        with path.open("rb") as file:
            yield from _bounded(file)
    except OSError as error:
        raise DataError(
            f"data file {str(path)!r} cannot be read: {error.strerror or error}",
            hint="give a JSONL file",
        ) from error


def _bounded(file: BufferedReader) -> Iterator[tuple[int, bytes | str]]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            continue
        yield number, f"it is longer than {MAX_LINE_BYTES >> 20} MiB"
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


def _ids(line: bytes, vocab: int, tokenizer: Tokenizer | None) -> list[int]:
    value = _object(line)
    found = [key for key in KEYS if key in value]
    if len(found) > 1:
        raise _BadLineError(f"it has both {found[0]!r} and {found[1]!r}; keep one of them")
    if not found:
        raise _BadLineError(_no_key(value))
    (key,) = found
    ids = _given(value[key]) if key == "input_ids" else _encoded(key, value[key], tokenizer)
    if not ids:
        raise _BadLineError(f"{key!r} is empty: it gives no token")
    for position, token in enumerate(ids):
        if not 0 <= token < vocab:
            why = "" if key == "input_ids" else ", so the tokenizer is not the model's"
            raise _BadLineError(
                f"token {token} at position {position} is out of range; "
                f"the vocabulary has {vocab} tokens, 0 to {vocab - 1}{why}"
            )
    return ids


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.rstrip(b"\r\n").decode()
    except UnicodeDecodeError as error:
        raise _BadLineError(
            f"it is not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _BadLineError(f"it is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise _BadLineError("it is not a row: it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise _BadLineError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _BadLineError(f"it holds a {type(value).__name__}, not an object")
    return value


def _no_key(value: dict[str, Any]) -> str:
    wanted = ", ".join(map(repr, KEYS))
    if not value:
        return f"it is an empty object; one of {wanted} is needed"
    has = ", ".join(repr(key) for key in list(value)[:8])
    for key in value:
        near = difflib.get_close_matches(key, KEYS, n=1)
        if near:
            return f"it has none of {wanted}; is {key!r} meant as {near[0]!r}?"
    return f"it has none of {wanted}; it has {has}"


def _given(value: object) -> list[int]:
    if not isinstance(value, list):
        raise _BadLineError(f"'input_ids' is {value!r:.40}, not a list")
    for position, token in enumerate(value):
        if not isinstance(token, int) or isinstance(token, bool):
            raise _BadLineError(f"'input_ids' has {token!r:.40} at {position}, which is no token")
    return value


def _encoded(key: str, value: object, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise _BadLineError(f"it has {key!r}, but there is no tokenizer; give 'input_ids'")
    if key == "text":
        if not isinstance(value, str):
            raise _BadLineError(f"'text' is {value!r:.40}, not text")
        return _answered(lambda: tokenizer.encode(value))
    if not isinstance(value, list):
        raise _BadLineError(f"'messages' is {value!r:.40}, not a list")
    last = value[-1] if value else None
    is_whole = isinstance(last, dict) and last.get("role") == "assistant"
    return _answered(
        lambda: tokenizer.encode(tokenizer.chat(value, add_generation_prompt=not is_whole))
    )


def _answered(work: Callable[[], list[int]]) -> list[int]:
    try:
        return work()
    except InputError as error:
        raise _BadLineError(error.problem) from error
