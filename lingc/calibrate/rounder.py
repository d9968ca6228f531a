"""Watching the inputs of matrices, rounding these by them, and storing what comes of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lingc.calibrate.matrices import (
    USUAL_DAMPING,
    Made,
    Method,
    choose_damping,
    make_fp8,
    make_int4,
    runs_of,
    tried_step,
    weight_of,
)
from lingc.calibrate.observers import RULES, Observer
from lingc.checkpoint.convert import is_stored_as, to_rounded
from lingc.checkpoint.items import item
from lingc.checkpoint.source import Source
from lingc.checkpoint.tensorfile import TensorWriter
from lingc.quantize.recipes import Recipe
from lingc.resuming import appearing

COUPLED = 1024
"""Rows of a matrix that are rounded knowing of each other's errors."""

TALL = 8192
"""Rows of a matrix of a great many that are held at a time, whole blocks of any format."""

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

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Watch:
    """Sums over the inputs of some modules, and over gradients of what these give.

    Attributes:
        grams: Sum of x x^T over each half of the samples, f32 [2, D, D]; None where nobody needs
            it. With gradients g each token counts by its |g|.
        outputs: By modules that are rounded together, sums of g g^T for some rows each, f32 [n, n],
            in which each token counts by its |x|; none where gradients were not seen.
    """

    def __init__(self, job: Job, modules: Sequence[str], width: int) -> None:
        self.modules = modules
        formats = {job.recipe.format_of(module) for module in modules}
        used = any(job.method.is_used(chosen) for chosen in formats)
        self.grams = torch.zeros(2, width, width, device=job.device) if used else None
        is_fp8 = any(chosen.kind.startswith("fp8") for chosen in formats)
        observed = job.recipe.activations != "plain" and is_fp8
        self.observer = Observer(width) if observed else None
        self.outputs: dict[tuple[str, ...], list[Tensor]] = {}
        self._heights = {
            some: sum(job.source.shape(f"{module}.weight")[0] for module in some)
            for some in together(job, modules)
        }
        self.rows = 0

    @property
    def is_blind(self) -> bool:
        """Whether nothing needs to be seen."""
        return self.grams is None and self.observer is None

    def see(
        self,
        x: Tensor,
        halves: Tensor,
        weights: Tensor | None = None,
        *,
        pulls: Tensor | None = None,
    ) -> None:
        """Add rows of inputs.

        Args:
            x: f32 [T, D].
            halves: bool [T], which half of the samples each is of.
            weights: f32 [T], by whose square each counts, a router's; 1 where None.
            pulls: f32 [T, N of all modules], gradients of the model's loss; they hold the weights
                already, and stand in for these.
        """
        self.rows += x.shape[0]
        if self.observer is not None:
            self.observer.see(x)
        if self.grams is None:
            return
        if pulls is not None:
            # The square of |g| and |x| would be the Kronecker product's: but then a few tokens
            # decide, and text that is not among the samples gains less.
            weights = pulls.norm(dim=1).sqrt()
            self._see_pulls(pulls * x.norm(dim=1, keepdim=True).sqrt())
        weighed = x if weights is None else x * weights.unsqueeze(1).to(x.device)
        for half in range(2):
            mine = halves == bool(half)
            if bool(mine.all()):
                self.grams[half] += weighed.T @ weighed
            elif bool(mine.any()):
                some = weighed[mine.to(x.device)]
                self.grams[half] += some.T @ some

    def _see_pulls(self, pulls: Tensor) -> None:
        first = 0
        for modules, height in self._heights.items():
            parts = pulls[:, first : first + height].split(COUPLED, dim=1)
            first += height
            if modules not in self.outputs:
                self.outputs[modules] = [
                    part.new_zeros(part.shape[1], part.shape[1]) for part in parts
                ]
            for n, part in enumerate(parts):
                self.outputs[modules][n] += part.T @ part


def is_made(job: Job, module: str) -> bool:
    """Whether a matrix is rounded by data, and not copied or left to rounding to nearest."""
    chosen = job.recipe.format_of(module)
    stored = is_stored_as(job.source, f"{module}.weight", chosen.kind, chosen.group)
    return job.method.is_used(chosen) and not stored


def together(job: Job, modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Neighbours whose rows are rounded as those of one matrix: quicker, and knowing of each other.

    Blocks of FP8 must not span two matrices.
    """
    groups: list[tuple[str, ...]] = []
    before = None
    for module in modules:
        chosen = job.recipe.format_of(module)
        is_apart = chosen.kind != "int4_group" or not is_made(job, module)
        if groups and not is_apart and chosen == before:
            groups[-1] += (module,)
        else:
            groups.append((module,))
        before = None if is_apart else chosen
    return groups


class Rounder:
    """Rounds the matrices of one layer, and notes what came of it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._writer: TensorWriter | None = None
        self._dampings: dict[object, float] = {}
        self.seen = Seen()

    @contextmanager
    def storing(self, path: Path, modules: Sequence[str]) -> Iterator[None]:
        """Store what is made of some modules in a file; none where nothing will be made."""
        job = self._job
        pieces = {
            name: piece
            for module in modules
            if is_made(job, module)
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
        """Round the matrices that read what was watched, alike ones together.

        Args:
            watches: Have seen the inputs, each of its matrices.
            is_fallback: Too few tokens came: leave them to rounding to nearest.

        Returns:
            The values that they have from now on, f32, by module.
        """
        values: dict[str, Tensor] = {}
        alike: dict[object, list[tuple[Watch, tuple[str, ...]]]] = {}
        for watch in watches:
            for modules in together(self._job, watch.modules):
                chosen = self._job.recipe.format_of(modules[0])
                if is_fallback or not is_made(self._job, modules[0]):
                    values |= {module: self._left(module, watch.rows) for module in modules}
                else:
                    shapes = [self._job.source.shape(f"{module}.weight") for module in modules]
                    key = (chosen, tuple(shapes))
                    alike.setdefault(key, []).append((watch, modules))
        for stack in alike.values():
            values |= self._made(stack)
        self._end(watches)
        return values

    def settle_tall(self, watch: Watch) -> None:
        """Round a matrix that may have too many rows to be held, run of rows after run of rows.

        Args:
            watch: Has seen the inputs of the one matrix. Nobody reads what becomes of it.
        """
        (module,), job = watch.modules, self._job
        if not is_made(job, module):
            self._tell_left(module, watch.rows)
        elif job.recipe.format_of(module).kind == "fp8_tensor":  # all rows have one scale
            self.settle(watch)
            return
        else:
            self._make_tall(watch, module)
        self._end([watch])

    def _end(self, watches: Sequence[Watch]) -> None:
        """Tell that the matrices of some watches are behind, and note what they read."""
        job = self._job
        job.done(sum(len(watch.modules) for watch in watches))
        for watch in watches:
            if watch.observer is not None:
                self.seen.inputs.append(describe(watch.observer, watch.modules, job.percentile))

    def _make_tall(self, watch: Watch, module: str) -> None:
        """Round runs of rows, and store them as one matrix."""
        job, chosen = self._job, self._job.recipe.format_of(module)
        halves, rows = _halves([watch]), []
        step, first = tried_step(job.source.shape(f"{module}.weight")[0]), 0
        for some in runs_of(job.source, module, TALL, job.device):
            rows.append(some[-first % step :: step].clone())
            first += len(some)
        damping = self._damping((module,), torch.cat(rows).unsqueeze(0), halves)
        hessians = _added(halves)
        make = make_int4 if chosen.kind == "int4_group" else make_fp8
        parts = []
        for some in runs_of(job.source, module, TALL, job.device):
            (made,) = make(some.unsqueeze(0), hessians, chosen, job.method, damping=damping)
            parts.append(replace(made, values=torch.empty(0)))  # a slice would hold all of them
            del made
        codes, scales = zip(*(part.pieces for part in parts), strict=True)
        whole = Made(
            pieces=(np.concatenate(codes), np.concatenate(scales)),
            values=parts[0].values,
            sums=torch.cat([part.sums for part in parts], dim=1),
        )
        self._store(module, whole, 0, first, watch.rows, damping)

    def _left(self, module: str, rows: int) -> Tensor:
        """The values that rounding to nearest will give."""
        self._tell_left(module, rows)
        chosen, name = self._job.recipe.format_of(module), f"{module}.weight"
        rounded = to_rounded(self._job.source, name, chosen.kind, chosen.group)
        return torch.from_numpy(rounded).to(self._job.device)

    def _tell_left(self, module: str, rows: int) -> None:
        """Note that a matrix is not rounded by data, unless it stays plain."""
        chosen, name = self._job.recipe.format_of(module), f"{module}.weight"
        if chosen.kind == "plain":
            return
        how = "fallback" if is_made(self._job, module) else "nearest"
        if is_stored_as(self._job.source, name, chosen.kind, chosen.group):
            how = "stored"
        self.seen.matrices.append(_line(module, str(chosen), how, rows))

    def _made(self, stack: Sequence[tuple[Watch, tuple[str, ...]]]) -> dict[str, Tensor]:
        """Round matrices of one format and shape by what was seen, and store them.

        Args:
            stack: What saw the inputs of which modules; these have one format.
        """
        job, chosen = self._job, self._job.recipe.format_of(stack[0][1][0])
        each = [
            torch.cat([weight_of(job.source, module, job.device) for module in modules])
            for _, modules in stack
        ]
        weights = torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0)
        del each  # one matrix alone may be large, and is not held twice
        halves = _halves([watch for watch, _ in stack])
        damping = self._damping(stack[0][1], weights, halves)
        make = make_int4 if chosen.kind == "int4_group" else make_fp8
        outputs = self._outputs(stack)
        is_shared = len(stack) == 1 and set(stack[0][1]) != set(stack[0][0].modules)
        hessians = halves.sum(1) if is_shared else _added(halves)
        made = make(weights, hessians, chosen, job.method, damping=damping, outputs=outputs)
        values: dict[str, Tensor] = {}
        for (watch, modules), one in zip(stack, made, strict=True):
            top = 0
            for module in modules:
                end = top + job.source.shape(f"{module}.weight")[0]
                self._store(module, one, top, end, watch.rows, damping)
                values[module] = one.values[top:end]
                top = end
        return values

    @staticmethod
    def _outputs(stack: Sequence[tuple[Watch, tuple[str, ...]]]) -> list[Tensor]:
        """Sums over gradients of outputs, f32 [M, n, n] for one run of rows after the other.

        Of an expert that no token reached they are zero, where those beside it have some.
        """
        each = [watch.outputs.get(modules, []) for watch, modules in stack]
        seen: Sequence[Tensor] = next((parts for parts in each if parts), [])
        each = [parts or [torch.zeros_like(part) for part in seen] for parts in each]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def _damping(self, modules: Sequence[str], weights: Tensor, halves: Tensor) -> float:
        """As given, or chosen; once a layer for what all experts of one format have alike.

        Args:
            modules: Of the first matrix.
            weights: All of them, f32 [M, N, D].
            halves: f32 [M, 2, D, D].
        """
        method, chosen = self._job.method, self._job.recipe.format_of(modules[0])
        if method.damping is not None or not method.compensates(chosen):
            return method.damping or 0.0
        key = (chosen, *(re.sub(r"experts\.\d+", "experts", module) for module in modules))
        if key in self._dampings:
            return self._dampings[key]
        found = choose_damping(weights, halves, chosen)
        if found is None:  # which says nothing of other experts
            return USUAL_DAMPING
        self._dampings[key] = found
        return found

    def _store(
        self, module: str, made: Made, top: int, end: int, rows: int, damping: float
    ) -> None:
        """Write the rows of one module, and note what it lost."""
        assert self._writer is not None, "a file is open"
        chosen = self._job.recipe.format_of(module)
        stored = item(self._job.source, f"{module}.weight", self._job.recipe)
        pieces: tuple[NDArray[Any], ...] = made.pieces
        if chosen.kind == "int4_group":
            shape = np.array(self._job.source.shape(f"{module}.weight"), np.int64)
            pieces = (*(piece[top:end] for piece in made.pieces), shape)
        for piece, value in zip(stored.pieces, pieces, strict=True):
            self._writer.write(piece, value)
        self.seen.matrices.append(
            {
                **_line(module, str(chosen), "calibrated", rows),
                "loss": made.loss_of(top, end),
                "nearest_loss": made.nearest_loss_of(top, end),
                "damping": damping if self._job.method.compensates(chosen) else None,
            }
        )


def _halves(watches: Sequence[Watch]) -> Tensor:
    """Sums over the inputs, f32 [M, 2, D, D]; of one watch its own and no copy."""
    grams = [watch.grams for watch in watches if watch.grams is not None]
    assert len(grams) == len(watches), "a matrix that is rounded by data was watched"
    return grams[0].unsqueeze(0) if len(grams) == 1 else torch.stack(grams)


def _added(halves: Tensor) -> Tensor:
    """Sums over all samples, f32 [M, D, D], in the place of those over the first half."""
    return halves[:, 0].add_(halves[:, 1])


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
        "damping": None,
    }
