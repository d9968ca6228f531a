"""What the model of time prefers, and what overrides it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingc import targets
from lingc.errors import InputError
from lingc.kernel import Kernel, Launch, Tactic
from lingc.plan import TensorType
from lingc.plugins.table import OPS
from lingc.targets.cuda import tactics
from lingc.targets.cuda.tactics import (
    ALLOWED,
    Choice,
    Reach,
    Row,
    choose,
    features,
    key,
    kind,
    near,
    predict,
    predict_features,
    rank,
    read_rows,
)

H200 = targets.get("h200-sxm")
H20 = targets.get("h20")
KERNEL = Kernel(language="cuda", source="kernels/ceiling.cu", entry="read_all", arguments=(),
                warps=4)  # fmt: skip


def launch(**changes: object) -> Launch:
    whole = Launch(kernel=KERNEL, grid=(132, 1, 1), operands=(), dependent=True,
                   moved_bytes=67e6, rate="fp8")  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_bytes_cost_what_the_bandwidth_says() -> None:
    seconds = predict(launch(), H200)

    assert 67e6 / 4.8e12 < seconds < 1.5 * 67e6 / 4.8e12


def test_a_grid_that_does_not_fill_the_device_draws_less() -> None:
    assert predict(launch(grid=(16, 1, 1)), H200) > 2 * predict(launch(), H200)


def test_a_launch_that_waits_for_the_one_before_costs_more() -> None:
    assert predict(launch(dependent=False), H200) > predict(launch(), H200)


def test_padding_to_64_rows_is_free_on_h200_and_not_on_h20() -> None:
    padded = launch(flops=67e6 * 2 * 64)

    assert predict(padded, H200) < 1.1 * predict(launch(), H200)
    assert predict(padded, H20) > 1.5 * predict(launch(), H20)


def test_equal_predictions_keep_the_ops_own_order() -> None:
    some = [Tactic(name=name, launches=(launch(),)) for name in ("b", "a", "c")]

    assert [choice.tactic.name for choice in rank(some, H200)] == ["b", "a", "c"]


def test_an_op_without_kernels_says_so() -> None:
    x = TensorType("bf16", (4, 64))

    with pytest.raises(InputError, match=r"silu_mul has no kernel for .*none is written yet"):
        choose(replace(OPS["silu_mul"], tactics=lambda *_: ()), H200, [x])


def test_a_measured_row_overrides_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x = TensorType("bf16", (4, 64))
    some = [Tactic(name=name, launches=(launch(),)) for name in ("first", "second")]
    op = replace(OPS["silu_mul"], tactics=lambda *_: some, refusal=lambda *_: None)
    row = Row(op="silu_mul", key=key([x]), tactic="second", microseconds=9.5, device="a GPU",
              sms=132, date="2026-11-22", command="lingc bench-ops")  # fmt: skip
    monkeypatch.setattr(tactics, "measured", lambda _target: {(row.op, row.key): row})

    choice = choose(op, H200, [x])

    assert choice.tactic.name == "second"
    assert choice.seconds == pytest.approx(9.5e-6)
    assert choice.origin == "a GPU, 132 SMs, 2026-11-22"


def test_a_row_of_a_tactic_that_is_gone_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    x = TensorType("bf16", (4, 64))
    op = replace(
        OPS["silu_mul"],
        tactics=lambda *_: [Tactic(name="new", launches=(launch(),))],
        refusal=lambda *_: None,
    )
    row = Row(op="silu_mul", key=key([x]), tactic="old", microseconds=1.0, device="a GPU",
              sms=132, date="2026-11-22", command="lingc bench-ops")  # fmt: skip
    monkeypatch.setattr(tactics, "measured", lambda _target: {(row.op, row.key): row})

    assert choose(op, H200, [x]).origin == "model"


def test_shipped_rows_name_their_measurement() -> None:
    folder = Path(tactics.__file__).parents[1] / "tactics"
    for path in sorted(folder.glob("*.json")):
        if path.stem == "model":
            continue
        rows = read_rows(path)
        assert targets.get(path.stem)
        assert all(row.microseconds > 0 and row.device and row.date for row in rows.values())
        assert len(rows) == len(json.loads(path.read_text(encoding="utf-8"))["rows"])


def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('{"rows": [{"op": "silu_mul"}]}', encoding="utf-8")

    with pytest.raises(InputError, match=r"rows\.json' holds no rows of tactics"):
        read_rows(file)


# ------------------------------------------------------------------------------------------- model


def test_every_launch_has_a_kind_that_tells_the_format_of_weights() -> None:
    some = dict(KERNEL.constants) | {"FORMAT": 2}
    triton = replace(KERNEL, language="triton", source="lingc.kernels.triton_rows:norm_rows",
                     entry="norm_rows")  # fmt: skip

    assert kind(launch()) == "ceiling.read_all"
    assert kind(launch(kernel=replace(KERNEL, constants=tuple(some.items())))) == (
        "ceiling.read_all.int4"
    )
    assert kind(launch(kernel=triton)) == "triton_rows.norm_rows"


def test_what_a_multiprocessor_issues_holds_back_where_there_are_few() -> None:
    known = Reach(floor_s=2e-6, read=0.95, issue=0.7e12, mma=1.0)
    products = features(launch(flops=1.2e9, rate="bf16", moved_bytes=38e6))
    half = replace(H200, sms=66)

    assert predict_features(products, half, known) > 1.8 * predict_features(
        products, H200, known
    ) - known.floor_s  # fmt: skip


def test_what_is_alike_to_the_model_stays_in_the_ops_own_order() -> None:
    some = [Tactic(name="first", launches=(launch(moved_bytes=67.5e6),)),
            Tactic(name="second", launches=(launch(),)),
            Tactic(name="slow", launches=(launch(moved_bytes=99e6),))]  # fmt: skip

    assert [one.tactic.name for one in rank(some, H200)] == ["first", "second", "slow"]
    assert [one.tactic.name for one in rank(some[::-1], H200)] == ["second", "first", "slow"]


# --------------------------------------------------------------------------------------- neighbours

NAMES = ("a", "b", "c", "d")
SIZES = st.integers(min_value=1, max_value=300)


def named(tokens: int, width: int = 64, literal: str = "fp8") -> str:
    return key([TensorType("bf16", (tokens, width)), None, TensorType("f32", ("S", 4)), literal])


def a_row(name: str, tactic: str, op: str = "silu_mul") -> Row:
    return Row(op=op, key=name, tactic=tactic, microseconds=9.0, device="a GPU", sms=132,
               date="2026-11-22", command="lingc tune")  # fmt: skip


def table(*rows: Row) -> dict[tuple[str, str], Row]:
    return {(row.op, row.key): row for row in rows}


def ranked(**slower: float) -> list[Choice]:
    """Tactics of one shape, by how many times slower than the best the model finds them."""
    some = {name: slower.get(name, 1.0) for name in NAMES}
    made = [Choice(tactic=Tactic(name=name, launches=()), seconds=1e-5 * times)
            for name, times in some.items()]  # fmt: skip
    return sorted(made, key=lambda choice: choice.seconds)


def test_a_close_neighbours_tactic_is_taken() -> None:
    choice = near(table(a_row(named(8), "b")), "silu_mul", named(12), ranked(b=1.05))

    assert choice is not None
    assert choice.tactic.name == "b"
    assert choice.seconds == pytest.approx(1.05e-5)  # predicted: the row is of another shape
    assert choice.origin == "near a GPU, 132 SMs, 2026-11-22"


@pytest.mark.parametrize(
    "row",
    [
        a_row(named(4), "b"),  # three times smaller
        a_row(named(8, literal="int4"), "b"),
        a_row(named(8), "b", op="rms_norm"),
        a_row(named(8), "gone"),
        a_row(named(8, width=16), "b"),
        a_row(key([TensorType("f32", (8, 64)), None, TensorType("f32", ("S", 4)), "fp8"]), "b"),
    ],
)
def test_others_are_no_neighbours(row: Row) -> None:
    assert near(table(row), "silu_mul", named(12), ranked()) is None


def test_farther_rows_count_where_both_sides_agree() -> None:
    low, high = a_row(named(1), "b"), a_row(named(64), "b")

    assert near(table(low), "silu_mul", named(8), ranked()) is None
    assert near(table(low, high), "silu_mul", named(8), ranked()) is not None
    assert near(table(low, a_row(named(64), "c")), "silu_mul", named(8), ranked()) is None


@given(
    rows=st.lists(st.tuples(SIZES, SIZES, st.sampled_from((*NAMES, "gone"))), max_size=8),
    tokens=SIZES,
    width=SIZES,
    slower=st.fixed_dictionaries({name: st.floats(1.0, 2.0) for name in NAMES}),
)
def test_no_shape_is_worse_off_than_the_model_allows(
    rows: list[tuple[int, int, str]], tokens: int, width: int, slower: dict[str, float]
) -> None:
    known = table(*(a_row(named(a, b), tactic) for a, b, tactic in rows))
    candidates = ranked(**slower)

    choice = near(known, "silu_mul", named(tokens, width), candidates)
    again = near(dict(reversed(known.items())), "silu_mul", named(tokens, width), candidates)

    assert choice == again  # whatever order the rows stand in
    if choice is not None:
        assert choice.tactic in [one.tactic for one in candidates]
        assert choice.seconds <= candidates[0].seconds * (1 + ALLOWED)
        assert choice.row in known.values()
        assert choice.row is not None
        assert choice.row.tactic == choice.tactic.name


@given(
    rows=st.lists(st.tuples(SIZES, SIZES, st.sampled_from(NAMES)), min_size=1, max_size=8),
    tokens=SIZES,
)
def test_rows_that_agree_are_followed_between_them(
    rows: list[tuple[int, int, str]], tokens: int
) -> None:
    known = table(*(a_row(named(a), "b") for a, _, _ in rows))
    measured_at = [a for a, _, _ in rows]

    choice = near(known, "silu_mul", named(tokens), ranked())

    inside = min(measured_at) <= tokens <= max(measured_at)
    close = any(max(a, tokens) <= 2 * min(a, tokens) for a in measured_at)
    assert (choice is not None) == (inside or close)


def test_a_target_of_as_many_multiprocessors_is_a_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = TensorType("bf16", (4, 64))
    some = [Tactic(name=name, launches=(launch(),)) for name in ("first", "second")]
    op = replace(OPS["silu_mul"], tactics=lambda *_: some, refusal=lambda *_: None)
    rows = {"h200-sxm": table(a_row(key([x]), "second"))}
    monkeypatch.setattr(tactics, "measured", lambda target: rows.get(target.name, {}))
    tactics.kin.cache_clear()

    chosen = {name: choose(op, targets.get(name), [x]) for name in ("h200-sxm", "h100-sxm", "h20")}

    tactics.kin.cache_clear()
    assert {name: one.tactic.name for name, one in chosen.items()} == {
        "h200-sxm": "second", "h100-sxm": "second", "h20": "first",
    }  # fmt: skip
    assert chosen["h100-sxm"].is_near
    assert chosen["h100-sxm"].seconds == pytest.approx(predict(launch(), targets.get("h100-sxm")))
