"""What calibration gains on the shipped checkpoint.

    python -m tests.calibrate.experiment [--samples 128] [--windows 88] [--device cuda] RECIPE ...

For each recipe the checkpoint is quantized twice, rounded to nearest and calibrated, and both are
held to BF16 on the same windows of text, which it was neither trained nor calibrated on. Inputs of
FP8 matrices are rounded as the recipe says. Differences are paired by window; intervals are of
10,000 bootstrap resamples of windows.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lingc.calibrate.matrices import Method
from lingc.calibrate.observers import round_e4m3
from lingc.calibrate.run import Settings, calibrate
from lingc.calibrate.samples import Samples, Share, read_samples
from lingc.checkpoint import Checkpoint, open_checkpoint
from lingc.checkpoint.calibrated import open_calibration
from lingc.checkpoint.quantizer import quantize_checkpoint
from lingc.model.loading import from_source
from lingc.model.model import LingModel
from lingc.model.moe import Experts
from lingc.quantize.formats import E4M3_MAX, FP8_BLOCK
from lingc.quantize.recipes import Recipe, load_recipe
from lingc.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
GOLDEN = ROOT / "tests" / "golden" / "ling-tiny"
WINDOW = 1024
RESAMPLES = 10_000

F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """By window: mean KL from BF16, and mean negative log-likelihood, of each model by name."""

    kl: Mapping[str, F64]
    nll: Mapping[str, F64]


def samples(count: int | None, *, seed: int = 0) -> Samples:
    """Of the calibration texts, which are neither in the training data nor in `eval.txt`."""
    return read_samples(
        [Share(path=GOLDEN / "calibration.jsonl")],
        vocab=4096,
        tokenizer=Tokenizer.from_directory(CHECKPOINT),
        count=count,
        max_tokens=512,
        seed=seed,
    )


def windows(count: int) -> Tensor:
    """Windows of the evaluation text, evenly apart."""
    ids = np.fromfile(GOLDEN / "eval_ids.u16", "<u2").astype(np.int64)
    whole = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    chosen = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)
    return torch.from_numpy(whole[chosen])


def score(models: Mapping[str, LingModel], text: Tensor) -> Scored:
    """Hold models to the one called `bf16`."""
    kl: dict[str, list[float]] = {name: [] for name in models}
    nll: dict[str, list[float]] = {name: [] for name in models}
    device = next(iter(models.values())).lm_head.weight.device
    with torch.inference_mode():
        for ids in text.to(device):
            logs = {name: model(ids[None])[0].log_softmax(-1) for name, model in models.items()}
            reference = logs["bf16"]
            for name, log in logs.items():
                kl[name].append(float((reference.exp() * (reference - log)).sum(-1).mean()))
                nll[name].append(float(-log[:-1].gather(1, ids[1:, None]).mean()))
    return Scored(
        kl={name: np.array(values) for name, values in kl.items()},
        nll={name: np.array(values) for name, values in nll.items()},
    )


def ratio_interval(above: F64, below: F64, *, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two means over the same windows, and its 95 % interval."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].mean(1) / below[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(above.mean() / below.mean()), float(low), float(high)


def perplexity_interval(nll: F64, reference: F64, *, seed: int = 0) -> tuple[float, float, float]:
    """Perplexity over the reference's, less one, and its 95 % interval."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(nll), (RESAMPLES, len(nll)))
    gaps = np.exp((nll - reference)[drawn].mean(1)) - 1
    low, high = np.quantile(gaps, (0.025, 0.975))
    return float(np.exp((nll - reference).mean()) - 1), float(low), float(high)


# ------------------------------------------------------------------------------------ activations


def with_inputs(
    model: LingModel, recipe: Recipe, scales: Mapping[str, float] | None = None
) -> LingModel:
    """Round what FP8 matrices read, as the recipe says; a module without a scale has 1."""
    if recipe.activations == "plain":
        return model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and recipe.format_of(name).kind.startswith("fp8"):
            rounding = _rounding(recipe, name, scales)
            module.register_forward_pre_hook(lambda _m, args, f=rounding: (f(args[0]),))
        elif isinstance(module, Experts):
            first = f"{name}.0.gate_proj"
            if recipe.format_of(first).kind.startswith("fp8"):
                _round_experts(
                    module,
                    _rounding(recipe, first, scales),
                    _rounding(recipe, f"{name}.0.down_proj", scales),
                )
    return model


def _rounding(
    recipe: Recipe, module: str, scales: Mapping[str, float] | None
) -> Callable[[Tensor], Tensor]:
    if recipe.activations == "fp8_static":
        scale = (scales or {}).get(module, 1.0)
        return lambda x: round_e4m3(x / scale) * scale
    return _dynamic


def _dynamic(x: Tensor) -> Tensor:
    short = -x.shape[-1] % FP8_BLOCK
    grouped = nn.functional.pad(x, (0, short)).unflatten(-1, (-1, FP8_BLOCK))
    scale = grouped.abs().amax(-1, keepdim=True) / float(E4M3_MAX)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (round_e4m3(grouped / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def _round_experts(
    experts: Experts, outer: Callable[[Tensor], Tensor], inner: Callable[[Tensor], Tensor]
) -> None:
    def forward(n: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(n)
        n = outer(n)
        for e in ids.unique().tolist():
            token, rank = torch.nonzero(ids == e, as_tuple=True)
            x = n[token]
            h = nn.functional.silu(x @ experts.gate_proj[e].T) * (x @ experts.up_proj[e].T)
            y = inner(h) @ experts.down_proj[e].T
            total.index_add_(0, token, y * weights[token, rank].unsqueeze(-1))
        return total

    experts.forward = forward  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------- experiment


def compare(
    names: Sequence[str],
    folder: Path,
    *,
    sample_count: int | None,
    window_count: int,
    settings: Settings,
) -> list[dict[str, object]]:
    """A line a recipe: what rounding to nearest and calibration cost, with intervals."""
    source, text = open_checkpoint(CHECKPOINT), windows(window_count)
    given = samples(sample_count)
    lines = []
    for name in names:
        recipe = load_recipe(name)
        scored = score(_models(source, recipe, given, settings, folder / name), text)
        ratio = ratio_interval(scored.kl["calibrated"], scored.kl["nearest"])
        reference = scored.nll["bf16"]
        lines.append(
            {
                "recipe": name,
                "windows": len(text),
                "samples": len(given.samples),
                "perplexity": {key: float(np.exp(x.mean())) for key, x in scored.nll.items()},
                "perplexity_gap": {
                    key: perplexity_interval(scored.nll[key], reference)
                    for key in ("nearest", "calibrated")
                },
                "kl": {key: float(x.mean()) for key, x in scored.kl.items()},
                "kl_ratio": ratio,
            }
        )
    return lines


def _models(
    source: Checkpoint, recipe: Recipe, given: Samples, settings: Settings, folder: Path
) -> dict[str, LingModel]:
    nearest = quantize_checkpoint(source, recipe, folder / "nearest").path
    made = calibrate(source, recipe, given, folder / "calibration", settings)
    changes = open_calibration(made.path, source, recipe)
    better = quantize_checkpoint(source, recipe, folder / "calibrated", changes=changes).path
    models = {
        "bf16": from_source(source),
        "nearest": with_inputs(from_source(open_checkpoint(nearest)), recipe),
        "calibrated": with_inputs(
            from_source(open_checkpoint(better)), recipe, changes.input_scales
        ),
    }
    return {name: model.to(settings.device) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=88)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--damping", type=float)
    parser.add_argument("--rounds", type=int, default=Method().rounds)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for line in compare(
            given.recipes,
            Path(folder),
            sample_count=given.samples,
            window_count=given.windows,
            settings=Settings(
                method=Method(damping=given.damping, rounds=given.rounds), device=given.device
            ),
        ):
            print(json.dumps(line))  # noqa: T201 what the script is for


if __name__ == "__main__":
    main()
