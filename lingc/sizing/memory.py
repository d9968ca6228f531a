"""What an engine holds: state, latent cache, workspace and, on a CPU, the form of its weights.

State and cache are exact: they are the plan's state tensors. Workspace is an estimate from the
shapes of the values between ops and of what an op's own maths holds; no kernel was measured for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from lingc.model.config import ModelConfig
from lingc.plan import DTYPE_BYTES, TensorType, WeightSpec
from lingc.quantize.formats import FP8_BLOCK
from lingc.sizing.weights import Specs
from lingc.targets.spec import Target

PAGE_SIZE = 64
"""Tokens a page of the latent cache, unless the build asks for another number."""

MAX_DRAFT = 3
"""Drafts that a verify step takes beside the pending token, unless the build asks for more."""

PREFILL_TOKENS = 512
"""Most tokens of a prefill step, as the generation loop cuts prompts."""

WIDEN_LIMIT_BYTES = 1 << 30
"""Up to this many bytes in FP32, a CPU engine widens its weights once, while loading."""

_SHARD_AXIS: Mapping[str, int] = {"linear_state": 1, "pending_k": 2, "pending_v": 2}


def state_types(
    config: ModelConfig, activation: str, *, max_draft: int, has_mtp: bool
) -> dict[str, TensorType]:
    """The plan's state tensors; S and R hold a scratch row each."""
    heads, dim = config.num_attention_heads, config.head_dim
    states: dict[str, TensorType] = {}
    for layer in config.linear_layers:
        states[f"linear_state.{layer}"] = TensorType("f32", ("S", heads, dim, dim))
        pending = TensorType(activation, ("S", max_draft + 1, heads, dim))
        states[f"pending_k.{layer}"] = states[f"pending_v.{layer}"] = pending
    for layer in config.mla_layers + ((config.mtp_layer,) if has_mtp else ()):
        states[f"latent_cache.{layer}"] = TensorType(activation, ("R", config.latent_dim))
    return states


def state_bytes(states: Mapping[str, TensorType], role: str, rows: int, ranks: int) -> int:
    """Bytes on one rank of the state tensors of one role (`linear_state`, ...), scratch included.

    Heads are split over the ranks; the latent cache is whole on each.
    """
    found = [kind for name, kind in states.items() if name.partition(".")[0] == role]
    total = sum(kind.bytes({"S": rows, "R": rows}) for kind in found)
    return total // ranks if role in _SHARD_AXIS else total


# --------------------------------------------------------------------------------------- workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of a phase.

    Attributes:
        tokens: Of all sequences together.
        sequences: Sequences among them.
        context: Cached positions of each.
        logits: Rows of logits.
        is_absorbed: Whether MLA works on the cache itself, as all phases but prefill.
    """

    tokens: int
    sequences: int
    context: int
    logits: int
    is_absorbed: bool = True


GROUPED_FROM = 64
"""Tokens beyond which rows are laid out by expert."""


def workspace_bytes(config: ModelConfig, target: Target, step: Step, ranks: int) -> int:
    """Bytes that one step needs at its widest point, beside weights and state: an estimate.

    The values that live between ops there, and what the ops hold inside: the experts' inner
    activations, and of MLA the queries and partial results in FP32. On a CPU, whose ops are made of
    several ONNX nodes, also the gathered cache rows and the scores.
    """
    return max(_live(config, target, step, ranks).values())


def _live(config: ModelConfig, target: Target, step: Step, ranks: int) -> dict[str, int]:
    """Place in a step -> bytes that live there."""
    act = DTYPE_BYTES[target.activations]
    tokens, hidden = step.tokens, config.hidden_size
    heads = config.num_attention_heads // ranks
    width = heads * config.head_dim
    values = heads * config.v_head_dim
    queries = heads * config.qk_head_dim
    rank = config.q_lora_rank or 0
    # Prefill's mixer is three ops, with q, k and o between them; else they stay inside one.
    linear = (4 + (1 if step.is_absorbed else 3)) * width
    latent = 2 * queries + max(rank, values)
    dense = 3 * config.intermediate_size // ranks
    shared = 3 * config.num_shared_experts * config.moe_shared_expert_intermediate_size // ranks
    routed = 2 * hidden + 3 * config.num_experts_per_tok * config.moe_intermediate_size // ranks
    if target.default_engine == "cuda":
        routed = 2 * hidden + _routed(config, ranks) // act
    layers = {
        "linear attention": linear,
        "MLA": latent,
        "dense MLP": dense,
        "shared expert": hidden + shared,
        "routed experts": routed,
        "MTP input": 2 * hidden,
    }
    live = {name: act * tokens * (hidden + width) for name, width in layers.items()}
    live["MLA"] += _attention(config, target, step, heads)
    if target.default_engine == "cuda":
        # Rows of each expert begin at a multiple of 16, and copies read ahead.
        hit = min(config.num_experts, tokens * config.num_experts_per_tok)
        live["routed experts"] += (15 * hit + 256) * 2 * hidden if tokens > GROUPED_FROM else 0
    live["LM head"] = act * tokens * hidden + 4 * step.logits * -(-config.vocab_size // ranks)
    return live


def _routed(config: ModelConfig, ranks: int) -> int:
    """Bytes of a token between the two halves of its experts, and inside the second.

    The inner activations, once more in the order of experts, and each expert's result in BF16.
    """
    inner = 2 * config.moe_intermediate_size // ranks
    count = config.num_experts_per_tok + config.num_shared_experts
    return count * (2 * inner + 2 * config.hidden_size)


def _attention(config: ModelConfig, target: Target, step: Step, heads: int) -> int:
    """Bytes that latent attention holds inside, in FP32."""
    row, rank = config.latent_dim, config.kv_lora_rank
    inside = step.tokens * heads * (row + rank) if step.is_absorbed else 0
    if target.default_engine == "onnx":
        # Scores, masked scores and shares are three nodes' results.
        positions = step.sequences * step.context
        inside += positions * row + step.tokens * step.context * (3 * heads + 1)
        if not step.is_absorbed:
            inside += positions * heads * (config.qk_head_dim + 2 * config.v_head_dim)
    return 4 * inside


# ----------------------------------------------------------------------------------- CPU's weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an engine holds one weight.

    Attributes:
        mapped: Bytes that stay in the file and are mapped; the system may drop and reread them.
        anonymous: Bytes of its own: of device memory, or widened copies.
    """

    mapped: int = 0
    anonymous: int = 0

    @property
    def total(self) -> int:
        return self.mapped + self.anonymous


def widening(specs: Specs, widen: str) -> str:
    """`load` or `step`; `auto` is `load` where all weights are small enough in FP32."""
    if widen != "auto":
        return widen
    wide = sum(4 * elements(spec) for spec in specs.values())
    return "load" if wide <= WIDEN_LIMIT_BYTES else "step"


def elements(spec: WeightSpec) -> int:
    """How many numbers are stored; eight INT4 values are one."""
    return spec.type.bytes() // DTYPE_BYTES[spec.type.dtype]


def cpu_form(spec: WeightSpec, specs: Specs, *, is_widened: bool) -> Form:
    """How an ONNX engine holds a weight.

    Views of the file stay there: INT4 codes, the embedding (its rows are widened as they are
    fetched), what is FP32 already, and BF16 matrices that every step widens anew. Vectors and INT4
    scales are always widened, FP8 codes to FP32 with their scales worked in, or to FP16, which
    holds every E4M3 value, with the scales spread over rows.

    Args:
        spec: The weight.
        specs: All weights, for the other part of a quantized matrix.
        is_widened: Whether matrices are widened while loading.
    """
    count, stored = elements(spec), spec.type.bytes()
    if spec.format == "fp8_block":
        return _fp8_form(spec, specs, is_widened=is_widened)
    is_scale = spec.format == "int4_group" and spec.part == "scales"
    small = len(spec.type.shape) == 1 or is_scale
    if spec.type.dtype == "bf16" and spec.name != "word_embeddings.weight":
        return Form(anonymous=4 * count) if small or is_widened else Form(mapped=stored)
    return Form(mapped=stored)


def _fp8_form(spec: WeightSpec, specs: Specs, *, is_widened: bool) -> Form:
    if spec.part == "codes":
        return Form(anonymous=(4 if is_widened else 2) * elements(spec))
    if is_widened:
        return Form()
    codes = specs[spec.name.removesuffix("_scale") + "_codes"]
    *rows, width = codes.type.bind({})
    blocks = -(-width // FP8_BLOCK)
    return Form(anonymous=TensorType("f32", (*rows, blocks)).bytes())


def widened_in_step(config: ModelConfig, specs: Specs, step: Step) -> int:
    """Bytes of the largest FP32 copies that one step of a CPU engine makes and drops.

    Of experts in BF16 or FP8, a step of few tokens fetches those of each token, prefill takes them
    all; INT4 is multiplied as it is.
    """
    largest = 0
    for spec in specs.values():
        packed = spec.type.dtype not in ("bf16", "f8e4m3") or spec.part == "scales"
        if packed or len(spec.type.shape) == 1 or spec.name == "word_embeddings.weight":
            continue
        count = elements(spec)
        if spec.experts:
            fetched = step.tokens * config.num_experts_per_tok
            count = count // spec.experts * (fetched if step.is_absorbed else spec.experts)
        largest = max(largest, 4 * count)
    return largest
