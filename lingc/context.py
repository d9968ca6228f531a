"""What a pass may know: the model's config, the phase, the target and the recipe.

Expected counts follow from here. `Context` counts the parts of one phase, so that a pass says
"once a linear layer" and not a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lingc.model.config import ModelConfig
from lingc.plan import WeightSpec
from lingc.quantize.formats import FP8_BLOCK
from lingc.quantize.recipes import Format, Recipe
from lingc.targets.spec import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one run of the pipeline over one phase may know."""

    config: ModelConfig
    phase: str
    target: Target
    recipe: Recipe

    @property
    def layers(self) -> tuple[int, ...]:
        """Absolute indices of the layers in this phase."""
        if self.phase == "draft":
            return (self.config.mtp_layer,)
        return tuple(range(self.config.num_hidden_layers))

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers with lightning attention."""
        return tuple(layer for layer in self.layers if not self.config.is_mla(layer))

    @property
    def mla_layers(self) -> tuple[int, ...]:
        """Layers with latent attention."""
        return tuple(layer for layer in self.layers if self.config.is_mla(layer))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with routed experts."""
        return tuple(layer for layer in self.layers if not self.config.is_dense(layer))

    @property
    def shared_layers(self) -> tuple[int, ...]:
        """Layers with a shared expert beside the routed ones."""
        return self.moe_layers if self.config.num_shared_experts else ()

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Layers with a plain SwiGLU: a dense one, or a shared expert."""
        return tuple(x for x in self.layers if self.config.is_dense(x)) + self.shared_layers

    @property
    def shared_width(self) -> int:
        """Feed-forward width of the shared expert."""
        return self.config.moe_shared_expert_intermediate_size * self.config.num_shared_experts

    @property
    def dynamic_fp8(self) -> bool:
        """Whether activations are quantized on the fly where weights are FP8."""
        return self.target.fp8_activations and self.recipe.activations == "fp8"

    def format_of(self, spec: WeightSpec) -> Format:
        """Storage format that the recipe asks for a weight, whose sources agree."""
        return self.recipe.format_of(module_of(spec.sources[0]))

    def storage_refusal(self, *specs: WeightSpec) -> str | None:
        """Why weights cannot be stored as one, or None: the recipe's formats differ."""
        found: dict[Format, str] = {}
        for spec in specs:
            found = {**_formats(self.recipe, spec.sources, spec.experts), **found}
        if len(found) < 2:
            return None
        listed = ", ".join(f"{module} as {stored}" for stored, module in found.items())
        return f"the recipe {self.recipe.name!r} stores {listed}"

    def plain_refusal(self, spec: WeightSpec) -> str | None:
        """Why a weight that no op reads in any format but its own cannot be stored, or None."""
        stored, module = self.format_of(spec), module_of(spec.sources[0])
        if stored.kind == "plain":
            return None
        return f"the recipe {self.recipe.name!r} stores {module} as {stored}, not plain"

    def is_fp8(self, module: str) -> bool:
        """Whether the recipe stores a module in FP8 blocks."""
        return self.recipe.format_of(module).kind == "fp8_block"

    def join_refusal(self, first: str, second: str, rows: int) -> str | None:
        """Why two matrices cannot be stored one below the other, or None.

        Args:
            first: Module whose rows come first.
            second: Module whose rows follow.
            rows: Rows of the first.
        """
        formats = {m: self.recipe.format_of(m) for m in (first, second)}
        if formats[first] != formats[second]:
            listed = ", ".join(f"{m} as {f}" for m, f in formats.items())
            return f"the recipe {self.recipe.name!r} stores {listed}"
        if formats[first].kind == "fp8_block" and rows % FP8_BLOCK:
            return (
                f"{first} has {rows} rows, not a multiple of {FP8_BLOCK}: its last FP8 block"
                " would be shared with the next matrix"
            )
        return None

    def pairs(self) -> tuple[tuple[str, str, int], ...]:
        """Projections of one input in this phase: two modules, and the rows of the first."""
        config = self.config
        found: list[tuple[str, str, int]] = []
        for layer in self.layers:
            attention, mlp = f"model.layers.{layer}.attention", f"model.layers.{layer}.mlp"
            if not config.is_mla(layer):
                rows = 3 * config.num_attention_heads * config.head_dim
                found.append((f"{attention}.query_key_value", f"{attention}.g_proj", rows))
            elif config.q_lora_rank is not None:
                latent = f"{attention}.kv_a_proj_with_mqa"
                found.append((f"{attention}.q_a_proj", latent, config.q_lora_rank))
            if config.is_dense(layer):
                rows = config.intermediate_size
                found.append((f"{mlp}.gate_proj", f"{mlp}.up_proj", rows))
            elif layer in self.shared_layers:
                shared = f"{mlp}.shared_experts"
                found.append((f"{shared}.gate_proj", f"{shared}.up_proj", self.shared_width))
        return tuple(found)

    @property
    def merged_pairs(self) -> int:
        """How many of `pairs` are stored as one matrix."""
        return sum(self.join_refusal(*pair) is None for pair in self.pairs())


@cache
def _formats(recipe: Recipe, sources: tuple[str, ...], experts: int) -> Mapping[Format, str]:
    """Every format that a recipe asks for among sources, with the first module of each."""
    found: dict[Format, str] = {}
    for source in sources:
        for expert in range(max(experts, 1)):
            module = module_of(source, expert)
            found.setdefault(recipe.format_of(module), module)
    return found


def module_of(source: str, expert: int = 0) -> str:
    """`model.layers.3.attention.dense` of `model.layers.3.attention.dense.weight`."""
    return source.removesuffix(".weight").replace("{e}", str(expert))
