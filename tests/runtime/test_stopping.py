"""Stop strings and stop ids, alone and in the generation loop."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.errors import ConfigError
from lingc.runtime import Completion, Finish, Generator, Limits, Request, Token
from lingc.runtime.stopping import StopFilter, stop_ids
from tests.runtime.letters import PIECES, letters
from tests.runtime.toy import VOCAB, ToyBackend, expected_greedy


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 20), max_size=12),
)
def test_how_text_is_cut_does_not_matter(text: str, stops: list[str], places: list[int]) -> None:
    def run(pieces: list[str]) -> tuple[str, bool]:
        found = StopFilter(tuple(stops))
        shown = "".join(found.push(piece) for piece in pieces)
        return shown + found.flush(), found.has_stopped

    assert run(cut(text, places)) == run(list(text))


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=20), stop=st.text("ab", min_size=1, max_size=4))
def test_text_goes_up_to_the_first_stop_string(text: str, stop: str) -> None:
    found = StopFilter((stop,))

    shown = "".join(map(found.push, text)) + found.flush()

    assert shown == text.partition(stop)[0]
    assert found.has_stopped == (stop in text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    found = StopFilter(("\n\n",))

    assert [found.push(piece) for piece in ("one\n", "two", "\n", "\nthree")] == [
        "one", "\ntwo", "", "",
    ]  # fmt: skip
    assert found.has_stopped


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
    count=st.integers(1, 20),
    stops=st.lists(st.text("abcde é", min_size=1, max_size=3), max_size=3),
    drafts=st.integers(0, 3),
)
def test_a_completion_ends_at_its_stop_string_with_or_without_drafts(
    prompt: list[int], count: int, stops: list[str], drafts: int
) -> None:
    tokenizer = letters()
    backend = ToyBackend(Limits(slots=1, pages=12), is_off=lambda s, _a: s % 3 == 0)
    request = Request(
        tokens=tuple(prompt), max_tokens=count, stop=tuple(stops), stop_ids=frozenset()
    )

    events = list(Generator(backend, tokenizer, drafts=drafts).stream([request]))

    tokens = expected_greedy(prompt, count)
    *streamed, found = events
    assert isinstance(found, Completion)
    assert "".join(e.text for e in streamed if isinstance(e, Token)) == found.text
    assert list(found.tokens) == tokens[: len(found.tokens)]
    whole = tokenizer.decode(found.tokens)
    if found.finish is Finish.STOP_STRING:
        assert whole.startswith(found.text)
        assert any(whole.startswith(found.text + stop) for stop in stops)
        before = tokenizer.decode(found.tokens[:-1]).rstrip("\ufffd")
        assert not any(stop in before for stop in stops)
    else:
        assert len(found.tokens) == count
        assert found.text.rstrip("\ufffd") == whole.rstrip("\ufffd")
        assert not any(stop in whole for stop in stops)


def test_a_stop_id_shows_no_text_of_its_own() -> None:
    tokenizer = letters()
    tokens = expected_greedy([2], 6)
    stop = next(t for t in tokens if t != 22 and PIECES[t].isascii())
    generator = Generator(ToyBackend(Limits(slots=1, pages=4)), tokenizer)

    (found,) = generator.generate([Request(tokens=(2,), max_tokens=6, stop_ids=frozenset({stop}))])

    assert found.tokens[-1] == stop
    assert found.text == tokenizer.decode(found.tokens[:-1]).rstrip("\ufffd")


def test_stop_ids_come_from_both_configs() -> None:
    assert stop_ids({"eos_token_id": [4081, 4084]}, {"eos_token_id": 4085}) == {4081, 4084, 4085}
    assert stop_ids({}, {"eos_token_id": None}) == frozenset()


@pytest.mark.parametrize("value", ["4084", [1, "2"], True, 1.5])
def test_a_stop_id_that_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id is .*, it must be a token id"):
        stop_ids({"eos_token_id": value})
