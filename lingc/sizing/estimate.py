"""Memory, traffic and what fits, for one model, recipe and target."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from lingc.errors import UsageError
from lingc.model.config import ModelConfig
from lingc.plan import DTYPE_BYTES, WeightSpec
from lingc.quantize.recipes import Recipe
from lingc.sizing import memory, weights
from lingc.sizing.memory import MAX_DRAFT, PAGE_SIZE, PREFILL_TOKENS, Form, Step
from lingc.targets.spec import Target

MARGIN = 0.05
"""Share of the memory that stays free in what is called fitting: for what nobody has measured here,
a driver's context, code and fragmentation."""

LARGEST_BATCH = 1 << 20
LARGEST_CONTEXT = 1 << 24

PREPACKED_LIMIT_BYTES = 256 << 20
"""Up to this many bytes of weights, each phase of a CPU engine may hold a copy in its own order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the rank with most.

    Attributes:
        weights: Of all phases.
        state: Linear state and pending tokens of every slot, and of the scratch slot.
        cache: Pages of the latent cache, and the scratch row.
        workspace: An estimate, see `lingc.sizing.memory`.
        mapped: Those bytes of `weights` that stay in the file.
    """

    weights: int
    state: int
    cache: int
    workspace: int
    mapped: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.state + self.cache + self.workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that one step moves at the least, on the rank with most.

    Attributes:
        weights: Read once, of the routed experts those that are hit.
        state: Linear state read and written.
        cache: Rows of the latent cache read.
        experts: Expected number of distinct experts a layer, where routing is uniform and
            independent; real routing hits fewer.
    """

    weights: float
    state: float
    cache: float
    experts: float

    @property
    def total(self) -> float:
        return self.weights + self.state + self.cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Sizing:
    """What one model needs; what follows from the fields is computed once and kept.

    Attributes:
        has_mtp: Whether the engine drafts.
        ranks: Of tensor parallelism: linear layers by heads, feed-forward by width, vocabulary by
            rows. The latent cache, routers, norms and low-rank MLA projections are on every rank.
        widen: `load`, `step` or `auto`, on a CPU.
        memory_bytes: What it must fit; the target's where None.

    Raises:
        UsageError: The heads cannot be split over the ranks, the target has no ranks, or there is
            no MTP layer.
        RecipeError: The recipe does not fit the model.
    """

    config: ModelConfig
    recipe: Recipe
    target: Target
    has_mtp: bool
    max_draft: int = MAX_DRAFT
    page_size: int = PAGE_SIZE
    ranks: int = 1
    widen: str = "auto"
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.has_mtp and not self.config.has_mtp:
            raise UsageError(
                "the model has no MTP layer (num_nextn_predict_layers is 0)",
                hint="leave --mtp out",
            )
        heads = self.config.num_attention_heads
        if self.ranks < 1 or heads % self.ranks:
            raise UsageError(
                f"tp {self.ranks} does not divide the {heads} attention heads",
                hint="heads are split whole: give a divisor",
            )
        if self.ranks > 1 and self.target.default_engine == "onnx":
            raise UsageError(
                f"tp {self.ranks} is for several GPUs; an engine for {self.target.name!r} is one"
                " process",
                hint="leave --tp out, or plan for a GPU target: `lingc targets`",
            )
        assert self.phases, "a model has phases"  # what is wrong with the recipe comes out now

    # --------------------------------------------------------------------------------- weights

    @cached_property
    def phases(self) -> dict[str, dict[str, WeightSpec]]:
        """What each phase of the plan reads."""
        return weights.plan_weights(self.config, self.recipe, self.target, has_mtp=self.has_mtp)

    @cached_property
    def specs(self) -> dict[str, WeightSpec]:
        """Every weight, as in the plan."""
        return weights.merged(self.phases)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed weights, over all ranks: the engine's files."""
        return sum(spec.type.bytes() for spec in self.specs.values())

    @property
    def widening(self) -> str | None:
        """When a CPU engine widens weights; None on other targets."""
        if self.target.default_engine != "onnx":
            return None
        return memory.widening(self.specs, self.widen)

    @cached_property
    def forms(self) -> dict[str, Form]:
        """How one rank holds each weight."""
        if self.widening is None:
            return {
                name: Form(anonymous=weights.share_bytes(spec, self.ranks))
                for name, spec in self.specs.items()
            }
        is_widened = self.widening == "load"
        return {
            name: memory.cpu_form(spec, self.specs, is_widened=is_widened)
            for name, spec in self.specs.items()
        }

    @property
    def is_uneven(self) -> bool:
        """Whether some weight cannot be cut into equal shares."""
        cuts = (spec for spec in self.specs.values() if spec.shard_axis is not None)
        return any(
            weights.share_bytes(spec, self.ranks) * self.ranks != spec.type.bytes() for spec in cuts
        )

    @property
    def splits_groups(self) -> bool:
        """Whether a group of the norm after linear attention lies on several ranks."""
        return self.config.group_norm_size % self.ranks != 0

    def part_bytes(self) -> dict[str, tuple[int, float]]:
        """Part of the model -> bytes held on a rank, bytes read by a token at batch 1."""
        sums = dict.fromkeys(weights.PARTS, (0, 0.0))
        decode = self._reads("decode", 1)
        for name, form in self.forms.items():
            for part, held, read in self._by_part(name, form.total, decode.get(name, 0.0)):
                sums[part] = sums[part][0] + held, sums[part][1] + read
        return {part: found for part, found in sums.items() if found[0]}

    def _by_part(self, name: str, held: int, read: float) -> list[tuple[str, int, float]]:
        """A weight's bytes: of one part, or of routed experts and the shared one behind them."""
        part, spec = weights.part_of(self.config, name), self.specs[name]
        if part != "routed experts" or not spec.last:
            return [(part, held, read)]
        last = held // len(spec.members())
        of_last = float(last if read else 0)
        return [(part, held - last, read - of_last), ("shared experts", last, of_last)]

    # ---------------------------------------------------------------------------------- memory

    def memory(self, batch: int, context: int) -> Memory:
        """Memory for so many sequences of so many tokens each."""
        config, ranks = self.config, self.ranks
        states = memory.state_types(
            config, self.target.activations, max_draft=self.max_draft, has_mtp=self.has_mtp
        )
        slots = batch + 1
        rows = batch * -(-context // self.page_size) * self.page_size + 1
        roles = ("linear_state", "pending_k", "pending_v")
        return Memory(
            weights=sum(form.total for form in self.forms.values()),
            state=sum(memory.state_bytes(states, role, slots, ranks) for role in roles),
            cache=memory.state_bytes(states, "latent_cache", rows, ranks),
            workspace=self._workspace(batch, context),
            mapped=sum(form.mapped for form in self.forms.values()),
        )

    def _workspace(self, batch: int, context: int) -> int:
        """The widest step's; all phases' on a CPU, where each session keeps what it had."""
        queries = 1 + (self.max_draft if self.has_mtp else 0)
        chunk = min(PREFILL_TOKENS, batch * context)
        wanted = min(batch, chunk)
        first = Step(tokens=chunk, sequences=1, context=context, logits=wanted, is_absorbed=False)
        next_ = Step(
            tokens=batch * queries, sequences=batch, context=context, logits=batch * queries
        )
        steps = [first, next_]
        if self.has_mtp:  # the prompt goes through the MTP layer too
            steps.append(replace(first, is_absorbed=True))
        found = [self._step_workspace(step) for step in steps]
        return max(found) if self.widening is None else sum(found)

    def _step_workspace(self, step: Step) -> int:
        live = memory.workspace_bytes(self.config, self.target, step, self.ranks)
        if self.widening is None:
            return live
        if self.widening == "step":
            return live + memory.widened_in_step(self.config, self.specs, step)
        held = sum(form.total for form in self.forms.values())
        return live + (held if held <= PREPACKED_LIMIT_BYTES else 0)

    # --------------------------------------------------------------------------------- traffic

    def _reads(self, phase: str, tokens: int) -> dict[str, float]:
        """Weight -> bytes of it that a step of so many tokens reads."""
        config = self.config
        hit = distinct_experts(config, tokens) / config.num_experts
        row = config.hidden_size * DTYPE_BYTES["bf16"]
        reads: dict[str, float] = {}
        for name, spec in self.phases[phase].items():
            if name == "word_embeddings.weight":
                reads[name] = tokens * row / self.ranks
            else:
                count = len(spec.members())
                read = spec.experts * hit + (count - spec.experts) if spec.experts else 1.0
                reads[name] = self.forms[name].total * read / count
        return reads

    def traffic(self, batch: int, context: int, *, queries: int = 1) -> Traffic:
        """What a decode step moves, or a verify step of `queries` tokens a sequence."""
        config = self.config
        size = DTYPE_BYTES[self.target.activations]
        heads, dim = config.num_attention_heads, config.head_dim
        slot = len(config.linear_layers) * heads * dim * dim * DTYPE_BYTES["f32"] // self.ranks
        row = len(config.mla_layers) * config.latent_dim * size
        return Traffic(
            weights=sum(self._reads("decode", batch * queries).values()),
            state=2 * batch * slot,
            cache=batch * context * row,
            experts=distinct_experts(config, batch * queries),
        )

    def draft_bytes(self, batch: int, context: int) -> float:
        """What one pass of the MTP layer moves, one token a sequence."""
        row = self.config.latent_dim * DTYPE_BYTES[self.target.activations]
        return sum(self._reads("draft", batch).values()) + batch * context * row

    def round_bytes(self, batch: int, context: int, drafts: int) -> float:
        """What a speculative round moves: so many drafts, then their verification."""
        verify = self.traffic(batch, context, queries=drafts + 1).total
        return drafts * self.draft_bytes(batch, context) + verify

    def tokens_per_s(self, batch: int, context: int) -> float | None:
        """Most tokens a second that the target's bandwidth allows, over all sequences.

        None where the bandwidth is not known. Nothing else is counted: no launch, no all-reduce.
        """
        rate = self.target.hbm_bytes_per_s
        return None if rate is None else batch * rate / self.traffic(batch, context).total

    # --------------------------------------------------------------------------------- what fits

    @property
    def budget(self) -> int | None:
        """Bytes of memory on a device, or None where they are not known."""
        return self.target.memory_bytes if self.memory_bytes is None else self.memory_bytes

    def verdict(self, needed: Memory) -> str | None:
        """`fits`, `tight` where less than the margin is left, or `no`; None where nobody knows."""
        if self.budget is None:
            return None
        if needed.total > self.budget:
            return "no"
        return "fits" if self._fits(needed) else "tight"

    def _fits(self, needed: Memory) -> bool:
        assert self.budget is not None
        return needed.total <= (1 - MARGIN) * self.budget

    def largest_batch(self, context: int) -> int | None:
        """Most sequences of so many tokens that fit; 0 where none does, None where nobody knows."""
        if self.budget is None:
            return None
        return _largest(lambda batch: self._fits(self.memory(batch, context)), LARGEST_BATCH)

    def largest_context(self, batch: int) -> int | None:
        """Most tokens a sequence that fit, so many sequences at once."""
        if self.budget is None:
            return None
        return _largest(lambda context: self._fits(self.memory(batch, context)), LARGEST_CONTEXT)


def distinct_experts(config: ModelConfig, tokens: int) -> float:
    """Experts of a layer that so many tokens hit, under uniform and independent routing.

    E (1 - (1 - k/E)^tokens)
    """
    experts = config.num_experts
    return float(experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens))


def own_precision(config: ModelConfig) -> str:
    """The recipe whose layout a checkpoint with this config has already."""
    method = str((config.quantization or {}).get("quant_method"))
    return {"fp8": "fp8", "compressed-tensors": "int4"}.get(method, "bf16")


def _largest(does_fit: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, by halving; 0 if 1 does not."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does_fit(middle) else (low, middle)
    return low
