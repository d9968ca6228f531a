"""Watching the inputs of matrices, rounding these by them, and storing what comes of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingc.calibrate.matrices import Made, Method, choose_damping, make_fp8, make_int4, weight_of
from lingc.calibrate.observers import RULES, Observer
from lingc.checkpoint.convert import is_stored_as, to_rounded
from lingc.checkpoint.items import item
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import TensorWriter
from lingc.quantize.recipes import Recipe
from lingc.resuming import appearing

Done = Callable[[int], None]
"""Told how many matrices are behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What does not change from layer to layer.

    Attributes:
        source: The checkpoint.
        recipe: Which matrix is stored how.
        method: How matrices are rounded.
        fallback_below: An expert with fewer tokens is left to rounding to nearest.
        device: Where matrices are multiplied.
        percentile: Of the observer of that name.
        done: Told after every matrix.
    """

    source: Source
    recipe: Recipe
    method: Method
    fallback_below: int
    device: torch.device
    percentile: float
    done: Done


@dataclass(slots=True)
class Seen:
    """What a layer, or the head, leaves behind besides its tensors; all of it goes into JSON."""

    matrices: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    coverage: dict[str, list[int]] = field(default_factory=dict)
    dampings: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Watch:
    """Sums over the inputs of some modules, apart for two halves of the samples.

    Attributes:
        grams: Sum of x x^T over each half, f32 [2, D, D]; None where nobody needs it.
    """

    def __init__(self, job: Job, modules: Sequence[str], width: int) -> None:
        self.modules = modules
        formats = {job.recipe.format_of(module) for module in modules}
        used = any(job.method.is_used(chosen) for chosen in formats)
        self.grams = torch.zeros(2, width, width, device=job.device) if used else None
        is_fp8 = any(chosen.kind.startswith("fp8") for chosen in formats)
        observed = job.recipe.activations != "plain" and is_fp8
        self.observer = Observer(width) if observed else None
        self.rows = 0

    @property
    def is_blind(self) -> bool:
        """Whether nothing needs to be seen."""
        return self.grams is None and self.observer is None

    def see(self, x: Tensor, halves: Tensor, weights: Tensor | None = None) -> None:
        """Add rows of inputs.

        Args:
            x: f32 [T, D].
            halves: bool [T], which half of the samples each is of.
            weights: f32 [T], by whose square each counts, a router's; 1 where None.
        """
        self.rows += x.shape[0]
        if self.observer is not None:
            self.observer.see(x)
        if self.grams is None:
            return
        weighed = x if weights is None else x * weights.unsqueeze(1).to(x.device)
        for half in range(2):
            mine = halves == bool(half)
            if bool(mine.all()):
                self.grams[half] += weighed.T @ weighed
            elif bool(mine.any()):
                some = weighed[mine.to(x.device)]
                self.grams[half] += some.T @ some


class Rounder:
    """Rounds the matrices of one layer, and notes what came of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._writer: TensorWriter | None = None
        self._dampings: dict[object, float] = {}
        self.seen = Seen()

    def is_made(self, module: str) -> bool:
        """Whether a matrix is rounded here, and not copied or left to rounding to nearest."""
        chosen = self._job.recipe.format_of(module)
        stored = is_stored_as(self._job.source, f"{module}.weight", chosen.kind, chosen.group)
        return self._job.method.is_used(chosen) and not stored

    @contextmanager
    def storing(self, path: Path, modules: Sequence[str]) -> Iterator[None]:
        """Store what is made of some modules in a file; none where nothing will be made."""
        job = self._job
        pieces = {
            name: piece
            for module in modules
            if self.is_made(module)
            for name, piece in item(job.source, f"{module}.weight", job.recipe).pieces.items()
        }
        if not pieces:
            yield
            return
        with appearing(path) as staged, TensorWriter(staged, pieces) as self._writer:
            yield
            self._writer.finish()
        self._writer = None

    def settle(self, *watches: Watch, is_fallback: bool = False) -> dict[str, Tensor]:
        """Round the matrices that read what was watched; alike ones of INT4 together.

        Args:
            watches: Have seen the inputs, each of its matrices.
            is_fallback: Too few tokens came: leave them to rounding to nearest.

        Returns:
            The values that they have from now on, f32, by module.
        """
        values: dict[str, Tensor] = {}
        alike: dict[object, list[tuple[Watch, list[str]]]] = {}
        for watch in watches:
            for modules in self._together(watch.modules):
                chosen = self._job.recipe.format_of(modules[0])
                if is_fallback or not self.is_made(modules[0]):
                    values |= {module: self._left(module, watch.rows) for module in modules}
                else:
                    shapes = [self._job.source.shape(f"{module}.weight") for module in modules]
                    apart = modules[0] if chosen.kind != "int4_group" else None
                    key = (chosen, tuple(shapes), apart)
                    alike.setdefault(key, []).append((watch, modules))
        for stack in alike.values():
            values |= self._made(stack)
        self._job.done(sum(len(watch.modules) for watch in watches))
        for watch in watches:
            if watch.observer is not None:
                self.seen.inputs.append(
                    describe(watch.observer, watch.modules, self._job.percentile)
                )
        return values

    def _together(self, modules: Sequence[str]) -> list[list[str]]:
        """Modules whose rows are rounded as those of one matrix, which is quicker.

        Rows of INT4 know nothing of each other; blocks of FP8 must not span two matrices.
        """
        groups: dict[object, list[str]] = {}
        for module in modules:
            chosen = self._job.recipe.format_of(module)
            is_apart = chosen.kind != "int4_group" or not self.is_made(module)
            groups.setdefault(module if is_apart else chosen, []).append(module)
        return list(groups.values())

    def _left(self, module: str, rows: int) -> Tensor:
        """The values that rounding to nearest will give."""
        chosen, name = self._job.recipe.format_of(module), f"{module}.weight"
        if chosen.kind != "plain":
            how = "fallback" if self.is_made(module) else "nearest"
            if is_stored_as(self._job.source, name, chosen.kind, chosen.group):
                how = "stored"
            self.seen.matrices.append(_line(module, str(chosen), how, rows))
        rounded = to_rounded(self._job.source, name, chosen.kind, chosen.group)
        return torch.from_numpy(rounded).to(self._job.device)

    def _made(self, stack: Sequence[tuple[Watch, list[str]]]) -> dict[str, Tensor]:
        """Round matrices of one format and shape by what was seen, and store them.

        Args:
            stack: What saw the inputs of which modules; these have one format.
        """
        job, chosen = self._job, self._job.recipe.format_of(stack[0][1][0])
        weights = torch.stack([
            torch.cat([weight_of(job.source, module, job.device) for module in modules])
            for _, modules in stack
        ])  # fmt: skip
        grams = [watch.grams for watch, _ in stack if watch.grams is not None]
        assert len(grams) == len(stack), "a matrix that is rounded by data was watched"
        if chosen.kind == "int4_group":
            halves = torch.stack(grams)
            damping = self._damping(stack[0][1], weights, halves)
            made = make_int4(weights, halves.sum(1), chosen, job.method, damping=damping)
        else:
            pairs = zip(weights, grams, strict=True)
            made = [make_fp8(weight, halves.sum(0), chosen) for weight, halves in pairs]
        values: dict[str, Tensor] = {}
        for (watch, modules), one in zip(stack, made, strict=True):
            top = 0
            for module in modules:
                end = top + job.source.shape(f"{module}.weight")[0]
                self._store(module, one, top, end, watch.rows)
                values[module] = one.values[top:end]
                top = end
        return values

    def _damping(self, modules: Sequence[str], weights: Tensor, halves: Tensor) -> float:
        """As given, or chosen; once a layer for what all experts have alike."""
        method, chosen = self._job.method, self._job.recipe.format_of(modules[0])
        if method.damping is not None or method.int4 != "gptq":
            return method.damping or 0.0
        key = tuple(re.sub(r"experts\.\d+", "experts", module) for module in modules)
        if key not in self._dampings:
            self._dampings[key] = choose_damping(weights, halves, chosen)
            told = {"modules": list(key), "damping": self._dampings[key]}
            self.seen.dampings.append(told)
        return self._dampings[key]

    def _store(self, module: str, made: Made, top: int, end: int, rows: int) -> None:
        """Write the rows of one module, and note what it lost."""
        assert self._writer is not None, "a file is open"
        chosen = self._job.recipe.format_of(module)
        stored = item(self._job.source, f"{module}.weight", self._job.recipe)
        pieces: tuple[NDArray[Any], ...] = made.pieces
        if chosen.kind == "int4_group":
            shape = np.array((end - top, made.values.shape[1]), np.int64)
            pieces = (*(piece[top:end] for piece in made.pieces), shape)
        for piece, value in zip(stored.pieces, pieces, strict=True):
            self._writer.write(piece, value)
        self.seen.matrices.append(
            {
                **_line(module, str(chosen), "calibrated", rows),
                "loss": made.loss_of(top, end),
                "nearest_loss": made.nearest_loss_of(top, end),
            }
        )


def describe(observer: Observer, modules: Sequence[str], percentile: float) -> dict[str, Any]:
    """What was seen of some modules' inputs, as JSON has it."""
    bounds = {rule: observer.bound(rule, percentile) for rule in RULES}
    return {
        "modules": list(modules),
        "bounds": bounds,
        "errors": {rule: observer.errors(bound) for rule, bound in bounds.items()},
        "channels": observer.channel_spread(),
    }


def _line(module: str, stored: str, how: str, rows: int) -> dict[str, Any]:
    return {
        "module": module,
        "format": stored,
        "how": how,
        "tokens": rows,
        "loss": None,
        "nearest_loss": None,
    }
