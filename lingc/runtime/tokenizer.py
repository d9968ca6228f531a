"""Text to tokens and back, by the files that the checkpoint brings.

Nothing is added to a prompt: no beginning-of-text token, no template unless asked for. Special
tokens that stand in the text are recognised, and are left out of the text that is produced.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import tokenizers

from lingc.errors import InputError
from lingc.runtime.messages import Message

if TYPE_CHECKING:
    from lingc.runtime.chat import ChatTemplate

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What a tokenizer is read from; only the first is needed."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for a character whose last bytes are still to come."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Args:
        files: The bytes of each of `FILES` that the checkpoint has.

    Raises:
        InputError: `tokenizer.json` is missing, or a file cannot be read.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise InputError("there is no tokenizer.json", hint="give token ids, or add the file")
        try:
            self._model = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except ValueError as error:
            raise InputError(f"tokenizer.json cannot be read: {error}") from error
        # Either would change a prompt without a word.
        self._model.no_truncation()
        self._model.no_padding()
        config = _object(files, "tokenizer_config.json")
        self._special = {
            name: token
            for name, value in config.items()
            if name.endswith("_token") and (token := _token_text(value)) is not None
        }
        self._source = _template_source(files, config)
        self._template: ChatTemplate | None = None

    @classmethod
    def from_directory(cls, directory: Path) -> Self | None:
        """The tokenizer of a checkpoint or package, or None where it has none."""
        files = {name: (directory / name) for name in FILES}
        found = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        return cls(found) if "tokenizer.json" in found else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id it can produce."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_template(self) -> bool:
        return self._source is not None

    def encode(self, text: str) -> list[int]:
        """Tokens of the text, nothing added."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of the text, {text[error.start]!r}, is not Unicode text",
                hint="the text was probably not UTF-8 where it was read",
            ) from error
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, without the special ones."""
        text: str = self._model.decode(list(tokens), skip_special_tokens=True)
        return text

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt text of a conversation; see `ChatTemplate.render`."""
        if self._source is None:
            raise InputError(
                "the checkpoint has no chat template", hint="give the prompt as plain text"
            )
        if self._template is None:
            # Jinja takes as long to import as all the rest, and most prompts are no conversations.
            from lingc.runtime.chat import ChatTemplate  # noqa: PLC0415

            self._template = ChatTemplate(self._source, special=self._special)
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )

    def stream(self) -> "TextStream":
        """A decoder for one completion."""
        return TextStream(self)


class TextStream:
    """Turns one completion's tokens into text, a token at a time.

    A token may end in the middle of a character, and decoding may treat a token by what stands
    before it. So each step decodes a short window twice, without and with the new token, and
    gives what the second has more, once it ends with a whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # leading tokens of the window whose text was given

    def push(self, token: int) -> str:
        """The text that this token completes; often a word, sometimes nothing."""
        self._window.append(token)
        before, after = self._texts()
        if after == before:  # a special token, which leaves no trace
            self._window.pop()
            return ""
        if after.endswith(_INCOMPLETE) or len(after) < len(before):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return after[len(before) :]

    def flush(self) -> str:
        """What is left when no token follows; a character that was cut off is not shown."""
        before, after = self._texts()
        self._window, self._shown = [], 0
        return after[len(before) :].rstrip(_INCOMPLETE)

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._window[: self._shown]), decode(self._window)


def _text(files: Mapping[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8: {error}") from error


def _object(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(_text(files, name))
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{name} is not a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) else None


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return _text(files, "chat_template.jinja")
    value = config.get("chat_template")
    if isinstance(value, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise InputError(f"chat_template of tokenizer_config.json is a {type(value).__name__}")
    return value
