"""What the model of time prefers, and what overrides it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lingc import targets
from lingc.errors import InputError
from lingc.kernel import Kernel, Launch, Tactic
from lingc.plan import TensorType
from lingc.plugins.table import OPS
from lingc.targets.cuda import tactics
from lingc.targets.cuda.tactics import Row, choose, key, predict, rank

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

    assert predict(padded, H200) == predict(launch(), H200)
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
        rows = [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        assert targets.get(path.stem)
        assert all(row.microseconds > 0 and row.device and row.date for row in rows)
        assert len({(row.op, row.key) for row in rows}) == len(rows)
