"""Model and phase to a captured program, without weights.

Each distinct kind of block is exported once a phase with `torch.export` on the meta device, and the
blocks are stitched to one flat graph: 32 layers cost as much to capture as the three kinds of block
they are made of. What cannot be said in functional ATen is one of the structural ops, lightning
attention and expert dispatch; state is explicit, an input and a result.

Capture is in f32 whatever the target: the element type of the activations is a property of the
target and is set by `lingc.stages.retype`, where every op says what it rounds.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.export import Dim

from lingc.errors import StageError
from lingc.graph import Captured, Program
from lingc.model import linear_attention, mla, moe, rope
from lingc.model import norm as model_norm
from lingc.model.block import Block
from lingc.model.config import ModelConfig
from lingc.model.moe import MoE
from lingc.model.mtp import MTP
from lingc.model.norm import RMSNorm
from lingc.op import DTYPE_NAME
from lingc.plan import PHASES, TensorType, WeightSpec
from lingc.plugins import expert_dispatch, lightning_decode, lightning_prefill, lightning_verify

aten = torch.ops.aten

STRUCTURAL = (
    expert_dispatch.OP, lightning_decode.OP, lightning_prefill.OP, lightning_verify.OP,
)  # fmt: skip
"""The ops that a captured program holds beside functional ATen."""

PAGE_SIZE = 64
"""Tokens a page of the latent cache."""

MAX_DRAFT = 3
"""Drafts that a verify step takes beside the pending token, unless the build asks for more."""

PLACEMENT = ("device", "pin_memory", "layout")

# Example sizes: distinct, and neither 0 nor 1, which torch.export would specialise.
EXAMPLE = {"T": 14, "B": 7, "S": 9, "R": 11, "P": 5, "N": 3}
MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the state tensors that are fixed when the engine is built."""

    page_size: int = PAGE_SIZE
    max_draft: int = MAX_DRAFT


# ------------------------------------------------------------------------- the pieces of a program


class Rope(nn.Module):
    """Cosines and sines of one rotary dimension, scaled (YaRN)."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        frequencies = torch.empty(dim // 2, dtype=torch.float32, device="meta")
        self.register_buffer(f"inv_freq_{dim}", frequencies)
        self.name = f"inv_freq_{dim}"
        self.scale = config.rope_attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions.to(torch.float32).unsqueeze(-1) * getattr(self, self.name)
        return angle.cos() * self.scale, angle.sin() * self.scale


class Entry(nn.Module):
    """Embedding and rotary tables: `x`, then cos and sin for each distinct rotary dimension."""

    def __init__(self, config: ModelConfig, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ropes = nn.ModuleList(Rope(config, dim) for dim in dims)

    def forward(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        tables = [table for rope in self.ropes for table in rope(positions)]
        return F.embedding(token_ids, self.word_embeddings.weight), *tables


def ffn(mlp: nn.Module, n: Tensor) -> Tensor:
    """The feed-forward half of a block; experts as the structural op."""
    if not isinstance(mlp, MoE):
        out: Tensor = mlp(n)
        return out
    ids, weights = mlp.gate(n)
    experts = mlp.experts
    routed: Tensor = expert_dispatch.OP.overload(
        n, ids, weights, experts.gate_proj, experts.up_proj, experts.down_proj
    )
    return routed if mlp.shared_experts is None else routed + mlp.shared_experts(n)


class LinearLayer(nn.Module):
    """A block with lightning attention, in one phase."""

    def __init__(self, block: Block, phase: str) -> None:
        super().__init__()
        self.block = block
        self.phase = phase

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        block = self.block
        n = block.input_layernorm(x)
        q, k, v = block.attention.project(n, cos, sin)
        o, *after = self._attend(q, k, v, meta, states)
        x = x + block.attention.finish(o, n)
        x = x + ffn(block.mlp, block.post_attention_layernorm(x))
        return x, *after

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        decay = self.block.attention.decay
        slots, offsets, positions = meta["slots"], meta["offsets"], meta["positions"]
        result: tuple[Tensor, ...]
        if self.phase == "prefill":
            result = lightning_prefill.OP.overload(q, k, v, decay, states[0], slots, offsets, positions)
        elif self.phase == "decode":
            accepted = meta["accepted"]
            result = lightning_decode.OP.overload(q, k, v, decay, *states, slots, accepted, positions)
        else:
            accepted = meta["accepted"]
            result = lightning_verify.OP.overload(
                q, k, v, decay, *states, slots, accepted, offsets, positions
            )
        return result


class LatentLayer(nn.Module):
    """A block with MLA over the paged latent cache; the same in every phase."""

    def __init__(self, block: Block, config: ModelConfig, page_size: int) -> None:
        super().__init__()
        self.block = block
        self.config = config
        self.page_size = page_size

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, meta: dict[str, Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        block = self.block
        q, latent = block.attention.latent(block.input_layernorm(x), cos, sin)
        cache = torch.index_put(states[0], (meta["cache_rows"],), latent)
        o = self._attend(q, cache, meta)
        x = x + block.attention.finish(o)
        x = x + ffn(block.mlp, block.post_attention_layernorm(x))
        return x, cache

    def _attend(self, q: Tensor, cache: Tensor, meta: dict[str, Tensor]) -> Tensor:
        """Causal attention of packed tokens, each over the pages of its own sequence."""
        c = self.config
        heads, nope, value = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
        pages, offsets, positions = meta["page_table"], meta["offsets"], meta["positions"]
        batch, tokens = pages.shape[0], positions.shape[0]
        rows = (pages.unsqueeze(-1) * self.page_size + torch.arange(self.page_size)).flatten(1)
        context = cache[rows]  # [B, C, c + r]
        latent, key_rope = context.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = self.block.attention.kv_b_proj(latent).unflatten(-1, (heads, nope + value))
        key_nope, v = kv.split([nope, value], dim=-1)
        shared = key_rope.unsqueeze(2).expand(-1, -1, heads, -1)
        k = torch.cat((key_nope, shared), dim=-1)
        sequence = (torch.arange(tokens).unsqueeze(1) >= offsets[1:]).sum(1)
        mine = sequence.unsqueeze(1) == torch.arange(batch)  # [T, B]
        past = torch.arange(rows.shape[1]) <= positions.unsqueeze(1)  # [T, C]
        mask = (mine.unsqueeze(2) & past.unsqueeze(1)).flatten(1)  # [T, B * C]
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            k.flatten(0, 1).transpose(0, 1).unsqueeze(0),
            v.flatten(0, 1).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=c.mla_scale,
        )
        return out.squeeze(0).transpose(0, 1).flatten(1)


class Exit(nn.Module):
    """Final norm and head: logits of the wanted rows, hidden state of all."""

    def __init__(self, config: ModelConfig, *, every_row: bool, norm: str) -> None:
        super().__init__()
        self.norm_name = norm
        self.add_module(norm, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.every_row = every_row

    def forward(self, x: Tensor, logit_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = getattr(self, self.norm_name)(x)
        wanted = hidden if self.every_row else torch.index_select(hidden, 0, logit_rows)
        return self.lm_head(wanted), hidden


class DraftEntry(nn.Module):
    """The MTP layer's input: the next token's embedding and the hidden state, merged."""

    def __init__(self, config: ModelConfig, mtp: MTP) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.eh_proj = mtp.enorm, mtp.hnorm, mtp.eh_proj

    def forward(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)),)


# ------------------------------------------------------------------------------------- the inputs


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def input_types(config: ModelConfig, phase: str) -> dict[str, TensorType]:
    """What the caller of a phase gives, in order."""
    tokens = "B" if phase == "decode" else "T"
    given = {"token_ids": TensorType("i32", (tokens,))}
    if phase == "draft":
        given["hidden"] = TensorType("f32", (tokens, config.hidden_size))
    given["positions"] = TensorType("i32", (tokens,))
    given["offsets"] = TensorType("i32", ("B+1",))
    if phase != "draft":
        given["slots"] = TensorType("i32", ("B",))
    given["cache_rows"] = TensorType("i32", (tokens,))
    given["page_table"] = TensorType("i32", ("B", "P"))
    if phase in ("decode", "verify"):
        given["accepted"] = TensorType("i32", ("B",))
    else:
        given["logit_rows"] = TensorType("i32", ("N",))
    return given


def state_types(config: ModelConfig, sizes: Sizes) -> dict[str, TensorType]:
    """Every state tensor of the model; S and R hold a scratch row each, at the end."""
    heads, dim = config.num_attention_heads, config.head_dim
    states = {}
    for layer in config.linear_layers:
        states[f"linear_state.{layer}"] = TensorType("f32", ("S", heads, dim, dim))
        pending = TensorType("f32", ("S", sizes.max_draft + 1, heads, dim))
        states[f"pending_k.{layer}"] = pending
        states[f"pending_v.{layer}"] = pending
    for layer in config.mla_layers + ((config.mtp_layer,) if config.has_mtp else ()):
        states[f"latent_cache.{layer}"] = TensorType("f32", ("R", config.latent_dim))
    return states


DIMS: Mapping[str, Any] = {
    "T": Dim("T", min=2, max=MOST_TOKENS),
    "B": Dim("B", min=2, max=1 << 16),
    "S": Dim("S", min=2, max=1 << 16),
    "R": Dim("R", min=2, max=1 << 30),
    "P": Dim("P", min=2, max=1 << 16),
    "N": Dim("N", min=2, max=MOST_TOKENS),
}
DIMS = {**DIMS, "B+1": DIMS["B"] + 1}
TORCH = {"f32": torch.float32, "i32": torch.int32}


def _example(kind: TensorType) -> Tensor:
    sizes = {**EXAMPLE, "B+1": EXAMPLE["B"] + 1}
    return _meta(kind.bind(sizes), TORCH[kind.dtype])


def _dynamic(kind: TensorType) -> dict[int, Any]:
    return {i: DIMS[d] for i, d in enumerate(kind.shape) if isinstance(d, str)}


# ----------------------------------------------------------------------------- exporting one block


def _keep_model_lines() -> None:
    """Have torch record the model's own lines, also those of methods other than `forward`.

    Only for messages: where this torch has no such registration, the line is that of `forward`.
    """
    register = getattr(torch.fx.proxy, "_register_stack_trace_anchor", None)
    if register is None:
        return
    for module in (linear_attention, mla, model_norm, moe, rope):
        for thing in vars(module).values():
            if inspect.isfunction(thing):
                register(thing)
            elif inspect.isclass(thing):
                for method in vars(thing).values():
                    if inspect.isfunction(method):
                        register(method)


_keep_model_lines()


@dataclass(frozen=True, slots=True)
class Piece:
    """An exported block: its graph and what its placeholders are.

    Attributes:
        graph: Functional ATen.
        sources: Placeholder -> `("parameter" | "buffer" | "argument", name or flat index)`.
    """

    graph: fx.Graph
    sources: Mapping[fx.Node, tuple[str, Any]]


def _export(module: nn.Module, args: tuple[Any, ...], types: tuple[Any, ...], what: str) -> Piece:
    """Export one block, with named axes.

    Args:
        args: Example tensors, possibly nested.
        types: The same structure, of `TensorType`.
        what: Name of the block, for messages.
    """
    spec = torch.utils._pytree.tree_map(
        _dynamic, types, is_leaf=lambda value: isinstance(value, TensorType)
    )
    try:
        with torch.device("meta"):
            exported = torch.export.export(module, args, dynamic_shapes=spec, strict=False)
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        raise StageError(f"block {what!r} cannot be captured: {error}") from error
    flat = torch.utils._pytree.tree_leaves(
        types, is_leaf=lambda value: isinstance(value, TensorType)
    )
    sources: dict[fx.Node, tuple[str, Any]] = {}
    names: dict[Any, Any] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    position = 0
    for node, given in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        kind = given.kind.name
        if kind == "USER_INPUT":
            sources[node] = ("argument", position)
            _name_axes(node, flat[position], names)
            position += 1
        elif kind in ("PARAMETER", "BUFFER"):
            sources[node] = (kind.lower(), given.target)
        else:
            raise StageError(f"block {what!r} lifts {given.target!r} as {kind.lower()}")
    for node in exported.graph.nodes:
        if "val" in node.meta:
            node.meta["type"] = _typed(node.meta["val"], names)
        node.meta["source"] = _source(node)
    return Piece(exported.graph, sources)


def _name_axes(node: fx.Node, kind: TensorType, names: dict[Any, Any]) -> None:
    for size, name in zip(node.meta["val"].shape, kind.shape, strict=True):
        if isinstance(name, str) and name != "B+1":
            names[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)


def _typed(value: Any, names: Mapping[Any, Any]) -> Any:
    """The named type of a fake value: a tensor, several, or a size."""
    if isinstance(value, Tensor):
        return TensorType(DTYPE_NAME[value.dtype], tuple(_dim(s, names) for s in value.shape))
    if isinstance(value, list | tuple):
        return tuple(_typed(item, names) for item in value)
    if isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return _dim(value, names)
    return value


def _dim(size: Any, names: Mapping[Any, Any]) -> int | str:
    if isinstance(size, int):
        return size
    return str(size.node.expr.xreplace(names)).replace(" ", "")


def _source(node: fx.Node) -> str:
    """The innermost line of the model or of this file: `mla.py:87`."""
    trace: str = node.meta.get("stack_trace") or ""
    found = [line for line in trace.splitlines() if "/lingc/" in line and "torch/" not in line]
    if not found:
        return ""
    path, line = found[-1].split(", ")[:2]
    return f"{path.rsplit('/', 1)[-1].rstrip(chr(34))}:{line.removeprefix('line ')}"


# -------------------------------------------------------------------------------------- stitching


class Stitcher:
    """Copies pieces into one flat program, layer by layer."""

    def __init__(self, config: ModelConfig, phase: str, sizes: Sizes) -> None:
        self.config = config
        self.program = Program(phase=phase, graph=fx.Graph(), outputs=(), updates=())
        self.inputs: dict[str, fx.Node] = {}
        self.states: dict[str, fx.Node] = {}
        for name, kind in input_types(config, phase).items():
            self.inputs[name] = self.program.placeholder(name, "input", kind)
        for name, kind in _phase_states(config, phase, sizes).items():
            self.states[name] = self.program.placeholder(name, "state", kind)

    def constant(self, name: str, values: tuple[float, ...]) -> fx.Node:
        """A vector known from the config, such as rotary frequencies."""
        for node in self.program.placeholders("constant"):
            if node.meta["name"] == name:
                return node
        node = self.program.placeholder(name, "constant", TensorType("f32", (len(values),)))
        node.meta["values"] = values
        return node

    def add(
        self,
        piece: Piece,
        arguments: tuple[fx.Node, ...],
        weight: Callable[[str, fx.Node], fx.Node],
        layer: int,
    ) -> tuple[fx.Node, ...]:
        """Copy a piece; return the nodes of its results."""
        here: dict[fx.Node, fx.Node] = {}
        for node in piece.graph.nodes:
            if node.op == "placeholder":
                kind, name = piece.sources[node]
                here[node] = arguments[name] if kind == "argument" else weight(name, node)
            elif node.op == "call_function":
                if node.target is aten._assert_tensor_metadata.default:
                    continue
                copy = self.program.graph.node_copy(node, lambda n: here[n])
                # A program belongs to no device.
                copy.kwargs = {k: v for k, v in copy.kwargs.items() if k not in PLACEMENT}
                copy.meta = {
                    "type": node.meta.get("type"),
                    "layer": layer,
                    "source": node.meta["source"],
                }
                here[node] = copy
            else:
                return tuple(here[n] for n in node.args[0])
        raise StageError("a captured block has no output")


def _phase_states(config: ModelConfig, phase: str, sizes: Sizes) -> dict[str, TensorType]:
    """The states that a phase reads or writes."""
    pending = phase in ("decode", "verify")
    chosen = {}
    for name, kind in state_types(config, sizes).items():
        role, _, layer = name.partition(".")
        draft = int(layer) == config.mtp_layer
        if draft == (phase == "draft") and (pending or not role.startswith("pending")):
            chosen[name] = kind
    return chosen


# ------------------------------------------------------------------------------------- the weights

SHARD_AXIS = {
    "query_key_value": 0, "g_proj": 0, "g_norm": 0, "decay": 0, "dense": 1,
    "q_b_proj": 0, "q_proj": 0, "kv_b_proj": 0, "lm_head": 0, "word_embeddings": 0,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1,
}  # fmt: skip
"""Axis that tensor parallelism splits, by module; a matrix not named is whole on every rank."""


def weight_spec(config: ModelConfig, name: str, layer: int, kind: TensorType) -> WeightSpec:
    """The plan's record of one parameter.

    Args:
        name: Full name in the checkpoint, `.weight` included; experts as one stacked parameter.
        kind: Type of the parameter as captured.
    """
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    short = name.removeprefix("model.")
    if module == "decay":
        stored = TensorType("f32", kind.shape)
        return WeightSpec(
            name=short, type=stored, sources=(), format="decay", layer=layer, shard_axis=0
        )
    stored = TensorType("f32" if module == "expert_bias" else "bf16", kind.shape)
    axis = SHARD_AXIS.get(module)
    if ".experts." in name:
        parent, _, leaf = name.rpartition(".experts.")
        source = f"{parent}.experts.{{e}}.{leaf}.weight"
        whole = None if axis is None else axis + 1
        return WeightSpec(
            name=short, type=stored, sources=(source,), experts=config.num_experts, shard_axis=whole
        )
    return WeightSpec(name=short, type=stored, sources=(name,), shard_axis=axis)


# ----------------------------------------------------------------------------------------- capture


class Capturer:
    """Captures phases of one model; every kind of block is exported once a phase."""

    def __init__(self, config: ModelConfig, sizes: Sizes | None = None) -> None:
        self.config = config
        self.sizes = sizes or Sizes()
        self.pieces: dict[tuple[str, ...], Piece] = {}

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
        with torch.device("meta"):
            entry = Entry(config, dims)
        piece = self._piece(("entry", phase), entry, given)
        arguments = (stitch.inputs["token_ids"], stitch.inputs["positions"])
        x, *tables = stitch.add(piece, arguments, self._weights(stitch, "model.", -1), -1)
        ropes = {d: (tables[2 * i], tables[2 * i + 1]) for i, d in enumerate(dims)}
        if phase == "draft":
            prefix = f"model.layers.{config.mtp_layer}."
            with torch.device("meta"):
                draft = DraftEntry(config, MTP(config))
            wide = TensorType("f32", ("T", config.hidden_size))
            piece = self._piece(("draft entry", phase), draft, (wide, wide))
            weights = self._weights(stitch, prefix, config.mtp_layer)
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
        dense = config.is_dense(layer)
        states = {n: s for n, s in stitch.states.items() if n.endswith(f".{layer}")}
        cos, sin = ropes[config.qk_rope_head_dim if latent else config.rotary_dim]
        meta = {n: s for n, s in stitch.inputs.items() if n not in ("token_ids", "logit_rows")}
        meta.pop("hidden", None)
        key = (phase, "mla" if latent else "linear", "dense" if dense else "moe")
        tokens = x.meta["type"].shape[0]
        rope = TensorType("f32", (tokens, cos.meta["type"].shape[1]))
        given = (
            TensorType("f32", (tokens, config.hidden_size)),
            rope,
            rope,
            {n: s.meta["type"] for n, s in meta.items()},
            [s.meta["type"] for s in states.values()],
        )
        if key not in self.pieces:
            with torch.device("meta"):
                block = Block(config, layer)
            module = (
                LatentLayer(block, config, self.sizes.page_size)
                if latent
                else LinearLayer(block, phase)
            )
            self._piece(key, module, given)
        weights = self._weights(stitch, f"model.layers.{layer}.", layer)
        arguments = (x, cos, sin, *meta.values(), *states.values())
        x, *updated = stitch.add(self.pieces[key], arguments, weights, layer)
        after.update(zip(states, updated, strict=False))
        return x

    def _leave(self, stitch: Stitcher, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        config, phase = self.config, stitch.program.phase
        every = phase in ("decode", "verify")
        name = "final_layernorm" if phase == "draft" else "norm"
        with torch.device("meta"):
            head = Exit(config, every_row=every, norm=name)
        tokens = x.meta["type"].shape[0]
        given = [TensorType("f32", (tokens, config.hidden_size))]
        arguments = [x]
        if not every:
            given.append(TensorType("i32", ("N",)))
            arguments.append(stitch.inputs["logit_rows"])
        piece = self._piece(("exit", phase), head, tuple(given))
        layer = config.mtp_layer if phase == "draft" else -1
        prefix = f"model.layers.{layer}." if phase == "draft" else "model."
        weights = self._weights(stitch, prefix, -1)
        logits, hidden = stitch.add(piece, tuple(arguments), weights, -1)
        return logits, hidden

    def _piece(self, key: tuple[str, ...], module: nn.Module, types: tuple[Any, ...]) -> Piece:
        if key not in self.pieces:
            args = torch.utils._pytree.tree_map(
                _example, types, is_leaf=lambda value: isinstance(value, TensorType)
            )
            self.pieces[key] = _export(module, args, types, " ".join(key))
        return self.pieces[key]

    def _weights(
        self, stitch: Stitcher, prefix: str, layer: int
    ) -> Callable[[str, fx.Node], fx.Node]:
        """Maps a parameter of a piece onto the program's weight for this layer."""

        def weight(name: str, node: fx.Node) -> fx.Node:
            local = name.removeprefix("block.")
            if "inv_freq_" in local:
                dim = int(local.rpartition("_")[2])
                values = tuple(float(f) for f in self.config.inv_freq(dim))
                return stitch.constant(f"inv_freq_{dim}", values)
            full = local if local.startswith("lm_head") else prefix + local
            kind = node.meta["type"]
            return stitch.program.weight(weight_spec(self.config, full, layer, kind))

        return weight
