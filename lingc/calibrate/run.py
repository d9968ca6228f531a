"""A calibration from beginning to end, across kills.

    <name>.partial/content/     what is published: calibration.json, layers/*.safetensors
    <name>.partial/state/       activations before the next step, and what was seen in each step

A step is a layer, the head, or the MTP layer. It is behind when its `state/<step>.json` is there,
which is written last; the activations that it read are dropped then. A killed run goes on with the
first step that is not behind, and comes to the same bytes: with the threads that it was begun with.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lingc.calibrate.gradients import Gradients
from lingc.calibrate.layer import Layer
from lingc.calibrate.matrices import Method, count_matrices, weight_of
from lingc.calibrate.rounder import Done, Job, Rounder, Seen, Watch
from lingc.calibrate.samples import Samples, lengths
from lingc.calibrate.spill import Spill, Tokens, refuse_wild
from lingc.checkpoint.calibrated import DOCUMENT, FORMAT, LAYERS, file_digests
from lingc.checkpoint.convert import is_stored_as
from lingc.checkpoint.expected import matrix_modules
from lingc.checkpoint.source import Source
from lingc.errors import IncompatibleError
from lingc.quantize.formats import widen_bf16
from lingc.quantize.recipes import Recipe
from lingc.resuming import Resumable
from lingc.staging import write_whole, writing

log = logging.getLogger(__name__)

FALLBACK_BELOW = 32
"""Tokens with which an expert is rounded by what was seen, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is asked for.

    Attributes:
        method: How weights are rounded.
        observer: How a scale of inputs follows from what was seen: `absmax`, `percentile`, `mse`.
        percentile: Of that observer.
        fallback_below: An expert with fewer tokens is left to rounding to nearest.
        device: `cpu` or `cuda`.
    """

    method: Method = field(default_factory=Method)
    observer: str = "absmax"
    percentile: float = 99.99
    fallback_below: int = FALLBACK_BELOW
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A finished calibration.

    Attributes:
        path: Its directory.
        is_resumed: Whether steps of an earlier run were kept.
        document: What `calibration.json` holds.
    """

    path: Path
    is_resumed: bool
    document: Mapping[str, Any]


def calibrate(
    source: Source,
    recipe: Recipe,
    samples: Samples,
    out_dir: Path,
    settings: Settings,
    *,
    fresh: bool = False,
    done: Done = lambda _count: None,
) -> Calibrated:
    """Run the samples through the model, layer by layer, and round its matrices by what is seen.

    Args:
        source: The checkpoint.
        recipe: Which matrix is stored how.
        samples: What runs through it.
        out_dir: Must not exist, or be empty.
        settings: How.
        fresh: Throw away what an earlier run began.
        done: Told how many matrices are behind.

    Raises:
        UsageError: `out_dir` is there already, or what was begun had other inputs.
        RecipeError: A pattern of the recipe matches nothing.
        InputError: An activation is NaN or infinite; layer, tensor and sample are named.
        ResourceError: The disk is full, read-only or forbidden.
    """
    recipe.check_matches(matrix_modules(source.config))
    inputs = {
        "checkpoint": source.identity(),
        "recipe": recipe.digest(),
        "data": f"{len(samples.samples)} rows, {samples.tokens} tokens, SHA-256 {samples.digest}",
        **_named(settings),
    }
    # Two files of the residual stream, and at most one of each of two others; with gradients the
    # stream before every layer, in whose place two of these come.
    streams = 3
    if _needs_gradients(source, recipe, settings.method):
        streams += 2 * source.config.num_hidden_layers + 4
    widest = max(source.config.hidden_size, *_widths(source))
    needed = samples.tokens * 4 * (streams * source.config.hidden_size + widest)
    with (
        Resumable(out_dir, inputs, fresh=fresh, needed_bytes=needed) as folder,
        writing(out_dir),
        _threads(folder.state / "threads.json") as threads,
        torch.no_grad(),
    ):
        (folder.content / LAYERS).mkdir(exist_ok=True)
        device = torch.device(settings.device)
        job = Job(
            source=source,
            recipe=recipe,
            method=settings.method,
            fallback_below=settings.fallback_below,
            device=device,
            percentile=settings.percentile,
            done=done,
        )
        seen = _Steps(job, samples, folder).run()
        document = _document(source, recipe, samples, settings, inputs, seen)
        document["threads"] = threads
        document["files"] = file_digests(folder.content)
        write_whole(folder.content / DOCUMENT, json.dumps(document, indent=1) + "\n")
        folder.publish()
    return Calibrated(path=out_dir, is_resumed=folder.is_resumed, document=document)


def _named(settings: Settings) -> dict[str, str]:
    """Every setting by its name, in words."""
    whole = asdict(settings)
    method = whole.pop("method")
    return {name.replace("_", " "): str(value) for name, value in {**method, **whole}.items()}


@contextmanager
def _threads(told: Path) -> Iterator[int]:
    """Compute with as many threads as the run was begun with, which a file tells.

    Sums are shared out among threads, so that with another number they round otherwise.
    """
    mine = torch.get_num_threads()
    if not told.exists():
        write_whole(told, json.dumps(mine))
    begun = int(json.loads(told.read_text(encoding="utf-8")))
    if begun != mine:
        log.warning("goes on with %d threads, as it was begun, and not with %d", begun, mine)
    torch.set_num_threads(begun)
    try:
        yield begun
    finally:
        torch.set_num_threads(mine)


def device_named(name: str) -> str:
    """A device's name, if there is such a device.

    Raises:
        IncompatibleError: `cuda` is asked for where torch finds no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise IncompatibleError(
            "there is no GPU that torch can use",
            hint="leave --device away, or install a torch that is built for this machine's GPU",
        )
    return name


def count_steps(source: Source, recipe: Recipe, settings: Settings) -> int:
    """How often `done` is told one: of each matrix, and for gradients of those of layers twice."""
    whole = count_matrices(source)
    if not _needs_gradients(source, recipe, settings.method):
        return whole
    layers = range(source.config.num_hidden_layers)
    return whole + 2 * sum(count_matrices(source, f"model.layers.{number}.") for number in layers)


def _needs_gradients(source: Source, recipe: Recipe, method: Method) -> bool:
    return method.loss == "model" and has_use_of_gradients(source, recipe, method)


def has_use_of_gradients(source: Source, recipe: Recipe, method: Method) -> bool:
    """Whether GPTQ rounds a matrix that can have gradients, so that `method.loss` decides."""
    main = tuple(f"model.layers.{n}." for n in range(source.config.num_hidden_layers))
    without = (".q_b_proj", ".kv_b_proj", ".mlp.gate")
    for module in matrix_modules(source.config):
        if module.startswith(main) and not module.endswith(without):
            chosen = recipe.format_of(module)
            stored = is_stored_as(source, f"{module}.weight", chosen.kind, chosen.group)
            if method.compensates(chosen) and not stored:
                return True
    return False


def _widths(source: Source) -> Iterator[int]:
    for name in source.names:
        if name.endswith("attention.dense.weight"):
            yield source.shape(name)[1]


def embedded(source: Source, ids: Sequence[int]) -> Tensor:
    """Embeddings of some tokens, f32 [T, D]; no more of the table is read."""
    name = "model.word_embeddings.weight"
    if source.kind(name) != "plain":
        return torch.from_numpy(source.dense(name)[list(ids)])
    values, dtype = source.plain(name)
    taken = values[list(ids)]
    return torch.from_numpy(widen_bf16(taken) if dtype == "bf16" else np.array(taken))


class _Steps:
    """The steps in order."""

    def __init__(self, job: Job, samples: Samples, folder: Resumable) -> None:
        self._behind = 0
        self._done = job.done
        self._job = job = replace(job, done=self._count)
        self._config = job.source.config
        self._folder = folder
        self._samples = samples
        origins = [one.origin for one in samples.samples]
        counts = lengths(samples.samples)
        self._tokens = Tokens.of(origins, counts)
        # The MTP layer is told the next token, which the last one has not.
        self._drafts = Tokens.of(origins, [max(count - 1, 0) for count in counts])
        self._gradients = None
        if _needs_gradients(job.source, job.recipe, job.method):
            self._gradients = Gradients(job, self._tokens, folder.state, self._embed)

    def run(self) -> list[Mapping[str, Any]]:
        """Run what is not behind; what was seen in every step."""
        if self._gradients is not None:
            self._gradients.run()
        steps: list[tuple[str, Callable[[], Seen]]] = [
            (f"{layer:04}", lambda layer=layer: self._layer(layer))  # type: ignore[misc]
            for layer in range(self._config.num_hidden_layers)
        ]
        steps.append(("head", self._head))
        if self._job.source.has_mtp and self._drafts.count:
            steps.append(("mtp", self._mtp))
        found: list[Mapping[str, Any]] = []
        for number, (name, work) in enumerate(steps):
            told = self._folder.state / f"{name}.json"
            if told.exists():
                document = json.loads(told.read_text(encoding="utf-8"))
                self._job.done(document["behind"])
            else:
                before = self._behind
                document = {**work().document(), "behind": self._behind - before}
                write_whole(told, json.dumps(document))
            found.append(document)
            if number < self._config.num_hidden_layers:
                self._stream_path(number).unlink(missing_ok=True)
                if self._gradients is not None:
                    self._gradients.drop(number)
        return found

    def _count(self, done: int) -> None:
        self._behind += done
        self._done(done)

    def _layer(self, number: int) -> Seen:
        before = self._stream(number)
        staged = self._folder.state / "after.f32"
        after = Spill(staged, self._tokens.count, self._config.hidden_size)
        slopes = None if self._gradients is None else self._gradients.slopes(number)
        layer = Layer(self._job, number, self._tokens, self._folder.state, slopes)
        layer.run(before, after, self._files(f"{number:04}"))
        after.rename(self._stream_path(number + 1))
        return layer.seen

    def _files(self, step: str) -> tuple[Path, Path]:
        layers = self._folder.content / LAYERS
        return layers / f"{step}-attention.safetensors", layers / f"{step}-mlp.safetensors"

    def _stream_path(self, number: int) -> Path:
        return self._folder.state / f"stream-{number:04}.f32"

    def _stream(self, number: int) -> Spill:
        """The residual stream before a layer; before the first, the embedded tokens."""
        path = self._stream_path(number)
        rows, width = self._tokens.count, self._config.hidden_size
        if path.exists():
            return Spill(path, rows, width, is_there=True)
        assert number == 0, f"what layer {number} reads was lost"
        return self._embed(path)

    def _embed(self, path: Path) -> Spill:
        """The residual stream before the first layer, in a file of a name."""
        rows, width = self._tokens.count, self._config.hidden_size
        stream = Spill(self._folder.state / "embedded.f32", rows, width)
        for (first, end), one in zip(self._tokens.spans(), self._samples.samples, strict=True):
            stream[first:end] = embedded(self._job.source, one.ids)
        stream.rename(path)
        return stream

    def _hidden(self) -> Iterator[Tensor]:
        """The model's outputs after the last norm, [T, D] of each sample."""
        stream = self._stream(self._config.num_hidden_layers)
        norm = weight_of(self._job.source, "model.norm", self._job.device)
        for first, end in self._tokens.spans():
            x = stream[first:end].to(self._job.device)
            n = functional.rms_norm(x, (x.shape[-1],), norm, self._config.rms_norm_eps)
            refuse_wild(n, self._tokens, first, "behind the last layer", "lm_head")
            yield n

    def _head(self) -> Seen:
        rounder = Rounder(self._job)
        watch = Watch(self._job, ["lm_head"], self._config.hidden_size)
        halves = self._tokens.halves()
        for (first, end), n in zip(self._tokens.spans(), self._hidden(), strict=True):
            watch.see(n, halves[first:end])
        with rounder.storing(self._folder.content / LAYERS / "head.safetensors", ["lm_head"]):
            rounder.settle_tall(watch)
        return rounder.seen

    def _mtp(self) -> Seen:
        """The MTP layer reads the next token's embedding and the model's outputs."""
        number, config = self._config.mtp_layer, self._config
        module = f"model.layers.{number}.eh_proj"
        layer = Layer(self._job, number, self._drafts, self._folder.state)
        width, rows = config.hidden_size, self._drafts.count
        joined = Spill(self._folder.state / "joined.f32", rows, 2 * width)
        norms = [weight_of(self._job.source, f"model.layers.{number}.{name}", self._job.device)
                 for name in ("enorm", "hnorm")]  # fmt: skip
        watch = Watch(self._job, [module], 2 * width)
        starts, halves = self._drafts.offsets, self._drafts.halves()
        for index, (one, hidden) in enumerate(
            zip(self._samples.samples, self._hidden(), strict=True)
        ):
            first, end = starts[index : index + 2]
            if first == end:
                continue
            parts = (embedded(self._job.source, one.ids[1:]).to(hidden.device), hidden[:-1])
            normed = [
                functional.rms_norm(part, (width,), norm, config.rms_norm_eps)
                for part, norm in zip(parts, norms, strict=True)
            ]
            u = torch.cat(normed, dim=-1)
            refuse_wild(u, self._drafts, first, f"layer {number}", module)
            watch.see(u, halves[first:end])
            joined[first:end] = u
        path = self._folder.content / LAYERS / "mtp-eh_proj.safetensors"
        with layer.rounder.storing(path, [module]):
            weight = layer.rounder.settle(watch)[module]
        x = Spill(self._folder.state / "mixed-in.f32", rows, width)
        for first, end in self._drafts.spans():
            x[first:end] = functional.linear(joined[first:end].to(weight.device), weight)
        joined.remove()
        after = Spill(self._folder.state / "after.f32", rows, width)
        layer.run(x, after, self._files("mtp"))
        after.remove()
        x.remove()
        return layer.seen


def _document(
    source: Source,
    recipe: Recipe,
    samples: Samples,
    settings: Settings,
    inputs: Mapping[str, str],
    seen: list[Mapping[str, Any]],
) -> dict[str, Any]:
    scales: dict[str, float] = {}
    if recipe.activations == "fp8_static":
        for step in seen:
            for one in step["inputs"]:
                bound = one["bounds"][settings.observer]
                scales |= dict.fromkeys(one["modules"], bound)
    return {
        "format": FORMAT,
        "inputs": dict(inputs),
        "recipe": recipe.document(),
        "settings": asdict(settings),
        "data": {
            "samples": len(samples.samples),
            "tokens": samples.tokens,
            "files": [asdict(one) for one in samples.files],
            "lengths": samples.histogram(),
        },
        "experts": source.config.num_experts,
        "coverage": {k: v for step in seen for k, v in step["coverage"].items()},
        "matrices": [one for step in seen for one in step["matrices"]],
        "observed": [one for step in seen for one in step["inputs"]],
        "input_bounds": scales,
    }
