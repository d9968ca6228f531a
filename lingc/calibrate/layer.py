"""One layer: its inputs are watched, its matrices rounded, its outputs made with what they became.

Matrices go by what they read. Those behind a rounded one see what it gives now, so that an error is
made up for and not passed on. No more than one expert's matrices, or one attention's, are held.

    norm -> query_key_value, g_proj   or   q_a_proj, kv_a_proj_with_mqa -> q_b_proj
         -> mixer -> dense -> residual -> norm -> router
                                               -> each expert:  gate_proj, up_proj -> down_proj
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lingc.calibrate.attention import Attention, attention_names
from lingc.calibrate.matrices import weight_of
from lingc.calibrate.observers import Observer
from lingc.calibrate.rounder import Job, Rounder, Watch, describe
from lingc.calibrate.spill import Spill, Tokens, chunks, refuse_wild, wild_row
from lingc.checkpoint.source import Source
from lingc.model.moe import Router

STACKED = 1 << 22
"""Elements of Hessians that are worked on together on a CPU: with fewer, Python takes the time."""

STACKED_CUDA = 1 << 27
"""The same on a GPU, where launches are."""


_SLOPE_ROWS = 256
"""Rows whose products are made into gradients at a time."""


class _Part(NamedTuple):
    """One SwiGLU, `model.layers.1.mlp.experts.3`, and whose tokens it reads.

    Attributes:
        rows: Numbers of the tokens.
        weights: What the router gives each; None where there is no router.
    """

    name: str
    rows: Tensor
    weights: Tensor | None

    def by(self, some: Tensor) -> Tensor | None:
        """The weights of some of the tokens."""
        return None if self.weights is None else self.weights[some]


class Layer:
    """Calibrates one layer.

    Args:
        job: What is wanted.
        number: Of the layer; the MTP layer's is the number of main layers.
        tokens: Whose rows the activations are.
        folder: For files of activations that live as long as the layer is worked on.
        slopes: Gradients of the model's loss, of the residual stream behind the layer and between
            its two parts; None where each matrix is rounded for its own outputs.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        tokens: Tokens,
        folder: Path,
        slopes: tuple[Spill, Spill] | None = None,
    ) -> None:
        self._job = job
        self._config = job.source.config
        self._number = number
        self._tokens = tokens
        self._folder = folder
        self._behind = None if slopes is None else slopes[0]
        self._middle = None if slopes is None else slopes[1]
        self._prefix = f"model.layers.{number}"
        self._halves = tokens.halves()
        self.rounder = Rounder(job)
        self.seen = self.rounder.seen

    def run(self, x: Spill, after: Spill, files: tuple[Path, Path]) -> None:
        """Calibrate, and compute the layer's outputs.

        Args:
            x: The residual stream before the layer.
            after: Filled with the residual stream behind it.
            files: Where the tensors of attention and of the feed-forward part go.

        Raises:
            InputError: An activation is NaN or infinite.
        """
        hidden = self._config.hidden_size
        normed = Spill(self._folder / "normed.f32", self._tokens.count, hidden)
        try:
            with self.rounder.storing(files[0], self._attention_modules()):
                self._attention(x, after, normed)
            self._feed_forward(after, normed, files[1])
        finally:
            normed.remove()

    def _vector(self, name: str) -> Tensor:
        return weight_of(self._job.source, f"{self._prefix}.{name}", self._job.device)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _samples(self, spill: Spill) -> Iterator[tuple[slice, Tensor]]:
        """Rows of each sample, on the device."""
        for first, end in self._tokens.spans():
            yield slice(first, end), spill[first:end].to(self._job.device)

    def _check(self, x: Tensor, first: int, name: str) -> None:
        refuse_wild(x, self._tokens, first, f"layer {self._number}", name)

    # ----------------------------------------------------------------------------------- attention

    def _attention_modules(self) -> list[str]:
        at = f"{self._prefix}.attention"
        if not self._config.is_mla(self._number):
            return [f"{at}.query_key_value", f"{at}.g_proj", f"{at}.dense"]
        first = ["q_proj"] if self._config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
        return [f"{at}.{name}" for name in (*first, "kv_a_proj_with_mqa", "dense")]

    def _attention(self, x: Spill, after: Spill, normed: Spill) -> None:
        at, config = f"{self._prefix}.attention", self._config
        norm = self._vector("input_layernorm")
        first = [m for m in self._attention_modules() if not m.endswith((".dense", ".q_b_proj"))]
        watch = Watch(self._job, first, config.hidden_size)
        names = attention_names(config, self._number)
        plain = None
        if watch.grams is not None and self._middle is not None:
            local = {f"{name}.weight": self._vector(f"attention.{name}") for name in names}
            local["dense.weight"] = self._vector("attention.dense")
            plain = Attention(config, self._number, local)
            del local
        leaves = [module.removeprefix(at)[1:] for module in first]
        for rows, values in self._samples(x):
            n = self._norm(values, norm)
            self._check(n, rows.start, first[0])
            pulls = None
            if plain is not None and self._middle is not None:
                behind = self._middle[rows].to(n.device)
                pulls = torch.cat(plain.slopes(n, behind, leaves), dim=1)
            watch.see(n, self._halves[rows], pulls=pulls)
        del plain
        weights = self.rounder.settle(watch)
        del watch
        others = {f"{at}.{name}" for name in names}.difference(self._attention_modules())
        weights |= {name: self._vector(name.removeprefix(self._prefix)[1:]) for name in others}
        if f"{at}.q_b_proj" in self._attention_modules():
            weights |= self._query(x, norm, weights)
        local = {f"{name.removeprefix(at)[1:]}.weight": value for name, value in weights.items()}
        self._output(x, after, normed, norm, Attention(config, self._number, local))

    def _query(self, x: Spill, norm: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second projection of the queries, which reads the first one's latent."""
        at, rank = f"{self._prefix}.attention", self._config.q_lora_rank
        assert rank is not None, "asked for where there is one"
        watch = Watch(self._job, [f"{at}.q_b_proj"], rank)
        if not watch.is_blind:
            for rows, values in self._samples(x):
                latent = functional.linear(self._norm(values, norm), weights[f"{at}.q_a_proj"])
                latent = self._norm(latent, weights[f"{at}.q_a_layernorm"])
                self._check(latent, rows.start, f"{at}.q_b_proj")
                watch.see(latent, self._halves[rows])
        return self.rounder.settle(watch)

    def _output(
        self, x: Spill, after: Spill, normed: Spill, norm: Tensor, attention: Attention
    ) -> None:
        """The output projection, the residual stream behind it, and the next norm of that."""
        dense = f"{self._prefix}.attention.dense"
        width = self._job.source.shape(f"{dense}.weight")[1]
        watch = Watch(self._job, [dense], width)
        mixed = Spill(self._folder / "mixed.f32", self._tokens.count, width)
        try:
            for rows, values in self._samples(x):
                y = attention.mixed(self._norm(values, norm))
                self._check(y, rows.start, dense)
                pulls = None if self._middle is None else self._middle[rows].to(y.device)
                watch.see(y, self._halves[rows], pulls=pulls)
                mixed[rows] = y
            weight = self.rounder.settle(watch)[dense]
            next_norm = self._vector("post_attention_layernorm")
            for rows, values in self._samples(x):
                y = mixed[rows].to(self._job.device)
                behind = values + functional.linear(y, weight)
                after[rows] = behind
                n = self._norm(behind, next_norm)
                self._check(n, rows.start, f"{self._prefix}.mlp")
                normed[rows] = n
        finally:
            mixed.remove()

    # -------------------------------------------------------------------------------- feed-forward

    def _feed_forward(self, after: Spill, normed: Spill, path: Path) -> None:
        mlp, config = f"{self._prefix}.mlp", self._config
        every = torch.arange(self._tokens.count)
        if config.is_dense(self._number):
            with self.rounder.storing(path, swiglu_modules(mlp)):
                self._mlps([_Part(mlp, every, None)], after, normed)
            return
        ids, weights = self._route(normed)
        counts = torch.bincount(ids.flatten(), minlength=config.num_experts).tolist()
        self.seen.coverage[str(self._number)] = counts
        enough = [e for e, count in enumerate(counts) if count >= self._job.fallback_below]
        shared = [f"{mlp}.shared_experts"] if config.num_shared_experts else []
        modules = [m for e in enough for m in swiglu_modules(f"{mlp}.experts.{e}")]
        modules += [m for name in shared for m in swiglu_modules(name)]
        self._observe_experts(normed)
        inner = Watch(self._job, [f"{mlp}.experts.0.down_proj"], config.moe_intermediate_size)
        parts = {}
        for e in range(config.num_experts):
            rows, rank = torch.nonzero(ids == e, as_tuple=True)
            parts[e] = _Part(f"{mlp}.experts.{e}", rows, weights[rows, rank])
        rare = [parts[e] for e in parts if counts[e] < self._job.fallback_below]
        with self.rounder.storing(path, modules):
            for some in self._stacks([parts[e] for e in enough]):
                self._mlps(some, after, normed, inner=inner.observer)
            for some in self._stacks(rare):
                self._mlps(some, after, normed, is_fallback=True, inner=inner.observer)
            for name in shared:
                self._mlps([_Part(name, every, None)], after, normed)
        if inner.observer is not None:
            downs = [f"{mlp}.experts.{e}.down_proj" for e in range(config.num_experts)]
            self.seen.inputs.append(describe(inner.observer, downs, self._job.percentile))

    def _route(self, normed: Spill) -> tuple[Tensor, Tensor]:
        """Experts of every token and their weights, [tokens, k] each."""
        router = new_router(self._job.source, self._number, self._job.device)
        chosen = [router(n) for _, n in self._samples(normed)]
        ids = torch.cat([ids.cpu() for ids, _ in chosen])
        return ids, torch.cat([weights.cpu() for _, weights in chosen])

    def _observe_experts(self, normed: Spill) -> None:
        """One scale for the inputs of all experts, which are the same rows, sorted."""
        names = [
            f"{self._prefix}.mlp.experts.{e}.{leaf}"
            for e in range(self._config.num_experts)
            for leaf in ("gate_proj", "up_proj")
        ]
        observer = Watch(self._job, names[:2], self._config.hidden_size).observer
        if observer is None:
            return
        for _, n in self._samples(normed):
            observer.see(n)
        self.seen.inputs.append(describe(observer, names, self._job.percentile))

    def _stacks(self, parts: Sequence[_Part]) -> Iterator[Sequence[_Part]]:
        """Experts that are rounded together: many small ones, or few large ones."""
        widest = max(self._config.hidden_size, self._config.moe_intermediate_size)
        budget = STACKED_CUDA if self._job.device.type == "cuda" else STACKED
        count = max(1, budget // widest**2)
        return (parts[i : i + count] for i in range(0, len(parts), count))

    def _mlps(
        self,
        parts: Sequence[_Part],
        after: Spill,
        normed: Spill,
        *,
        is_fallback: bool = False,
        inner: Observer | None = None,
    ) -> None:
        """SwiGLUs over some tokens each; their results are added to the residual stream.

        Args:
            parts: Of one width.
            after: The residual stream.
            normed: The inputs of all tokens.
            is_fallback: Whether too few tokens came to round by.
            inner: What watches the inputs of all experts' `down_proj`, in place of their own.
        """
        # What was watched, and what for, is let go before the next is held.
        outers = (self._watched_outer(part, normed) for part in parts)
        values = self.rounder.settle(*outers, is_fallback=is_fallback)
        inners = (self._watched_inner(part, normed, values, inner) for part in parts)
        values |= self.rounder.settle(*inners, is_fallback=is_fallback)
        for part in parts:
            for some, n in self._rows(normed, part.rows):
                down = values[f"{part.name}.down_proj"]
                y = functional.linear(self._inner(part, n, values), down)
                by = part.by(some)
                after.add(part.rows[some], y if by is None else y * by.unsqueeze(1).to(y.device))

    def _watched_outer(self, part: _Part, normed: Spill) -> Watch:
        """What a SwiGLU's first two matrices read."""
        watch = self._watch(part, [0, 1])
        whole = self._whole(part, watch)
        for some, n in self._rows(normed, part.rows):
            pulls = None
            if whole is not None:
                gate, up, down = whole
                behind = self._pulls(part, some) @ down
                pulls = torch.cat(swiglu_slopes(n, gate, up, behind)[1:], dim=1)
            watch.see(n, self._halves[part.rows[some]], part.by(some), pulls=pulls)
        return watch

    def _watched_inner(
        self, part: _Part, normed: Spill, values: Mapping[str, Tensor], inner: Observer | None
    ) -> Watch:
        """What its last matrix reads, of the first two as they were rounded."""
        watch = self._watch(part, [2])
        for some, n in self._rows(normed, part.rows):
            h = self._inner(part, n, values)
            self._check_rows(h, part.rows[some], watch.modules[0])
            pulls = None if self._behind is None else self._pulls(part, some)
            watch.see(h, self._halves[part.rows[some]], part.by(some), pulls=pulls)
            if inner is not None:
                inner.see(h)
        return watch

    def _whole(self, part: _Part, watch: Watch) -> list[Tensor] | None:
        """A SwiGLU's matrices as they are, where its inner gradients are wanted."""
        if watch.grams is None or self._behind is None:
            return None
        return [
            weight_of(self._job.source, module, self._job.device)
            for module in swiglu_modules(part.name)
        ]

    def _pulls(self, part: _Part, some: Tensor) -> Tensor:
        """Gradients of what a SwiGLU gives for some of its tokens, [T, D]."""
        assert self._behind is not None, "asked for where there are gradients"
        behind, by = self._behind.take(part.rows[some]).to(self._job.device), part.by(some)
        return behind if by is None else behind * by.unsqueeze(1).to(behind.device)

    def _watch(self, part: _Part, which: Sequence[int]) -> Watch:
        modules = [swiglu_modules(part.name)[i] for i in which]
        watch = Watch(self._job, modules, self._job.source.shape(f"{modules[0]}.weight")[1])
        if part.weights is not None:  # experts have one observer for all of a layer
            watch.observer = None
        return watch

    @staticmethod
    def _inner(part: _Part, n: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        gate = functional.linear(n, values[f"{part.name}.gate_proj"])
        return functional.silu(gate) * functional.linear(n, values[f"{part.name}.up_proj"])

    def _rows(self, spill: Spill, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions in `rows`, a bounded number at a time, and the values of those rows."""
        for part in chunks(torch.arange(len(rows))):
            if len(part):
                yield part, spill.take(rows[part]).to(self._job.device)

    def _check_rows(self, x: Tensor, rows: Tensor, name: str) -> None:
        wild = wild_row(x)
        if wild is not None:
            self._check(x[wild : wild + 1], int(rows[wild]), name)


def new_router(source: Source, number: int, device: torch.device) -> Router:
    """The router of a layer, with its weights."""
    with torch.device("meta"):
        router = Router(source.config)
    for leaf in ("weight", "expert_bias"):
        value = torch.from_numpy(source.dense(f"model.layers.{number}.mlp.gate.{leaf}"))
        parameter = torch.nn.Parameter(value.to(device), requires_grad=False)
        router.register_parameter(leaf, parameter)
    return router


def swiglu_slopes(
    n: Tensor, gate: Tensor, up: Tensor, behind: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Inside of silu(n G^T) * (n U^T): it, and the gradients of both products, f32 [T, F] each.

    Besides these and `behind`, which may be gigabytes together, no more is held than of some rows.

    Args:
        n: f32 [T, D].
        gate: G, f32 [F, D].
        up: U, f32 [F, D].
        behind: Gradient of the product, f32 [T, F].
    """
    of_gate, product = functional.linear(n, gate), functional.linear(n, up)
    of_up = torch.empty_like(product)
    for first in range(0, len(n), _SLOPE_ROWS):
        rows = slice(first, first + _SLOPE_ROWS)
        a, u, back = of_gate[rows], product[rows], behind[rows]
        share = torch.sigmoid(a)
        inner = a * share
        slope = back * u * share * (1 + a * (1 - share))
        of_up[rows] = back * inner
        product[rows] = inner * u  # a and u are read no more
        of_gate[rows] = slope
    return product, of_gate, of_up


def swiglu_modules(name: str) -> list[str]:
    """The three matrices of a feed-forward, in the order that they run in."""
    return [f"{name}.gate_proj", f"{name}.up_proj", f"{name}.down_proj"]
