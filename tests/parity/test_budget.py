"""Budgets: what each limit refuses, and every mistake in a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc.errors import InputError
from lingc.parity.budget import Budget, built_in, judge, load_budget
from lingc.parity.compare import Comparison, Summary
from tests.parity.hand import VOCAB, HandSide, rows

ROW = rows(8)


def summary(*, at: int = 3, token: int = 0, size: float = 0.0) -> Summary:
    bump = np.zeros(VOCAB, np.float32)
    bump[token] = size
    a, b = HandSide("a", ROW), HandSide("b", ROW, bumps={(1, at): bump})
    found = Comparison("prefill", None)
    ids = [ROW[0].ids]
    found.add(0, a.score(ids, "prefill")[0], b.score(ids, "prefill")[0])
    return found.summary(1e-3)


def broken(found: Summary, budget: Budget) -> list[str]:
    return [check.name for check in judge(found, budget) if not check.ok]


@pytest.mark.parametrize(
    ("name", "limit"),
    [("mean_kl", 1e-6), ("max_kl", 1e-5), ("mean_abs", 1e-3), ("max_abs", 1e-2)],
)
def test_each_limit_is_kept_by_equal_sides_and_broken_by_a_bump(name: str, limit: float) -> None:
    budget = Budget(**{"name": "one", name: limit})  # type: ignore[arg-type]

    assert broken(summary(), budget) == []
    assert broken(summary(size=3.0), budget) == [name]


def test_another_winner_breaks_the_count_and_the_share() -> None:
    counted = Budget(name="count", top1_disagreements_above_margin=0)
    shared = Budget(name="share", top1_agreement=0.9)
    found = summary(size=30.0)

    assert broken(found, counted) == ["top1_disagreements_above_margin"]
    assert broken(found, shared) == ["top1_agreement"]
    assert broken(found, Budget(name="one allowed", top1_disagreements_above_margin=1)) == []


def test_a_logit_that_is_not_finite_breaks_every_budget() -> None:
    assert broken(summary(size=float("nan")), load_budget("quantized")) == ["finite"]
    assert "mean_kl" in broken(summary(size=float("nan")), load_budget("engine-vs-eager"))


def test_built_in_budgets_read_and_name_themselves() -> None:
    assert {load_budget(name).name for name in built_in()} == {"engine-vs-eager", "quantized"}


def test_the_strict_budget_is_the_promised_one() -> None:
    budget = load_budget("engine-vs-eager")

    assert (budget.mean_kl, budget.margin, budget.expert_gap) == (1e-6, 1e-3, 1e-5)
    assert budget.top1_disagreements_above_margin == 0


def test_a_file_is_read_by_its_path_and_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"mean_kl": 0.5, "max_kl": null}', encoding="utf-8")

    assert load_budget(path) == Budget(name="mine", mean_kl=0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "holds a list, not an object"),
        ({"mean_k": 1}, "'mean_k' is not a key of a budget, did you mean 'mean_kl'?"),
        ({"max_kl": "small"}, "'max_kl' is 'small', it must be a number"),
        ({"max_kl": -1}, "'max_kl' is -1, it must be a number, 0 or more"),
        ({"max_kl": True}, "'max_kl' is True, it must be a number"),
        ({"margin": None}, "'margin' is None, it must be a number"),
        ({"name": 3}, "'name' is 3, it must be text"),
        ({"top1_disagreements_above_margin": 1.5}, "is 1.5, it must be a whole number"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(value), encoding="utf-8")

    with pytest.raises(InputError) as raised:
        load_budget(path)

    assert message in raised.value.problem


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"a": 1, "b": 2}', encoding="utf-8")

    with pytest.raises(InputError, match=r"'a' is not a key.*\n.*'b' is not a key"):
        load_budget(path)


def test_a_name_too_long_for_a_file_is_answered() -> None:
    with pytest.raises(InputError, match="no budget is called 'zzz"):
        load_budget("z" * 300)


def test_what_is_no_file_is_answered() -> None:
    with pytest.raises(InputError, match="no budget is called 'quantised'") as raised:
        load_budget("quantised")
    assert raised.value.hint is not None
    assert "did you mean 'quantized'?" in raised.value.hint

    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_budget("no/such.json")


def test_text_that_is_not_json_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text("{", encoding="utf-8")

    with pytest.raises(InputError, match="is not JSON"):
        load_budget(path)
