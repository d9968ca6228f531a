"""Chat messages, before a template makes a prompt of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lingc.errors import InputError

Message = Mapping[str, Any]
"""`role` and `content`, both text, and whatever else the template reads."""


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is not a conversation, naming the message."""
    if not messages:
        raise InputError("there are no messages", hint='give at least one {"role": "user", …}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {index} is {message!r}, it must be an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"message {index} has {key} {message.get(key)!r}, it must be text")
