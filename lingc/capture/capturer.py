"""All blocks of a phase, in order: which piece stands where, with which weights and state."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from lingc.capture.blocks import DraftEntry, Entry, Exit, LatentLayer, LinearLayer
from lingc.capture.export import Piece, export_block
from lingc.capture.inputs import Sizes, input_types
from lingc.capture.stitch import Stitcher
from lingc.errors import StageError
from lingc.graph import Captured
from lingc.model.block import Block
from lingc.model.config import ModelConfig
from lingc.model.mtp import MTP
from lingc.plan import PHASES, TensorType
from lingc.sizing.weights import parameters

READ = {
    "latent": ("positions", "offsets", "cache_rows", "page_table"),
    "prefill": ("positions", "offsets", "slots"),
    "decode": ("positions", "slots", "accepted"),
    "verify": ("positions", "offsets", "slots", "accepted"),
}
"""Inputs that a layer reads: one with latent attention, or with lightning attention by phase."""


class Capturer:
    """Captures phases of one model.

    Every kind of block is exported once, and again only where another phase gives it other inputs.
    """

    def __init__(self, config: ModelConfig, sizes: Sizes | None = None) -> None:
        self.config = config
        self.sizes = sizes or Sizes()
        self.pieces: dict[tuple[Any, ...], Piece] = {}
        self._parameters = parameters(config)

    def capture(self, phase: str) -> Captured:
        """Capture one phase.

        Raises:
            StageError: The phase does not exist for this model, or a block cannot be exported.
        """
        if phase not in PHASES or (phase == "draft" and not self.config.has_mtp):
            raise StageError(f"the model has no phase {phase!r}")
        stitch = Stitcher(self.config, phase, self.sizes)
        x, ropes = self._enter(stitch)
        layers = range(self.config.num_hidden_layers)
        after: dict[str, fx.Node] = {}
        for layer in [self.config.mtp_layer] if phase == "draft" else layers:
            x = self._layer(stitch, layer, x, ropes, after)
        logits, hidden = self._leave(stitch, x)
        program = stitch.program
        program.graph.output((logits, hidden, *after.values()))
        program.outputs, program.updates = ("logits", "hidden"), tuple(after)
        return Captured(program)

    def _enter(self, stitch: Stitcher) -> tuple[fx.Node, dict[int, tuple[fx.Node, ...]]]:
        config, phase = self.config, stitch.program.phase
        linear, latent = config.rotary_dim, config.qk_rope_head_dim
        dims = (latent,) if phase == "draft" else tuple(dict.fromkeys((linear, latent)))
        types = input_types(config, phase)
        given = (types["token_ids"], types["positions"])
        names = ("entry", *types["token_ids"].shape, *dims)
        piece = self._piece(names, lambda: Entry(config, dims), given)
        arguments = (stitch.inputs["token_ids"], stitch.inputs["positions"])
        x, *tables = stitch.add(piece, arguments, self._weights(stitch, "model."), -1)
        ropes: dict[int, tuple[fx.Node, ...]] = {
            d: (tables[2 * i], tables[2 * i + 1]) for i, d in enumerate(dims)
        }
        if phase == "draft":
            prefix = f"model.layers.{config.mtp_layer}."
            wide = TensorType("f32", ("T", config.hidden_size))
            piece = self._piece(("draft", "entry"), lambda: DraftEntry(MTP(config)), (wide, wide))
            weights = self._weights(stitch, prefix)
            (x,) = stitch.add(piece, (x, stitch.inputs["hidden"]), weights, config.mtp_layer)
        return x, ropes

    def _layer(
        self,
        stitch: Stitcher,
        layer: int,
        x: fx.Node,
        ropes: Mapping[int, tuple[fx.Node, ...]],
        after: dict[str, fx.Node],
    ) -> fx.Node:
        config, phase = self.config, stitch.program.phase
        latent = config.is_mla(layer)
        states = {n: s for n, s in stitch.states.items() if n.endswith(f".{layer}")}
        cos, sin = ropes[config.qk_rope_head_dim if latent else config.rotary_dim]
        meta = {name: stitch.inputs[name] for name in READ["latent" if latent else phase]}
        tokens = x.meta["type"].shape[0]
        rope = TensorType("f32", (tokens, cos.meta["type"].shape[1]))
        given = (
            TensorType("f32", (tokens, config.hidden_size)),
            rope,
            rope,
            {n: s.meta["type"] for n, s in meta.items()},
            [s.meta["type"] for s in states.values()],
        )

        def module() -> nn.Module:
            block = Block(config, layer)
            if latent:
                return LatentLayer(block, config, self.sizes.page_size)
            return LinearLayer(block, phase)

        attention = ("latent", tokens) if latent else ("lightning", phase)
        kind = (*attention, "dense" if config.is_dense(layer) else "experts")
        piece = self._piece(kind, module, given)
        weights = self._weights(stitch, f"model.layers.{layer}.")
        arguments = (x, cos, sin, *meta.values(), *states.values())
        x, *updated = stitch.add(piece, arguments, weights, layer)
        after.update(zip(states, updated, strict=False))
        return x

    def _leave(self, stitch: Stitcher, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        config, phase = self.config, stitch.program.phase
        every = phase in ("decode", "verify")
        name = "final_layernorm" if phase == "draft" else "norm"
        tokens = x.meta["type"].shape[0]
        given = [TensorType("f32", (tokens, config.hidden_size))]
        arguments = [x]
        if not every:
            given.append(TensorType("i32", ("N",)))
            arguments.append(stitch.inputs["logit_rows"])
        kind = ("exit", tokens, name, *(() if every else ("rows",)))
        piece = self._piece(kind, lambda: Exit(config, norm=name), tuple(given))
        layer = config.mtp_layer if phase == "draft" else -1
        prefix = f"model.layers.{layer}." if phase == "draft" else "model."
        weights = self._weights(stitch, prefix)
        logits, hidden = stitch.add(piece, tuple(arguments), weights, -1)
        return logits, hidden

    def _piece(
        self, kind: tuple[Any, ...], make: Callable[[], nn.Module], types: tuple[Any, ...]
    ) -> Piece:
        """The piece of a kind, exported where this is the first of it."""
        if kind not in self.pieces:
            with torch.device("meta"):
                module = make()
            self.pieces[kind] = export_block(module, types, " ".join(map(str, kind)))
        return self.pieces[kind]

    def _weights(self, stitch: Stitcher, prefix: str) -> Callable[[str, fx.Node], fx.Node]:
        """Maps a parameter of a piece onto the program's weight of that name."""

        def weight(name: str, node: fx.Node) -> fx.Node:
            local = name.removeprefix("block.")
            if "inv_freq_" in local:
                dim = int(local.rpartition("_")[2])
                values = tuple(float(f) for f in self.config.inv_freq(dim))
                return stitch.constant(f"inv_freq_{dim}", values)
            full = local if local.startswith("lm_head") else prefix + local
            spec, shape = self._parameters[full.removeprefix("model.")], node.meta["type"].shape
            if spec.type.shape != shape:
                raise StageError(f"the model's {full!r} is {list(shape)}, not {spec.type}")
            return stitch.program.weight(spec)

        return weight
