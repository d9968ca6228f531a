"""Results on stdout, the rest on stderr, and nothing lost where nobody watches."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from lingc.cli import progress
from lingc.cli.output import Output, bytes_text, from_flags, seconds_text


@dataclass
class Point:
    where: Path
    size: int


def test_a_table_keeps_brackets_and_is_not_cut_where_stdout_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wide = "lingc::add_rms_norm[T, 4096] " * 10

    Output().table(("type", "count"), [(wide, 3), ("f32[bold]", None)], title="steps")

    said = capsys.readouterr().out
    assert wide.strip() in said
    assert "f32[bold]" in said
    assert said.lstrip().startswith("steps")


def test_numbers_stand_to_the_right_and_words_to_the_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output().table(("name", "bytes", "why"), [("a", "9 B", "x"), ("b", "1.29 GB", "yes")])

    _, _, _, first, second, _ = capsys.readouterr().out.split("\n")[:6]
    assert "      9 B" in first
    assert first.index("9 B") + 3 == second.index("1.29 GB") + 7


def test_a_document_may_hold_dataclasses_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).emit({"point": Point(where=Path("a/b"), size=3), "name": "中"})

    said = capsys.readouterr().out
    assert json.loads(said) == {"point": {"where": "a/b", "size": 3}, "name": "中"}
    assert "中" in said


def test_a_document_of_anything_else_is_a_mistake() -> None:
    with pytest.raises(TypeError, match=r"object .* has no JSON form"):
        Output(as_json=True).emit({"x": object()})


@pytest.mark.parametrize(("verbosity", "shown"), [(-1, ""), (0, "note\n"), (1, "note\ndetail\n")])
def test_notes_go_to_stderr_as_far_as_they_are_wanted(
    verbosity: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Output(verbosity=verbosity)

    out.note("note")
    out.detail("detail")
    out.line("result")

    assert capsys.readouterr() == ("result\n", shown)


def test_verbose_shows_the_log_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    from_flags(as_json=False, verbose=1, quiet=False, no_color=False, mode="none")

    logging.getLogger("lingc.capture").info("captured in %s s", 3)
    logging.getLogger("lingc.capture").debug("a node")

    assert capsys.readouterr().err == "INFO lingc.capture: captured in 3 s\n"


@pytest.mark.parametrize(
    ("quiet", "mode", "became"),
    [(False, "auto", "plain"), (True, "auto", "none"), (True, "events", "events")],
)
def test_progress_suits_where_stderr_goes(
    quiet: bool,  # noqa: FBT001 a row of the table
    mode: str,
    became: str,
) -> None:
    out = from_flags(as_json=False, verbose=0, quiet=quiet, no_color=False, mode=mode)

    assert out.mode == became


def test_plain_progress_says_what_was_done_when_it_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Output(mode="plain").stage("pack weights", total=3, unit="shards") as advance:
        for _ in range(3):
            advance()

    assert capsys.readouterr().err == "pack weights: 3 shards of 3 shards done, 0.0 s\n"


def test_plain_progress_shows_that_a_silent_stage_lives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.02)

    with Output(mode="plain").stage("capture"):
        told = ""
        while "so far" not in told:
            told += capsys.readouterr().err

    assert "capture: so far" in told


def test_events_are_one_object_a_line_and_tell_the_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        with Output(mode="events").stage("read", total=10, unit="B") as advance:
            advance(4)
            raise ZeroDivisionError("x")

    with pytest.raises(ZeroDivisionError, match="x"):
        fail()

    start, end = map(json.loads, capsys.readouterr().err.splitlines())
    assert (start["stage"], start["state"], start["done"], start["total"]) == (
        "read",
        "start",
        0,
        10,
    )
    assert (end["state"], end["done"], end["unit"]) == ("failed", 4, "B")
    assert end["rss"] > 1e6


@pytest.mark.parametrize("mode", ["bar", "none"])
def test_a_bar_leaves_nothing_on_stdout(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Output(mode=mode).stage("work", total=2) as advance:
        advance(2)

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.29e9, "1.29 GB"), (105e9, "105 GB")],
)
def test_bytes_are_told_in_decimal_units(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-6, "2 µs"), (3.1e-3, "3.1 ms"), (12.4, "12.4 s"), (125, "2 min 05 s")],
)
def test_seconds_are_told_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
