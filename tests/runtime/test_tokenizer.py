"""Text, chat messages and tokens, with the shipped checkpoint's own files and with odd ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import InputError
from lingc.runtime import Tokenizer
from lingc.runtime.chat import ChatTemplate

CHECKPOINT = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    found = Tokenizer.from_directory(CHECKPOINT)
    assert found is not None
    return found


def render(template: str, messages: list[Any] | None = None) -> str:
    return ChatTemplate(template, special={}).render([USER] if messages is None else messages)


def test_nothing_is_added_to_a_prompt(tiny: Tokenizer) -> None:
    assert tiny.encode(".. highlight:: c\n\n.. _coro") == [
        451, 390, 2148, 75, 529, 344, 275, 258, 451, 515, 1610, 78,
    ]  # fmt: skip


def test_special_tokens_in_the_text_are_one_token_and_leave_no_text(tiny: Tokenizer) -> None:
    tokens = tiny.encode("<role>HUMAN</role>Hi<|role_end|>")

    assert (tokens[0], tokens[-1]) == (4085, 4084)
    assert tiny.decode(tokens) == "HUMANHi"


def test_chat_messages_take_the_form_that_the_model_was_trained_on(tiny: Tokenizer) -> None:
    text = tiny.chat([{"role": "system", "content": "Be brief."}, USER])

    assert text == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>"
    )


def test_thinking_and_the_opening_of_the_turn_are_the_callers_choice(tiny: Tokenizer) -> None:
    text = tiny.chat([USER], enable_thinking=True, add_generation_prompt=False)

    assert text == (
        "<role>SYSTEM</role>detailed thinking on<|role_end|><role>HUMAN</role>Hi<|role_end|>"
    )


def test_the_vocabulary_is_known(tiny: Tokenizer) -> None:
    assert tiny.vocab_size == 4096


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_is_the_text(tiny: Tokenizer, text: str) -> None:
    stream = tiny.stream()

    pieces = [stream.push(token) for token in tiny.encode(text)]

    shown = "".join(pieces) + stream.flush()
    # At the very end a replacement character cannot be told from half a character.
    assert shown.rstrip("\ufffd") == text.rstrip("\ufffd")


def test_no_part_of_a_character_is_ever_shown(tiny: Tokenizer) -> None:
    text = "naïve 🙂 日本"
    stream = tiny.stream()
    tokens = tiny.encode(text)

    pieces = [stream.push(token) for token in tokens]

    assert len(tokens) > len(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_is_cut_off_is_not_shown(tiny: Tokenizer) -> None:
    stream = tiny.stream()

    shown = "".join(stream.push(token) for token in tiny.encode("a🙂")[:-1]) + stream.flush()

    assert shown == "a"


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 4095), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(tiny: Tokenizer, tokens: list[int]) -> None:
    stream = tiny.stream()

    shown = "".join(stream.push(token) for token in tokens) + stream.flush()

    assert shown.rstrip("\ufffd") == tiny.decode(tokens).rstrip("\ufffd")


def test_text_that_is_not_unicode_is_refused_with_the_place(tiny: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"character 2 of the text, '\\udcff', is not Unicode"):
        tiny.encode("ab\udcff")


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    value = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    value["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(value).encode()})

    assert tokenizer.decode(tokenizer.encode("one two three four")) == "one two three four"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no tokenizer.json"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json is not a JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json is not UTF-8"),
        ({"tokenizer_config.json": b'{"chat_template": 3}'}, "chat_template .* is a int"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(files: dict[str, bytes], message: str) -> None:
    good = {"tokenizer.json": (CHECKPOINT / "tokenizer.json").read_bytes()} if files else {}

    with pytest.raises(InputError, match=message):
        Tokenizer(good | files)


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


def test_a_template_file_goes_before_the_one_in_the_config(tmp_path: Path) -> None:
    for path in CHECKPOINT.glob("tokenizer*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer.from_directory(tmp_path)

    assert tokenizer is not None
    assert tokenizer.chat([USER]) == "<|startoftext|>Hi"


def test_of_several_named_templates_the_default_is_used() -> None:
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer = Tokenizer(
        {
            "tokenizer.json": (CHECKPOINT / "tokenizer.json").read_bytes(),
            "tokenizer_config.json": json.dumps({"chat_template": named}).encode(),
        }
    )

    assert tokenizer.chat([USER]) == "yes"


def test_without_a_template_there_is_no_chat() -> None:
    tokenizer = Tokenizer({"tokenizer.json": (CHECKPOINT / "tokenizer.json").read_bytes()})

    assert not tokenizer.has_template
    with pytest.raises(InputError, match="the checkpoint has no chat template"):
        tokenizer.chat([USER])


def test_a_template_has_the_names_that_templates_expect() -> None:
    template = (
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ eos_token }}{{ strftime_now('%%') }}"
    )

    special = {"eos_token": "END"}
    messages = [{"role": "user", "content": "<é>"}, USER]
    assert ChatTemplate(template, special=special).render(messages) == (
        '{"role": "user", "content": "<é>"}END%'
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 3 }}", "fails on these messages"),
        ("{{ messages.append(1) }}", "fails on these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails on these messages: .*unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 1 // 0 }}", "fails on these messages"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_in_words(
    template: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        render(template)


def test_a_template_that_does_not_compile_names_the_line() -> None:
    with pytest.raises(InputError, match="does not compile: line 2"):
        render("a\n{% if %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages"),
        (["hello"], "message 0 is 'hello'"),
        ([USER, {"role": "user"}], "message 1 has content None"),
        ([{"content": "x"}], "message 0 has role None"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        render("x", messages)
