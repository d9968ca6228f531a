"""What a phase is given: its inputs and state tensors, with named axes."""

from dataclasses import dataclass

from lingc.model.config import ModelConfig
from lingc.plan import TensorType
from lingc.sizing import MAX_DRAFT, PAGE_SIZE, memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the state tensors that are fixed when the engine is built."""

    page_size: int = PAGE_SIZE
    max_draft: int = MAX_DRAFT


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
    return memory.state_types(config, "f32", max_draft=sizes.max_draft, has_mtp=config.has_mtp)


def phase_states(config: ModelConfig, phase: str, sizes: Sizes) -> dict[str, TensorType]:
    """The states that a phase reads or writes."""
    pending = phase in ("decode", "verify")
    chosen = {}
    for name, kind in state_types(config, sizes).items():
        role, _, layer = name.partition(".")
        draft = int(layer) == config.mtp_layer
        if draft == (phase == "draft") and (pending or not role.startswith("pending")):
            chosen[name] = kind
    return chosen
