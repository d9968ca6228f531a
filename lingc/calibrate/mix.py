"""A recipe that is made for a budget: what may be rounded coarsely is found out, module by module.

A unit is what is stored in one format: a layer's first projections, its output projection, its
routed experts, its shared expert, a dense feed-forward, or the head. For each unit and each format
one copy of the model is run that has this unit rounded and nothing else, and the divergence of its
predictions from those of the unrounded model is the unit's price for that format:

    KL(p || q), mean over tokens, nats

All copies go through the checkpoint together: behind the layer that tells them apart they are more
rows of the same activations. So one pass over the weights measures every part.

Prices of several units are taken to add up, which holds as long as they are small; what is chosen
is then run as a whole, so that the sum is held to a measurement. From every unit in its smallest
format, the step that lowers the price most for a byte is taken, again and again: that is the curve.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lingc.calibrate.layer import Layer, swiglu_modules
from lingc.calibrate.matrices import Method, weight_of
from lingc.calibrate.rounder import Job
from lingc.calibrate.samples import Samples, lengths
from lingc.calibrate.spill import Spill, Tokens
from lingc.checkpoint.convert import to_rounded
from lingc.checkpoint.expected import Shape, expected_tensors
from lingc.checkpoint.items import stored_bytes
from lingc.checkpoint.source import Source
from lingc.errors import UsageError
from lingc.model.config import ModelConfig
from lingc.quantize.recipes import PLAIN, Format, Recipe, Rule

FORMATS = (PLAIN, Format(kind="fp8_block"), Format(kind="int4_group", group=128))
"""What a unit may be stored as, the largest first."""

TRIED = 5
"""Points of the curve that are run as a whole, beside the one that is chosen."""

_ROWS = 512
_PRECISION = "mixed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Modules that are stored in one format.

    Attributes:
        name: For tables: `layer 3 experts`.
        layer: Where its price shows first; -1 for the head.
        patterns: Of a recipe, for its modules.
        modules: Their names.
    """

    name: str
    layer: int
    patterns: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a unit costs in a format: bytes a token, and divergence."""

    unit: str
    format: str
    bytes: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One choice of formats.

    Attributes:
        formats: Of each unit, in order.
        bytes: What a token reads of all weights.
        predicted: Sum of prices.
        measured: What running it gave; None where it was not run.
    """

    formats: tuple[Format, ...]
    bytes: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """A recipe for a budget, and what it was chosen from."""

    recipe: Recipe
    chosen: Point
    budget: float
    curve: tuple[Point, ...]
    prices: tuple[Price, ...]
    units: tuple[Unit, ...]


def units_of(config: ModelConfig) -> tuple[Unit, ...]:
    """The units of a model's main layers and its head, in order."""
    found: list[Unit] = []
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        if not config.is_mla(layer):
            found.append(_unit("inputs", layer, [f"{at}.attention.query_key_value",
                                                 f"{at}.attention.g_proj"]))  # fmt: skip
        found.append(_unit("dense", layer, [f"{at}.attention.dense"]))
        if config.is_dense(layer):
            found.append(_unit("mlp", layer, swiglu_modules(f"{at}.mlp")))
            continue
        experts = [
            m for e in range(config.num_experts) for m in swiglu_modules(f"{at}.mlp.experts.{e}")
        ]
        found.append(
            Unit(
                name=f"layer {layer} experts",
                layer=layer,
                patterns=(f"{at}.mlp.experts.*",),
                modules=tuple(experts),
            )
        )
        if config.num_shared_experts:
            found.append(_unit("shared", layer, swiglu_modules(f"{at}.mlp.shared_experts")))
    found.append(_unit("head", -1, ["lm_head"]))
    return tuple(found)


def _unit(kind: str, layer: int, modules: Sequence[str]) -> Unit:
    name = kind if layer < 0 else f"layer {layer} {kind}"
    return Unit(name=name, layer=layer, patterns=tuple(modules), modules=tuple(modules))


def bytes_per_token(config: ModelConfig, recipe: Recipe) -> float:
    """What one token reads of the main layers' weights and the head; the embedding is one row."""
    shapes = _read(config)
    return sum(_bytes(config, shapes, module, recipe.format_of(module)) for module in shapes)


def _read(config: ModelConfig) -> dict[str, Shape]:
    """Modules that a token reads, and the shapes of their matrices."""
    mtp = f"model.layers.{config.mtp_layer}." if config.has_mtp else "-"
    return {
        name.removesuffix(".weight"): shape
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and name != "model.word_embeddings.weight" and not name.startswith(mtp)
    }


def _bytes(config: ModelConfig, shapes: Mapping[str, Shape], module: str, chosen: Format) -> float:
    share = 1.0
    if ".mlp.experts." in module:
        share = config.num_experts_per_tok / config.num_experts
    return share * stored_bytes(f"{module}.weight", shapes[module], chosen)


def mix(
    source: Source,
    samples: Samples,
    budget: float,
    *,
    device: str = "cpu",
    work_dir: Path | None = None,
    done: Callable[[int], None] = lambda _count: None,
) -> Mixed:
    """Choose formats such that a token reads no more than `budget` bytes.

    Args:
        source: The checkpoint.
        samples: A few rows: every unit and format is one more copy of them.
        budget: Bytes a token.
        device: Where matrices are multiplied.
        work_dir: Where activations lie meanwhile; the system's place for temporary files if None.
        done: Told one for every layer of every pass.

    Raises:
        UsageError: No choice of formats is as small.
        InputError: An activation is NaN or infinite.
    """
    config = source.config
    units, shapes = units_of(config), _read(config)
    sizes = {
        (unit.name, chosen): sum(_bytes(config, shapes, module, chosen) for module in unit.modules)
        for unit in units
        for chosen in FORMATS
    }
    inside = {module for unit in units for module in unit.modules}
    fixed = sum(_bytes(config, shapes, m, PLAIN) for m in shapes if m not in inside)
    least = fixed + sum(sizes[unit.name, FORMATS[-1]] for unit in units)
    if budget < least:
        raise UsageError(
            f"a token reads {least:.0f} bytes with every unit in {FORMATS[-1]}, more than the "
            f"budget of {budget:.0f}",
            hint="raise --bytes-per-token",
        )
    with torch.inference_mode():
        passes = _Passes(source, samples, device=device, work_dir=work_dir, done=done)
        singles = [(unit, chosen) for unit in units for chosen in FORMATS[1:]]
        measured = passes.singles(singles)
        prices = {(unit.name, PLAIN): 0.0 for unit in units}
        prices |= {(u.name, f): kl for (u, f), kl in zip(singles, measured, strict=True)}
        curve = _curve(units, sizes, prices, fixed)
        chosen = max(
            (i for i, point in enumerate(curve) if point.bytes <= budget),
            key=lambda i: curve[i].bytes,
        )
        wanted = sorted({chosen, *_spread(len(curve))})
        recipes = [_recipe(config, units, curve[i].formats) for i in wanted]
        found = dict(zip(wanted, passes.wholes(recipes), strict=True))
    curve = [_measured(point, found.get(i)) for i, point in enumerate(curve)]
    return Mixed(
        recipe=_recipe(config, units, curve[chosen].formats),
        chosen=curve[chosen],
        budget=budget,
        curve=tuple(curve),
        prices=tuple(
            Price(unit=u.name, format=str(f), bytes=sizes[u.name, f], kl=prices[u.name, f])
            for u in units
            for f in FORMATS
        ),
        units=units,
    )


def count_layers(config: ModelConfig) -> int:
    """How often `done` is told one."""
    return 2 * config.num_hidden_layers


def _measured(point: Point, kl: float | None) -> Point:
    return Point(formats=point.formats, bytes=point.bytes, predicted=point.predicted, measured=kl)


def _spread(count: int) -> set[int]:
    return {round(i * (count - 1) / (TRIED - 1)) for i in range(TRIED)}


def _curve(
    units: Sequence[Unit],
    sizes: Mapping[tuple[str, Format], float],
    prices: Mapping[tuple[str, Format], float],
    fixed: float,
) -> list[Point]:
    """From the smallest formats up, each step the one that gains most for a byte.

    A step may skip a format that gains less for a byte than the one above it.
    """
    at = [len(FORMATS) - 1] * len(units)

    def point() -> Point:
        formats = tuple(FORMATS[i] for i in at)
        pairs = [(unit.name, chosen) for unit, chosen in zip(units, formats, strict=True)]
        return Point(
            formats=formats,
            bytes=fixed + sum(sizes[pair] for pair in pairs),
            predicted=sum(prices[pair] for pair in pairs),
        )

    points = [point()]
    while any(at):
        steps = [
            ((prices[u.name, FORMATS[at[n]]] - prices[u.name, FORMATS[to]])
             / (sizes[u.name, FORMATS[to]] - sizes[u.name, FORMATS[at[n]]]), -n, to)
            for n, u in enumerate(units)
            for to in range(at[n])
        ]  # fmt: skip
        _, minus, to = max(steps)
        at[-minus] = to
        points.append(point())
    return points


def _recipe(config: ModelConfig, units: Sequence[Unit], formats: Sequence[Format]) -> Recipe:
    """Rules by format; the MTP layer has of each kind of unit what most layers have."""
    patterns: dict[Format, list[str]] = {}
    votes: dict[str, list[Format]] = {}
    for unit, chosen in zip(units, formats, strict=True):
        patterns.setdefault(chosen, []).extend(unit.patterns)
        votes.setdefault(unit.name.rpartition(" ")[2], []).append(chosen)
    if config.has_mtp:
        at = f"model.layers.{config.mtp_layer}"
        kinds = {
            "dense": [f"{at}.attention.dense", f"{at}.eh_proj"],
            "experts": [f"{at}.mlp.experts.*"],
            "shared": [f"{at}.mlp.shared_experts.*"],
        }
        for kind, found in votes.items():
            most = max(FORMATS, key=found.count)
            patterns.setdefault(most, []).extend(kinds.get(kind, []))
    rules = tuple(
        Rule(modules=tuple(names), format=chosen)
        for chosen, names in patterns.items()
        if chosen.kind != "plain"
    )
    is_fp8 = any(rule.format.kind == "fp8_block" for rule in rules)
    return Recipe(
        name=_PRECISION,
        summary="formats by measured sensitivity, for a budget of bytes a token",
        activations="fp8" if is_fp8 else "plain",
        rules=rules,
    )


# ------------------------------------------------------------------------------------------ passes


class _Passes:
    """Runs copies of the samples through the model; they differ in what is rounded."""

    def __init__(
        self,
        source: Source,
        samples: Samples,
        *,
        device: str,
        work_dir: Path | None,
        done: Callable[[int], None],
    ) -> None:
        self._source = source
        self._config = source.config
        self._samples = samples
        self._device = torch.device(device)
        self._work_dir = work_dir
        self._done = done
        self._lengths = lengths(samples.samples)
        self._rows = samples.tokens
        self._heads: dict[Format, Tensor] = {}

    def singles(self, wanted: Sequence[tuple[Unit, Format]]) -> list[float]:
        """Divergence with one unit in a format and all else plain, of each."""
        recipes = [_only(unit, chosen) for unit, chosen in wanted]
        starts = [unit.layer for unit, _ in wanted]
        return self._run(recipes, starts, plain_after=True)

    def wholes(self, recipes: Sequence[Recipe]) -> list[float]:
        """Divergence of whole recipes."""
        return self._run(recipes, [0] * len(recipes), plain_after=False)

    def _run(
        self, recipes: Sequence[Recipe], starts: Sequence[int], *, plain_after: bool
    ) -> list[float]:
        """Divergence of each copy from the plain one.

        Args:
            recipes: How each copy's weights are rounded.
            starts: The layer at which it parts from the plain one; -1 for the head.
            plain_after: Whether a copy is plain behind that layer: then all such go together.
        """
        folder = Path(tempfile.mkdtemp(dir=self._work_dir))
        try:
            stream = self._embedded(folder)
            copies: list[int] = []  # which recipe stands where behind the plain rows
            for layer in range(self._config.num_hidden_layers):
                new = [i for i, start in enumerate(starts) if start == layer]
                together = copies if plain_after else []
                groups = [(_PLAIN, [-1, *together])]
                groups += [(recipes[i], [i]) for i in (new if plain_after else range(len(recipes)))]
                stream = self._layer(folder, layer, stream, [-1, *copies], groups)
                copies = [i for _, members in groups for i in members if i >= 0]
                self._done(1)
            heads = [i for i, start in enumerate(starts) if start < 0]
            places = {i: 1 + n for n, i in enumerate(copies)} | dict.fromkeys(heads, 0)
            return self._divergence(stream, recipes, places)
        finally:
            shutil.rmtree(folder)

    def _layer(
        self,
        folder: Path,
        layer: int,
        stream: Spill,
        order: Sequence[int],
        groups: Sequence[tuple[Recipe, Sequence[int]]],
    ) -> Spill:
        """Run each group of copies through a layer by its own recipe.

        Args:
            folder: For activations.
            layer: Its number.
            stream: The copies' rows before it, in `order`; a new copy has the plain one's.
            order: Which copy stands where; -1 is the plain one.
            groups: Recipe and copies, in the order of the result.
        """
        width = self._config.hidden_size
        total = sum(len(members) for _, members in groups)
        result = Spill(folder / f"stream-{layer + 1}.f32", total * self._rows, width)
        at = 0
        for recipe, members in groups:
            tokens = Tokens.of(
                [one.origin for one in self._samples.samples] * len(members),
                self._lengths * len(members),
            )
            before = Spill(folder / "before.f32", tokens.count, width)
            for n, copy in enumerate(members):
                place = order.index(copy) if copy in order else 0
                self._copy(stream, place, before, n)
            after = Spill(folder / "after.f32", tokens.count, width)
            job = Job(
                source=self._source,
                recipe=recipe,
                method=Method(int4="nearest", fp8="nearest"),
                fallback_below=0,
                device=self._device,
                percentile=100.0,
                done=lambda _count: None,
            )
            files = (folder / "a.safetensors", folder / "m.safetensors")  # never written
            Layer(job, layer, tokens, folder).run(before, after, files)
            for n in range(len(members)):
                self._copy(after, n, result, at + n)
            at += len(members)
            before.remove()
            after.remove()
        stream.remove()
        return result

    def _copy(self, source: Spill, place: int, target: Spill, to: int) -> None:
        for first in range(0, self._rows, _ROWS):
            end = min(first + _ROWS, self._rows)
            here, there = place * self._rows, to * self._rows
            target[there + first : there + end] = source[here + first : here + end]

    def _embedded(self, folder: Path) -> Spill:
        from lingc.calibrate.run import embedded  # noqa: PLC0415 it imports more than this needs

        stream = Spill(folder / "stream-0.f32", self._rows, self._config.hidden_size)
        first = 0
        for one in self._samples.samples:
            stream[first : first + len(one.ids)] = embedded(self._source, one.ids)
            first += len(one.ids)
        return stream

    def _divergence(
        self, stream: Spill, recipes: Sequence[Recipe], places: Mapping[int, int]
    ) -> list[float]:
        """KL of each copy from the plain one, which stands first."""
        norm = weight_of(self._source, "model.norm", self._device)
        sums = torch.zeros(len(recipes), dtype=torch.float64)
        for first in range(0, self._rows, _ROWS):
            end = min(first + _ROWS, self._rows)

            def hidden(place: int, rows: slice = slice(first, end)) -> Tensor:
                start = place * self._rows
                x = stream[start + rows.start : start + rows.stop].to(self._device)
                return functional.rms_norm(x, (x.shape[-1],), norm, self._config.rms_norm_eps)

            plain = self._logits(hidden(0), PLAIN).log_softmax(-1)
            for i, recipe in enumerate(recipes):
                logits = self._logits(hidden(places[i]), recipe.format_of("lm_head"))
                terms = plain.exp() * (plain - logits.log_softmax(-1))
                sums[i] += float(terms.sum(dtype=torch.float64))
        return [float(value) / self._rows for value in sums]

    def _logits(self, hidden: Tensor, chosen: Format) -> Tensor:
        """[T, vocab]; a head is made once for each format."""
        if chosen not in self._heads:
            values = to_rounded(self._source, "lm_head.weight", chosen.kind, chosen.group)
            self._heads[chosen] = torch.from_numpy(values).to(self._device)
        return functional.linear(hidden, self._heads[chosen])


_PLAIN = Recipe(name="plain", summary="", activations="plain", rules=())


def _only(unit: Unit, chosen: Format) -> Recipe:
    rule = Rule(modules=unit.patterns, format=chosen)
    return Recipe(name="one", summary="", activations="plain", rules=(rule,))
