"""Gradients that go back layer by layer are those of the whole model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lingc.calibrate import gradients
from lingc.calibrate.gradients import SEED, Gradients
from lingc.calibrate.layer import swiglu_slopes
from lingc.calibrate.matrices import Method, count_matrices, runs_of
from lingc.calibrate.rounder import Job
from lingc.calibrate.run import embedded
from lingc.calibrate.samples import lengths
from lingc.calibrate.spill import Spill, Tokens
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.source import Source
from lingc.model.loading import from_source
from lingc.quantize.recipes import load_recipe
from tests.calibrate.conftest import read

WIDTH = 72


class Made:
    """Gradients of a small model over a few rows, in a folder."""

    def __init__(self, source: Checkpoint, rows: Path, folder: Path) -> None:
        self.samples = read(rows).samples
        counts = lengths(self.samples)
        self.tokens = Tokens.of([one.origin for one in self.samples], counts)
        self.source, self.folder = source, folder
        self.told = 0
        job = Job(
            source=source,
            recipe=load_recipe("int4"),
            method=Method(),
            fallback_below=0,
            device=torch.device("cpu"),
            percentile=99.0,
            done=self._done,
        )
        self.gradients = Gradients(job, self.tokens, folder, self._embed)

    def _done(self, count: int) -> None:
        self.told += count

    def _embed(self, path: Path) -> Spill:
        spill = Spill(path, self.tokens.count, WIDTH)
        for (first, end), one in zip(self.tokens.spans(), self.samples, strict=True):
            spill[first:end] = embedded(self.source, one.ids)
        return spill

    def run(self) -> "Made":
        with torch.no_grad():
            self.gradients.run()
        return self


def _whole(made: Made) -> dict[str, Tensor]:
    """The same by one backward pass through the model as it is."""
    model = from_source(made.source)
    streams: dict[str, list[Tensor]] = {}

    def keep(name: str, stream: Tensor) -> None:
        stream.register_hook(lambda slope: streams.setdefault(name, []).append(slope))

    model.requires_grad_(requires_grad=False)
    model.model.word_embeddings.weight.requires_grad_()
    for layer in range(3):
        block = model.model.layers[layer]
        block.register_forward_hook(
            lambda _module, _args, out, name=f"slope-{layer}": keep(name, out)
        )
        block.get_submodule("post_attention_layernorm").register_forward_pre_hook(
            lambda _module, args, name=f"middle-{layer}": keep(name, args[0])
        )
    draw = torch.Generator().manual_seed(SEED)
    for one in made.samples:
        logits = model(torch.tensor(one.ids)[None])[0]
        drawn = torch.rand(len(one.ids), generator=draw, dtype=torch.float64)
        sums = logits.detach().double().softmax(-1).cumsum(1)
        chosen = (sums < drawn.unsqueeze(1)).sum(1, keepdim=True)
        (-logits.log_softmax(-1).gather(1, chosen)).sum().backward()
    return {name: torch.cat(slopes) for name, slopes in streams.items()}


def test_gradients_are_those_of_the_whole_model(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "_WORDS", 24)  # of a vocabulary of 64
    made = Made(small, rows, tmp_path).run()

    want = _whole(made)

    for layer in range(3):
        found = dict(zip(("slope", "middle"), made.gradients.slopes(layer), strict=True))
        for kind, spill in found.items():
            truth = want[f"{kind}-{layer}"]
            error = (spill[0 : made.tokens.count] - truth).norm() / truth.norm()
            assert error < 1e-4, (kind, layer)


def test_the_head_is_read_thrice_for_samples_together_to_the_same_bytes(
    small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def watched(source: Source, module: str, count: int, device: torch.device) -> Iterator[Tensor]:
        counts.append(count)
        return runs_of(source, module, count, device)

    monkeypatch.setattr(gradients, "runs_of", watched)
    monkeypatch.setattr(gradients, "_WORDS", 24)
    made: dict[int, bytes] = {}
    reads: dict[int, int] = {}
    for most in (1, 50, 4096):
        monkeypatch.setattr(gradients, "TOGETHER", most)
        counts.clear()
        folder = tmp_path / str(most)
        folder.mkdir()
        Made(small, rows, folder).run()
        made[most], reads[most] = (folder / "slope-0002.f32").read_bytes(), len(counts)

    assert reads[1] == 3 * 12  # samples
    assert 3 < reads[50] < reads[1]
    assert reads[4096] == 3
    assert made[1] == made[50] == made[4096]


def test_a_second_run_does_nothing_and_counts_the_same(
    small: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    made = Made(small, rows, tmp_path).run()
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    again = Made(small, rows, tmp_path).run()

    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.f32")} == {
        name: time for name, time in first.items() if name.endswith(".f32")
    }
    layers = sum(count_matrices(small, f"model.layers.{layer}.") for layer in range(3))
    assert made.told == again.told == 2 * layers


@pytest.mark.parametrize("kind", ["plain", "slope", "middle"])
def test_what_is_missing_is_made_again_to_the_same_bytes(
    kind: str, small: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill in the first layer that a file of that kind is written for."""
    whole = Made(small, rows, tmp_path / "whole")
    killed = Made(small, rows, tmp_path / "killed")
    for made in (whole, killed):
        made.folder.mkdir()
    whole.run()
    rename = Spill.rename

    def stop(spill: Spill, path: Path) -> None:
        if path.name.startswith(kind) and "0001" in path.name:
            raise KeyboardInterrupt
        rename(spill, path)

    with monkeypatch.context() as patched:
        patched.setattr(Spill, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    killed.run()

    names = sorted(path.name for path in whole.folder.glob("*.f32"))
    assert names == [f"{kind}-{layer:04}.f32" for kind in ("middle", "slope") for layer in range(3)]
    for name in names:
        assert (whole.folder / name).read_bytes() == (killed.folder / name).read_bytes()


def test_slopes_of_a_swiglu_are_those_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    n, gate, up, behind = (
        torch.randn(shape, generator=draw) for shape in ((9, 6), (5, 6), (5, 6), (9, 5))
    )
    a, u = ((n @ matrix.T).requires_grad_() for matrix in (gate, up))
    product = torch.nn.functional.silu(a) * u
    want = torch.autograd.grad(product, (a, u), behind)

    found = swiglu_slopes(n, gate, up, behind)

    for got, truth in zip(found, (product.detach(), *want), strict=True):
        torch.testing.assert_close(got, truth)


def _slopes_at_once(n: Tensor, gate: Tensor, up: Tensor, behind: Tensor) -> list[Tensor]:
    a, u = n @ gate.T, n @ up.T
    share = torch.sigmoid(a)
    inner = a * share
    return [inner * u, behind * u * share * (1 + a * (1 - share)), behind * inner]


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (9, 5), (256, 44), (1001, 45)])
def test_slopes_by_runs_of_rows_are_those_at_once_to_the_bit(rows: int, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = ((rows, 24), (width, 24), (width, 24), (rows, width))
    given = [torch.randn(shape, generator=draw) for shape in shapes]
    before = [one.clone() for one in given]

    found = swiglu_slopes(*given)

    for got, truth in zip(found, _slopes_at_once(*given), strict=True):
        assert torch.equal(got, truth)
    assert all(map(torch.equal, given, before))
