"""What an error anywhere in the model costs at its end: gradients of its loss as it is.

How far rounded predictions are from the model's own is, for small errors, half of e^T F e, with F
the Fisher information: the mean of g g^T over gradients g of -log p(y), y drawn from the model's
own predictions p. One y is drawn for each token. With g for the residual stream behind every layer,
what a token, an expert or an output is worth follows inside of the layer alone (`layer.py`).

The samples run through the layers as they are, then the gradients back, layer by layer:

    state/plain-<l>.f32     residual stream before layer l; dropped when the gradients are behind it
    state/slope-<l>.f32     gradient of the stream behind layer l
    state/middle-<l>.f32    gradient of the stream between its attention and its feed-forward part

A killed run goes on with the layer that it was in: a file that has its name is whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lingc.calibrate.attention import Attention, attention_names
from lingc.calibrate.layer import Layer, new_router, swiglu_modules, swiglu_slopes
from lingc.calibrate.matrices import Method, count_matrices, runs_of, weight_of
from lingc.calibrate.rounder import Job
from lingc.calibrate.spill import Spill, Tokens, chunks
from lingc.quantize.recipes import Recipe
from lingc.staging import write_whole

SEED = 0
"""Of the predictions that are drawn."""

_WORDS = 8192
"""Rows of the head that are multiplied at a time: all of it may be gigabytes."""

TOGETHER = 4096
"""Tokens of samples that are held while the head is read: it is read thrice for so many."""

_PLAIN = Recipe(name="plain", summary="nothing is rounded", activations="plain", rules=())


class Gradients:
    """Makes the files of gradients that are not there yet.

    Args:
        job: Whose checkpoint and device; `done` is told the matrices of a layer when the samples
            ran through it, and again when the gradients did.
        tokens: Of the samples.
        state: Folder of the files.
        embedded: Makes the residual stream before the first layer, under a name.
    """

    def __init__(
        self, job: Job, tokens: Tokens, state: Path, embedded: Callable[[Path], Spill]
    ) -> None:
        method = Method(int4="nearest", fp8="nearest")
        self._job = replace(job, recipe=_PLAIN, method=method, done=lambda _count: None)
        self._done = job.done
        self._config = job.source.config
        self._tokens = tokens
        self._state = state
        self._embedded = embedded

    def run(self) -> None:
        """Run what is not behind.

        Raises:
            InputError: An activation is NaN or infinite.
        """
        told, last = self._state / "gradients.json", self._config.num_hidden_layers - 1
        for number in range(last + 1):
            if not told.exists() and not self._path("slope", last).exists():
                self._forward(number)
            self._done(count_matrices(self._job.source, f"model.layers.{number}."))
        if not told.exists() and not self._path("slope", last).exists():
            self._head()
        for number in reversed(range(last + 1)):
            if not told.exists() and not self._path("middle", number).exists():
                self._backward(number)
            self._path("plain", number).unlink(missing_ok=True)
            self._done(count_matrices(self._job.source, f"model.layers.{number}."))
        self._path("plain", last + 1).unlink(missing_ok=True)
        write_whole(told, "{}\n")

    def slopes(self, number: int) -> tuple[Spill, Spill]:
        """Gradients of the stream behind a layer, and between its two parts."""
        return self._there("slope", number), self._there("middle", number)

    def drop(self, number: int) -> None:
        """Remove the files of a layer that is rounded."""
        for kind in ("slope", "middle"):
            self._path(kind, number).unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        return self._state / f"{kind}-{number:04}.f32"

    def _there(self, kind: str, number: int) -> Spill:
        path = self._path(kind, number)
        return Spill(path, self._tokens.count, self._config.hidden_size, is_there=True)

    def _new(self, name: str, width: int | None = None) -> Spill:
        path = self._state / f"{name}.f32"
        return Spill(path, self._tokens.count, width or self._config.hidden_size)

    # ------------------------------------------------------------------------------------- forward

    def _forward(self, number: int) -> None:
        if self._path("plain", number + 1).exists():
            return
        if number == 0 and not self._path("plain", 0).exists():
            self._embedded(self._path("plain", 0))
        after = self._new("plain-after")
        layer = Layer(self._job, number, self._tokens, self._state)
        nowhere = self._state / "nowhere"  # nothing is rounded, so that nothing is stored
        layer.run(self._there("plain", number), after, (nowhere, nowhere))
        after.rename(self._path("plain", number + 1))

    def _head(self) -> None:
        """Draw a prediction for every token, and find the gradient of the last layer's outputs."""
        config, device = self._config, self._job.device
        stream = self._there("plain", config.num_hidden_layers)
        slope = self._new("slope-new")
        weight = weight_of(self._job.source, "model.norm", device)
        draw = torch.Generator().manual_seed(SEED)

        def normed(rows: slice) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = stream[rows].to(device).requires_grad_()
                return x, functional.rms_norm(x, (x.shape[-1],), weight, config.rms_norm_eps)

        for group in self._groups():
            first, end = group[0].start, group[-1].stop
            n = torch.empty(end - first, config.hidden_size, device=device)
            drawn = torch.empty(end - first, dtype=torch.float64)
            own = [slice(rows.start - first, rows.stop - first) for rows in group]
            for rows, mine in zip(group, own, strict=True):
                n[mine] = normed(rows)[1].detach()
                drawn[mine] = torch.rand(len(n[mine]), generator=draw, dtype=torch.float64)
            gradient = self._of_logits(n, drawn.to(device), own)
            for rows, mine in zip(group, own, strict=True):
                x, y = normed(rows)
                slope[rows] = torch.autograd.grad(y, x, gradient[mine])[0]
        slope.rename(self._path("slope", config.num_hidden_layers - 1))

    def _groups(self) -> Iterator[list[slice]]:
        """Samples that the head is read for together: neighbours that have few enough tokens."""
        group: list[slice] = []
        for rows in self._spans():
            if group and rows.stop - group[0].start > TOGETHER:
                yield group
                group = []
            group.append(rows)
        yield group

    def _of_logits(self, n: Tensor, drawn: Tensor, samples: Sequence[slice]) -> Tensor:
        """(p - e_y) W over the vocabulary, in parts; y is where the sum of p passes `drawn`.

        Args:
            n: Normed outputs of the last layer, f32 [T, D].
            drawn: From 0 to 1, f64 [T].
            samples: Rows of each. Products are made of one after the other: what comes of a sample
                must not hang on those beside it.
        """
        whole = torch.full((len(n),), -torch.inf, device=n.device)
        for words in self._words():
            for rows in samples:
                part = torch.logsumexp(n[rows] @ words.T, dim=1)
                whole[rows] = torch.logaddexp(whole[rows], part)
        gradient, below = torch.zeros_like(n), torch.zeros_like(drawn)
        chosen = torch.zeros(len(n), dtype=torch.int64, device=n.device)
        for words in self._words():
            for rows in samples:
                p = torch.exp(n[rows] @ words.T - whole[rows].unsqueeze(1))
                gradient[rows] += p @ words
                reached = p.double().cumsum(1) + below[rows].unsqueeze(1)
                chosen[rows] += (reached < drawn[rows].unsqueeze(1)).sum(1)
                below[rows] = reached[:, -1]
        first = 0
        for words in self._words():
            mine = (chosen.clamp(max=self._config.vocab_size - 1) - first).clamp(min=-1)
            here = (mine >= 0) & (mine < len(words))
            gradient[here] -= words[mine[here]]
            first += len(words)
        return gradient

    def _words(self) -> Iterator[Tensor]:
        """Rows of the head, from first to last."""
        return runs_of(self._job.source, "lm_head", _WORDS, self._job.device)

    def _spans(self) -> Iterator[slice]:
        """Rows of each sample."""
        return (slice(first, end) for first, end in self._tokens.spans())

    # ------------------------------------------------------------------------------------ backward

    def _backward(self, number: int) -> None:
        """Gradients of the streams inside of a layer and before it."""
        stream, slope = self._there("plain", number), self._there("slope", number)
        mid, normed = self._new("mid"), self._new("normed")
        pull, middle, before = self._new("pull"), self._new("middle-new"), self._new("slope-new")
        prefix, eps = f"model.layers.{number}", self._config.rms_norm_eps
        attention = self._attention(number)
        norms = [
            weight_of(self._job.source, f"{prefix}.{name}", self._job.device)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]

        def norm(x: Tensor, which: int) -> Tensor:
            return functional.rms_norm(x, (x.shape[-1],), norms[which], eps)

        for rows in self._spans():
            x = stream[rows].to(self._job.device)
            mid[rows] = x + attention.output(norm(x, 0))
            normed[rows] = norm(mid[rows].to(self._job.device), 1)
        self._feed_forward(number, normed, slope, pull)
        for rows in self._spans():
            behind = slope[rows].to(self._job.device)
            with torch.enable_grad():
                x = mid[rows].to(self._job.device).requires_grad_()
                n = norm(x, 1)
            inner = behind + torch.autograd.grad(n, x, pull[rows].to(behind.device))[0]
            middle[rows] = inner
            with torch.enable_grad():
                x = stream[rows].to(self._job.device).requires_grad_()
                y = attention.output(norm(x, 0))
            before[rows] = inner + torch.autograd.grad(y, x, inner)[0]
        for file in (mid, normed, pull):
            file.remove()
        if number:
            before.rename(self._path("slope", number - 1))
        else:
            before.remove()
        middle.rename(self._path("middle", number))  # last: with it the layer is behind

    def _attention(self, number: int) -> Attention:
        at = f"model.layers.{number}.attention"
        names = attention_names(self._config, number)
        weights = {
            f"{name}.weight": weight_of(self._job.source, f"{at}.{name}", self._job.device)
            for name in (*names, "dense")
        }
        return Attention(self._config, number, weights)

    def _feed_forward(self, number: int, normed: Spill, slope: Spill, pull: Spill) -> None:
        """The gradient of the inputs of the feed-forward part, from that of its outputs."""
        mlp, config, device = f"model.layers.{number}.mlp", self._config, self._job.device
        every = torch.arange(self._tokens.count)
        for span in self._spans():
            pull[span] = torch.zeros(span.stop - span.start, pull.shape[1])
        if config.is_dense(number):
            self._part(mlp, every, None, normed, slope, pull)
            return
        router = new_router(self._job.source, number, device)
        choices = [router(normed[rows].to(device)) for rows in self._spans()]
        ids, weights = (torch.cat([one[i].cpu() for one in choices]) for i in range(2))
        of_weights = torch.zeros_like(weights)
        for e in range(config.num_experts):
            rows, rank = torch.nonzero(ids == e, as_tuple=True)
            given = weights[rows, rank]
            told = self._part(f"{mlp}.experts.{e}", rows, given, normed, slope, pull)
            of_weights[rows, rank] = told
        if config.num_shared_experts:
            self._part(f"{mlp}.shared_experts", every, None, normed, slope, pull)
        for span in self._spans():
            with torch.enable_grad():
                n = normed[span].to(device).requires_grad_()
                given = router(n)[1]
            back = torch.autograd.grad(given, n, of_weights[span].to(device))[0]
            pull[span] = pull[span] + back.cpu()

    def _part(
        self,
        name: str,
        rows: Tensor,
        weights: Tensor | None,
        normed: Spill,
        slope: Spill,
        pull: Spill,
    ) -> Tensor:
        """Add one SwiGLU's part to `pull`; the gradients of its tokens' weights, [rows]."""
        gate, up, down = (
            weight_of(self._job.source, module, self._job.device) for module in swiglu_modules(name)
        )
        told = torch.zeros(len(rows))
        for part in chunks(torch.arange(len(rows))):
            n = normed.take(rows[part]).to(self._job.device)
            behind = slope.take(rows[part]).to(self._job.device) @ down
            scale = None if weights is None else weights[part].unsqueeze(1).to(n.device)
            h, of_gate, of_up = swiglu_slopes(n, gate, up, behind)
            told[part] = (h * behind).sum(1).cpu()
            back = of_gate @ gate + of_up @ up
            pull.add(rows[part], back if scale is None else back * scale)
        return told
