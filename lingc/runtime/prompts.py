"""Prompts from files and arguments, each refused by name where it cannot be read."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lingc.errors import DataError, InputError, UsageError
from lingc.runtime.messages import Message, check_messages

Conversation = Sequence[Message]

_ID = re.compile(r"-?[0-9]{1,18}")


def parse_ids(text: str) -> tuple[int, ...]:
    """Token ids from `1,2,3`; blanks may stand between them.

    Raises:
        UsageError: Something else stands there.
    """
    parts = text.replace(",", " ").split()
    for part in parts:
        if _ID.fullmatch(part) is None:
            raise UsageError(f"{part!r:.40} is not a token id", hint="token ids look like 1,2,3")
    return tuple(map(int, parts))


def decode_text(data: bytes, *, name: str) -> str:
    """Prompt text from the bytes of a file; one final line break is not part of it.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}",
            hint="convert it, for example with iconv",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def read_conversations(path: Path) -> list[Conversation]:
    """Chat conversations from a file.

    A `.jsonl` file has one conversation a line, any other file is one JSON value: a conversation,
    or a list of them. A conversation is a list of messages, or an object with `messages`.

    Raises:
        DataError: The file, a line or a message is not that.
    """
    data = path.read_bytes()
    where = repr(str(path))
    if path.suffix == ".jsonl":
        lines = [(f"line {n} of {where}", x) for n, x in enumerate(data.split(b"\n"), 1)]
        found = [_read(decode_text(x, name=name), name) for name, x in lines if x.strip()]
    else:
        value = _parse(decode_text(data, name=where), where)
        several = isinstance(value, list) and any(not _is_message(item) for item in value)
        found = [
            _conversation(item, f"conversation {n} of {where}")
            for n, item in enumerate(value if several else [value])
        ]
    if not found:
        raise DataError(f"{str(path)!r} has no conversation")
    return found


def _read(text: str, where: str) -> Conversation:
    return _conversation(_parse(text, where), where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(
            f"{where} is not JSON: {error.msg} at {line}column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "messages" not in value


def _conversation(value: Any, where: str) -> Conversation:
    messages = value.get("messages") if isinstance(value, Mapping) else value
    if not isinstance(messages, list):
        raise DataError(
            f"{where} is not a conversation",
            hint='write [{"role": "user", "content": "…"}], or {"messages": […]}',
        )
    try:
        check_messages(messages)
    except InputError as error:
        raise DataError(f"{where}: {error.problem}", hint=error.hint) from error
    return messages
