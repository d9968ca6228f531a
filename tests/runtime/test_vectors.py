"""Test vectors: recorded from one backend, held against another."""

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from lingc.errors import InputError
from lingc.runtime import Limits
from lingc.runtime.backend import Array
from lingc.runtime.vectors import Case, check, decode, encode, record, tokens_needed
from tests.runtime.toy import ToyBackend, expected_greedy, expected_logits, plan

PROMPTS = {"short": [3], "long": [1, 2, 3, 4, 5, 6, 7]}


class Wrong(ToyBackend):
    """A toy that spoils one phase's logits."""

    def __init__(self, phase: str, add: float) -> None:
        super().__init__(Limits(slots=1, pages=8))
        self.phase = phase
        self.add = add

    def run(self, phase: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        out = super().run(phase, inputs)
        if phase == self.phase:
            out["logits"][..., 5] += self.add
        return out


def cases() -> list[Case]:
    return record(ToyBackend(Limits(slots=1, pages=8)), PROMPTS, count=6, tolerance=1e-4)


def test_a_case_records_logits_tokens_and_margins() -> None:
    short, long = cases()

    assert list(short.tokens) == expected_greedy([3], 6)
    assert list(long.tokens) == expected_greedy(PROMPTS["long"], 6)
    assert np.array_equal(long.logits, expected_logits(PROMPTS["long"]))
    second, first = sorted(expected_logits([3]).tolist())[-2:]
    assert short.margins[0] == pytest.approx(first - second)


def test_the_same_engine_is_right() -> None:
    backend = ToyBackend(Limits(slots=1, pages=8))

    results = [check(backend, case) for case in cases()]

    assert [(r.case, r.is_right, r.logit_error, r.compared) for r in results] == [
        ("short", True, 0.0, 6),
        ("long", True, 0.0, 6),
    ]
    assert tokens_needed(cases()) == 13


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("prefill", "logits differ by 9, 0.0001 is allowed"),
        ("decode", "token 1 is 5, it must be"),
        ("verify", "with 3 drafts a round token 1 is 5, it must be"),
    ],
)
def test_an_engine_that_is_wrong_in_one_phase_is_told(phase: str, message: str) -> None:
    result = check(Wrong(phase, 9.0), cases()[1])

    assert not result.is_right
    assert any(message in problem for problem in result.problems)


def test_wrong_drafts_are_slow_and_not_wrong() -> None:
    assert check(Wrong("draft", 9.0), cases()[1]).is_right


def test_a_difference_within_the_tolerance_is_right() -> None:
    case = replace(cases()[0], tolerance=1e-2)

    result = check(Wrong("prefill", 5e-3), case)

    assert result.is_right
    assert result.logit_error == pytest.approx(5e-3, rel=1e-3)


def test_a_logit_that_is_no_number_is_wrong() -> None:
    result = check(Wrong("prefill", float("nan")), replace(cases()[0], margins=(0.0,) * 6))

    assert result.problems[0] == "logits differ by nan, 0.0001 is allowed"
    assert result.problems[-1].startswith("with 3 drafts a round the engine returned a logit of")


def test_near_ties_are_not_compared() -> None:
    case = cases()[0]
    wrong = replace(case, tokens=(*case.tokens[:5], 23), margins=(*case.margins[:5], 1e-4))

    result = check(ToyBackend(Limits(slots=1, pages=8)), wrong)

    assert result.is_right
    assert result.compared == 5


def test_an_engine_without_a_draft_layer_is_held_to_the_rest() -> None:
    backend = ToyBackend(Limits(slots=1, pages=8), plan(has_draft=False))

    assert check(backend, cases()[0]).is_right


def test_cases_read_back_and_are_the_same_bytes_each_time() -> None:
    files = encode(cases())

    found = decode(files)

    assert encode(found) == files == encode(cases())
    assert sorted(files) == ["cases.json", "vectors.safetensors"]
    assert found[1].prompt == (1, 2, 3, 4, 5, 6, 7)


def spoilt(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    document = json.loads(files["cases.json"])
    document["cases"][0] |= changes
    return files | {"cases.json": json.dumps(document).encode()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "other"}, "cannot be read: KeyError"),
        ({"margins": []}, "has 1 prompt tokens, 6 tokens and 0 margins"),
        ({"prompt": ["x"]}, "cannot be read: ValueError"),
    ],
)
def test_cases_that_contradict_themselves_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        decode(spoilt(encode(cases()), **changes))


def test_cases_of_a_newer_format_are_refused() -> None:
    files = encode(cases()) | {"cases.json": b'{"format": 2}'}

    with pytest.raises(InputError, match="the test cases have format 2, this lingc reads up to 1"):
        decode(files)
