"""Chat messages to prompt text, by the template that the checkpoint brings.

The template is a program from outside: it runs in Jinja's immutable sandbox, with the names and
filters that Hugging Face templates expect and nothing else.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lingc.errors import InputError
from lingc.runtime.messages import Message, check_messages

_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
"""What a template, being a program, can die of."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special: Names that templates use for special tokens: `bos_token`, `eos_token`, ….

    Raises:
        InputError: The template does not compile.
    """

    def __init__(self, source: str, *, special: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"the chat template does not compile: line {error.lineno}: {error.message}",
                hint="it comes from tokenizer_config.json or chat_template.jinja of the checkpoint",
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt for these messages.

        `add_generation_prompt` ends it with the opening of the assistant's turn;
        `enable_thinking` None leaves the template's own default.

        Raises:
            InputError: A message is malformed, or the template refuses the conversation.
        """
        check_messages(messages)
        given: dict[str, Any] = {} if enable_thinking is None else {
            "enable_thinking": enable_thinking
        }  # fmt: skip
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._special,
                **given,
            )
        except _FAULTS as error:
            raise InputError(
                f"the chat template fails on these messages: {error}",
                hint="the template decides which roles and fields it takes",
            ) from error


def _to_json(
    value: Any,
    *,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
