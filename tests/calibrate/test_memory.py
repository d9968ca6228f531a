"""What a calibration lets go of before it goes on; bytes are watched in checkpoint/test_large."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lingc.calibrate import layer, matrices, rounder
from lingc.calibrate.layer import swiglu_modules, swiglu_slopes
from lingc.calibrate.matrices import Made, Method, runs_of
from lingc.calibrate.rounder import Rounder, Watch
from lingc.calibrate.run import Settings, calibrate
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.source import Source
from lingc.quantize.recipes import load_recipe, parse_recipe
from tests.calibrate.conftest import read

HEAD = Path("layers", "head.safetensors")


def test_nothing_of_a_feed_forward_as_it_was_is_held_while_it_is_rounded(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def weight_of(source: Source, module: str, device: torch.device) -> Tensor:
        made = matrices.weight_of(source, module, device)
        if module in swiglu_modules("model.layers.0.mlp"):
            given.append(weakref.ref(made))
        return made

    def settle(self: Rounder, *watches: Watch, is_fallback: bool = False) -> dict[str, Tensor]:
        held.append(sum(one() is not None for one in given))
        return settled(self, *watches, is_fallback=is_fallback)

    settled = Rounder.settle
    monkeypatch.setattr(layer, "weight_of", weight_of)
    monkeypatch.setattr(Rounder, "settle", settle)
    calibrate(small, load_recipe("int4-all"), read(rows), tmp_path / "out", Settings())

    assert len(given) == 3
    assert not any(held)


def test_a_head_that_is_read_in_runs_of_rows_is_the_same(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"modules": ["lm_head"], "format": "int4_group", "group": 32}
    recipe = parse_recipe({"name": "head", "rules": [rule]}, source="head.json")
    counts: list[int] = []

    def watched(source: Source, module: str, count: int, device: torch.device) -> Iterator[Tensor]:
        for some in runs_of(source, module, count, device):
            counts.append(len(some))
            yield some

    monkeypatch.setattr(rounder, "runs_of", watched)
    settings = Settings(method=Method(loss="matrix"))
    whole = calibrate(small, recipe, read(rows), tmp_path / "whole", settings)
    monkeypatch.setattr(rounder, "TALL", 24)
    in_runs = calibrate(small, recipe, read(rows), tmp_path / "runs", settings)

    assert counts == [64] * 2 + [24, 24, 16] * 2  # to choose a damping, and to round
    # Sums of another number of rows, in another order, could make another code here and there.
    pair = [np.fromfile(made.path / HEAD, np.uint8) for made in (whole, in_runs)]
    assert np.mean(pair[0] != pair[1]) < 0.01
    ((one,), (other,)) = (made.document["matrices"] for made in (whole, in_runs))
    assert one["nearest_loss"] == pytest.approx(other["nearest_loss"])
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_the_values_of_a_run_of_rows_are_not_held_while_the_next_is_rounded(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"modules": ["lm_head"], "format": "int4_group", "group": 32}
    recipe = parse_recipe({"name": "head", "rules": [rule]}, source="head.json")
    before: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def make_int4(*args: Any, **options: Any) -> list[Made]:
        held.append(sum(one() is not None for one in before))
        made = matrices.make_int4(*args, **options)
        before.extend(weakref.ref(one.values) for one in made)
        return made

    monkeypatch.setattr(rounder, "TALL", 24)
    monkeypatch.setattr(rounder, "make_int4", make_int4)
    settings = Settings(method=Method(loss="matrix"))
    calibrate(small, recipe, read(rows), tmp_path / "out", settings)

    assert held == [0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")
def test_slopes_of_a_swiglu_hold_what_they_give_and_little_more() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, width = 4096, 4096
    n = torch.randn(rows, 16, generator=draw)
    gate, up = (torch.randn(width, 16, generator=draw) for _ in range(2))
    behind = torch.randn(rows, width, generator=draw)
    swiglu_slopes(n[:64], gate, up, behind[:64])  # so that libraries have their buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status_bytes("VmRSS")

    found = swiglu_slopes(n, gate, up, behind)

    given = sum(one.nbytes for one in found)
    assert given == 3 * rows * width * 4
    assert _status_bytes("VmHWM") - before < 1.75 * given


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
