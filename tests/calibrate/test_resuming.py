"""A calibration that was killed goes on, or says why not."""

import logging
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lingc.calibrate.layer import Layer
from lingc.calibrate.matrices import Method
from lingc.calibrate.run import Settings, calibrate
from lingc.checkpoint import (
    Checkpoint,
    SyntheticCheckpoint,
    open_checkpoint,
    write_checkpoint,
)
from lingc.errors import (
    UsageError,
)
from lingc.model.config import ModelConfig
from lingc.quantize.recipes import load_recipe
from tests.calibrate.conftest import brisk, content, killed, read, write_rows

Finished = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _brisk() -> Iterator[None]:
    with brisk():
        yield


def _kill_and_finish(
    small: Checkpoint, rows: Path, want: Path, out: Path, moments: Iterable[Callable[[], bool]]
) -> list[int]:
    """Kill a run at each of some moments, then let one finish."""
    settings, recipe, given = Settings(fallback_below=2), load_recipe("int4-all"), read(rows)

    codes = [
        killed(lambda: calibrate(small, recipe, given, out, settings), when) for when in moments
    ]
    if not out.exists():
        result = calibrate(small, recipe, given, out, settings)
        codes.append(int(result.is_resumed))

    assert content(out) == content(want)
    assert not out.with_name(f"{out.name}.partial").exists()
    return codes


def test_a_killed_run_goes_on_to_the_same_bytes(
    small: Checkpoint, rows: Path, finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    layers = out.with_name("out.partial") / "content" / "layers"

    def has(count: int) -> Callable[[], bool]:
        return lambda: layers.is_dir() and len(list(layers.iterdir())) >= count

    codes = _kill_and_finish(small, rows, finished("int4-all"), out, [has(0), has(1), has(3)])

    assert codes == [-signal.SIGKILL] * 3 + [1]


@pytest.mark.long
def test_a_run_killed_at_twenty_points_goes_on_to_the_same_bytes(
    small: Checkpoint, rows: Path, finished: Finished, tmp_path: Path
) -> None:
    settings, recipe, given = Settings(fallback_below=2), load_recipe("int4-all"), read(rows)
    started = time.monotonic()
    calibrate(small, recipe, given, tmp_path / "timed", settings)
    # Less, as later runs find more in caches than the one that is timed.
    whole_s = 0.7 * (time.monotonic() - started)
    draw = random.Random(20)  # noqa: S311 a seeded choice of moments

    def is_past(moment: float) -> bool:
        return time.monotonic() >= moment

    def moments(count: int) -> Iterator[Callable[[], bool]]:
        for _ in range(count):
            yield partial(is_past, time.monotonic() + draw.random() * whole_s)

    ends = [
        _kill_and_finish(
            small, rows, finished("int4-all"), tmp_path / str(run) / "out", moments(run % 3 + 1)
        )
        for run in range(20)
    ]
    assert sum(code == -signal.SIGKILL for codes in ends for code in codes) >= 20


@pytest.mark.parametrize("what", ["checkpoint", "recipe", "data", "fp8"])
def test_other_inputs_are_refused_by_name(
    what: str, config: ModelConfig, small: Checkpoint, rows: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe, given, settings = load_recipe("fp8"), read(rows), Settings()
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(small, recipe, given, out, settings)
    source = small
    if what == "checkpoint":
        path = write_checkpoint(SyntheticCheckpoint(config, 2), tmp_path / "other")
        source = open_checkpoint(path)
    elif what == "recipe":
        recipe = load_recipe("fp8-max")
    elif what == "data":
        given = read(write_rows(tmp_path / "rows.jsonl", count=12, seed=1))
    else:
        settings = replace(settings, method=Method(fp8="nearest"))

    with pytest.raises(UsageError, match=rf"was begun with other inputs:\n  - {what}: was ") as no:
        calibrate(source, recipe, given, out, settings)

    told = no.value.problem.splitlines()[1:]
    assert len(told) == 1  # what is the same is not said
    if what == "data":
        assert "was 12 rows, " in told[0]
    if what == "fp8":
        assert told == ["  - fp8: was gptq, is nearest"]
    assert "--fresh" in str(no.value.hint)
    assert calibrate(source, recipe, given, out, settings, fresh=True).path.is_dir()


def test_a_run_goes_on_with_the_threads_that_it_was_begun_with(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    settings, recipe, given = Settings(fallback_below=2), load_recipe("fp8"), read(rows)
    run, counts = Layer.run, []

    def counted(layer: Layer, *words: Any) -> None:
        counts.append(torch.get_num_threads())
        if len(counts) == 2:
            raise KeyboardInterrupt
        run(layer, *words)

    monkeypatch.setattr(Layer, "run", counted)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibrate(small, recipe, given, tmp_path / "out", settings)
    finally:
        torch.set_num_threads(1)

    # Commands that ran before may have set what is logged of `lingc`.
    with caplog.at_level(logging.WARNING, logger="lingc.calibrate.run"):
        made = calibrate(small, recipe, given, tmp_path / "out", settings)

    assert set(counts) == {2}
    assert "goes on with 2 threads, as it was begun, and not with 1" in caplog.text
    assert made.document["threads"] == 2
    assert torch.get_num_threads() == 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
