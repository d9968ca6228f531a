"""Capture: each phase of any legal model as a flat program with named axes and explicit state."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import lingc.model
from lingc.capture import Capturer, Sizes, input_types, state_types
from lingc.capture.export import export_block
from lingc.checkpoint import expected_tensors
from lingc.compare import assert_close
from lingc.errors import StageError
from lingc.graph import text
from lingc.model.config import ModelConfig
from lingc.model.loading import from_source
from lingc.plan import TensorType
from tests.evaluate import evaluate, given, synthetic
from tests.programs import EVERYDAY, SIZES, captured, config, names, phases

MODELS = [*EVERYDAY]


@pytest.mark.parametrize("phase", ["prefill", "decode", "verify", "draft"])
def test_takes_the_inputs_and_states_of_the_phase(phase: str) -> None:
    program = captured("tiny", phase)

    inputs = {node.meta["name"]: node.meta["type"] for node in program.placeholders("input")}
    states = {node.meta["name"]: node.meta["type"] for node in program.placeholders("state")}

    assert inputs == input_types(config("tiny"), phase)
    assert states.items() <= state_types(config("tiny"), SIZES).items()
    assert {name.partition(".")[0] for name in states} == {
        "prefill": {"linear_state", "latent_cache"},
        "decode": {"linear_state", "pending_k", "pending_v", "latent_cache"},
        "verify": {"linear_state", "pending_k", "pending_v", "latent_cache"},
        "draft": {"latent_cache"},
    }[phase]


@pytest.mark.parametrize(
    ("phase", "updates"),
    [
        ("prefill", ["linear_state.0", "linear_state.1", "linear_state.2", "latent_cache.3"]),
        ("decode", ["linear_state.0", "linear_state.1", "linear_state.2", "latent_cache.3"]),
        ("draft", ["latent_cache.4"]),
    ],
)
def test_gives_logits_hidden_and_every_state_that_changes(phase: str, updates: list[str]) -> None:
    program = captured("tiny", phase)

    rows = "B" if phase == "decode" else "N"
    tokens = "B" if phase == "decode" else "T"
    logits, hidden, *states = (node.meta["type"] for node in program.results())

    assert program.outputs == ("logits", "hidden")
    assert list(program.updates) == updates
    assert (str(logits), str(hidden)) == (f"f32[{rows}, 96]", f"f32[{tokens}, 64]")
    assert states == [state_types(config("tiny"), SIZES)[name] for name in updates]


def test_a_verify_step_leaves_its_tokens_pending() -> None:
    changed = {name.partition(".")[0] for name in captured("tiny", "verify").updates}

    assert changed == {"linear_state", "pending_k", "pending_v", "latent_cache"}


@pytest.mark.parametrize("model", MODELS)
def test_reads_every_tensor_of_the_checkpoint_in_its_shape(model: str) -> None:
    expected = expected_tensors(config(model))
    specs = {
        node.meta["weight"]
        for phase in phases(model)
        if phase in ("prefill", "draft")
        for node in captured(model, phase).placeholders("weight")
    }

    read = {
        source.replace("{e}", str(e)): spec.type.shape[1:] if spec.experts else spec.type.shape
        for spec in specs
        for source in spec.sources
        for e in range(max(spec.experts, 1))
    }

    assert read == expected
    assert {spec.layer for spec in specs if spec.format == "decay"} == {
        *config(model).linear_layers
    }


@pytest.mark.parametrize("model", MODELS)
def test_agrees_with_eager_on_a_prompt(model: str) -> None:
    program = captured(model, "prefill")
    tokens = given(model, "prefill")["token_ids"][:5]

    with torch.inference_mode():
        module = from_source(synthetic(model, "bf16"))
        hidden = module.forward_hidden(tokens.unsqueeze(0))[0]
        logits = module.logits(hidden)

    got = evaluate(program, model)
    assert_close(got["hidden"][:5], hidden, dtype="f32", mechanism="lightning")
    assert_close(got["logits"][0], logits[1], dtype="f32", mechanism="lightning")


def test_every_value_knows_its_type_its_layer_and_its_line() -> None:
    program = captured("tiny", "prefill")

    layers = {node.meta["layer"] for node in program.calls()}
    sources = {node.meta["source"] for node in program.calls()}

    assert layers == {-1, 0, 1, 2, 3}
    assert all(node.meta["type"] is not None for node in program.calls())
    # Sizes of axes come from no line.
    assert {name.partition(":")[0] for name in sources} == {
        "", "blocks.py", "linear_attention.py", "mla.py", "moe.py", "norm.py", "rope.py",
    }  # fmt: skip


def test_a_line_is_that_of_the_model() -> None:
    program = captured("tiny", "prefill")
    folder = Path(inspect.getfile(lingc.model)).parent

    sort = next(node for node in program.calls() if node.target is torch.ops.aten.sort.stable)

    name, _, line = sort.meta["source"].partition(":")
    assert "sort" in (folder / name).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_holds_no_device_and_changes_nothing_in_place() -> None:
    program = captured("tiny", "verify")

    assert all("device" not in node.kwargs for node in program.calls())
    assert not [
        node
        for node in program.calls()
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def test_exports_each_kind_of_block_once_however_many_layers_there_are() -> None:
    deep = ModelConfig.from_dict({**config("tiny").raw, "num_hidden_layers": 40})
    capturer = Capturer(deep, SIZES)

    program = capturer.capture("prefill")

    assert len(capturer.pieces) == 5  # entry, exit, dense and expert lightning, latent
    assert names(program).count("lingc.lightning_prefill") == 30


def test_a_phase_with_the_same_inputs_takes_the_block_of_another() -> None:
    capturer = Capturer(config("no-linear-layers"), SIZES)
    capturer.capture("prefill")
    before = set(capturer.pieces)

    capturer.capture("verify")

    assert {kind[0] for kind in set(capturer.pieces) - before} == {"exit"}


def test_the_same_model_gives_the_same_program() -> None:
    again = Capturer(config("no-linear-layers"), SIZES).capture("decode")

    assert list(text(captured("no-linear-layers", "decode"))) == list(text(again))


def test_page_and_draft_sizes_are_those_of_the_build() -> None:
    states = state_types(config("tiny"), Sizes(page_size=16, max_draft=1))

    assert str(states["pending_k.0"]) == "f32[S, 2, 4, 16]"
    assert str(states["latent_cache.3"]) == "f32[R, 20]"


@pytest.mark.parametrize(("model", "phase"), [("tiny", "train"), ("odd", "draft")])
def test_refuses_a_phase_that_the_model_lacks(model: str, phase: str) -> None:
    with pytest.raises(StageError, match=f"the model has no phase '{phase}'"):
        Capturer(config(model), SIZES).capture(phase)


def test_says_which_block_cannot_be_exported() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x if x.sum() > 0 else -x,)

    with pytest.raises(StageError, match="block 'odd one' cannot be captured"):
        export_block(Odd(), (TensorType("f32", ("T", 4)),), "odd one")


def test_refuses_a_block_with_a_tensor_of_its_own() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x + torch.tensor([1.0, 2.0]),)

    with pytest.raises(StageError, match=r"block .odd one. lifts .* as constant_tensor"):
        export_block(Odd(), (TensorType("f32", ("T", 2)),), "odd one")


def test_names_what_an_axis_is_computed_from() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.cat((x, x)),)

    piece = export_block(Twice(), (TensorType("f32", ("T", 2)),), "twice")

    (cat,) = (node for node in piece.graph.nodes if node.op == "call_function")
    assert isinstance(cat, fx.Node)
    assert str(cat.meta["type"]) == "f32[2*T, 2]"


def test_a_program_reads_as_text() -> None:
    lines = list(text(captured("tiny", "draft")))

    assert lines[0] == "input    token_ids: i32[T]"
    assert "state    latent_cache_4: f32[R, 20]" in lines
    assert "constant inv_freq_4: f32[2]" in lines
    (sigmoid,) = (line for line in lines if "= aten.sigmoid.default(" in line)
    assert re.fullmatch(
        r"sigmoid: f32\[T, 16\] = aten\.sigmoid\.default\(linear_\d+\)  # 4 moe\.py:\d+", sigmoid
    )
    assert lines[-1].startswith("output   latent_cache.4: index_put")
