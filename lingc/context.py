"""What a pass may know: the model's config, the phase, the target and the recipe.

Expected counts follow from here. `Context` counts the parts of one phase, so that a pass says
"once a linear layer" and not a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from lingc.model.config import ModelConfig
from lingc.plan import WeightSpec
from lingc.quantize.formats import FP8_BLOCK
from lingc.quantize.recipes import Format, Recipe
from lingc.targets.spec import EngineKind, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One product with a weight matrix, as a phase has it.

    Attributes:
        modules: Whose rows stand in the matrix, in order; a merged pair has two.
        before: What its input comes from: `norm` of the residual stream, `latent` norm of the
            query, `gate` behind linear attention, or `other`.
        is_gated: Whether both halves of a SwiGLU are in it.
        is_added: Whether its result is added to the residual stream.
        shared_layer: The layer whose shared expert it belongs to, else -1.
    """

    modules: tuple[str, ...]
    before: str
    is_gated: bool = False
    is_added: bool = False
    shared_layer: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What one run of the pipeline over one phase may know.

    Attributes:
        recipe: In the formats that such an engine has, whatever recipe it is made with.
        embeds: Whether weights are there when the engine's code is made, so that some of them can
            be constants of it.
    """

    config: ModelConfig
    phase: str
    target: Target
    recipe: Recipe
    engine: EngineKind | None = None
    embeds: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "recipe", self.recipe.in_engines(static=self.takes_static))

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
        """Whether activations are quantized on the fly where weights are FP8 blocks."""
        return self.target.fp8_activations and self.recipe.activations != "plain"

    @property
    def takes_static(self) -> bool:
        """Whether the engine multiplies by static scales where the recipe asks for them.

        TensorRT alone does, and it wants them as constants.
        """
        return self.engine_kind == "tensorrt" and self.target.fp8_activations and self.embeds

    @property
    def engine_kind(self) -> EngineKind:
        """The kind of engine that programs are for: the target's default where none was given."""
        return self.engine or self.target.default_engine

    @property
    def fuses_launches(self) -> bool:
        """Whether programs are made of the ops that our own GPU kernels are launched for."""
        return self.engine_kind == "cuda"

    def format_of(self, spec: WeightSpec) -> Format:
        """Storage format that the recipe asks for a weight, whose sources agree."""
        return self.stored_as(module_of(spec.sources[0]))

    def stored_as(self, module: str) -> Format:
        """Storage format of a module's weight.

        Routed experts with one scale a matrix are blocks that share it: no kernel of theirs reads
        static scales.
        """
        found = self.recipe.format_of(module)
        is_expert = ".mlp.experts." in module
        return Format(kind="fp8_block") if is_expert and found.kind == "fp8_tensor" else found

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
        """Whether a module is stored in FP8 blocks."""
        return self.stored_as(module).kind == "fp8_block"

    def is_static(self, module: str) -> bool:
        """Whether a module's inputs are quantized by a scale that is known."""
        return self.stored_as(module).kind == "fp8_tensor"

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
        if formats[first].kind == "fp8_tensor":
            return f"{first} and {second} have one scale each"
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

    def linears(self) -> tuple[Linear, ...]:
        """Every linear of this phase, the head last."""
        merged = {pair[0]: pair[1] for pair in self.pairs() if self.join_refusal(*pair) is None}
        found: list[Linear] = []
        if self.phase == "draft":
            eh_proj = f"model.layers.{self.config.mtp_layer}.eh_proj"
            found.append(Linear(modules=(eh_proj,), before="other"))
        for layer in self.layers:
            found += self._attention_linears(layer, merged)
            if self.config.is_dense(layer):
                found += _swiglu(f"model.layers.{layer}.mlp", merged, -1)
            elif layer in self.shared_layers:
                found += _swiglu(f"model.layers.{layer}.mlp.shared_experts", merged, layer)
        return (*found, Linear(modules=("lm_head",), before="other"))

    def _attention_linears(self, layer: int, merged: Mapping[str, str]) -> list[Linear]:
        at, config = f"model.layers.{layer}.attention", self.config
        dense = f"{at}.dense"
        if not config.is_mla(layer):
            pair = (f"{at}.query_key_value", f"{at}.g_proj")
            output = Linear(modules=(dense,), before="gate", is_added=True)
            return [*_joined(pair, "norm", merged), output]
        output = Linear(modules=(dense,), before="other", is_added=True)
        latent = f"{at}.kv_a_proj_with_mqa"
        if config.q_lora_rank is None:
            names = (f"{at}.q_proj", latent)
            return [*(Linear(modules=(name,), before="norm") for name in names), output]
        query = Linear(modules=(f"{at}.q_b_proj",), before="latent")
        return [*_joined((f"{at}.q_a_proj", latent), "norm", merged), query, output]

    def is_joined_expert(self, layer: int) -> bool:
        """Whether a layer's shared expert can be stored as one more behind the routed ones."""
        if (
            layer not in self.shared_layers
            or self.shared_width != self.config.moe_intermediate_size
        ):
            return False
        mlp = f"model.layers.{layer}.mlp"
        gate, up, down = (f"{mlp}.shared_experts.{m}_proj" for m in ("gate", "up", "down"))
        modules = (gate, up, down, f"{mlp}.experts.0.gate_proj")
        one_format = len({self.recipe.format_of(module) for module in modules}) == 1
        return one_format and self.join_refusal(gate, up, self.shared_width) is None


def _joined(pair: tuple[str, str], before: str, merged: Mapping[str, str]) -> list[Linear]:
    """The linears of two projections of one input: one, where they are merged."""
    if merged.get(pair[0]) == pair[1]:
        return [Linear(modules=pair, before=before)]
    return [Linear(modules=(module,), before=before) for module in pair]


def _swiglu(mlp: str, merged: Mapping[str, str], shared_layer: int) -> list[Linear]:
    pair = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    inner = _joined(pair, "norm", merged)
    down = Linear(
        modules=(f"{mlp}.down_proj",), before="other", is_added=True, shared_layer=shared_layer
    )
    return [
        *(replace(one, is_gated=len(inner) == 1, shared_layer=shared_layer) for one in inner),
        down,
    ]


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
