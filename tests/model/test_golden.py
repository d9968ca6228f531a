"""The model against outputs of the published modelling code, in FP32.

Bounds are three times the largest difference that the golden folders' READMEs state between two
independent implementations of the architecture.
"""

import json
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lingc.model import LingModel

if TYPE_CHECKING:
    from tests.model.conftest import Golden

LOGITS = {"tiny": 3 * 3.8e-5, "odd": 3 * 8.4e-6}
HIDDEN = 3 * 2.1e-5
ROUTER_WEIGHTS = 3 * 2.2e-6
ROUTER_LOGITS = 3 * 3.8e-5  # not stated; a sum over D as the logits are
STATE = 3 * 1.8e-4

BOTH = pytest.mark.parametrize("name", ["tiny", "odd"])


@pytest.fixture
def golden(request: pytest.FixtureRequest, name: str) -> "Golden":
    found: Golden = request.getfixturevalue(name)
    return found


def largest(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return (got - want).abs().max().item()


@BOTH
def test_logits_of_every_prompt_agree(golden: "Golden", name: str) -> None:
    wanted = golden.tensors("logits")

    found = {
        prompt: largest(golden.model(ids)[0, -len(wanted[prompt]) :], wanted[prompt])
        for prompt, ids in golden.prompts.items()
    }

    assert max(found.values()) <= LOGITS[name], found


@BOTH
def test_greedy_continuations_are_the_same_tokens(golden: "Golden") -> None:
    for prompt, wanted in golden.greedy().items():
        # One pass suffices: if each row's choice is the next golden token, so is greedy decoding's.
        ids = torch.cat((golden.prompts[prompt], torch.tensor([wanted[:-1]])), dim=1)

        assert golden.model(ids)[0, -len(wanted) :].argmax(-1).tolist() == wanted, prompt


@pytest.mark.parametrize(("name", "prompt"), [("odd", "b2-1"), ("tiny", "p04")])
def test_cached_decoding_continues_with_the_same_tokens(golden: "Golden", prompt: str) -> None:
    wanted = golden.greedy()[prompt]

    assert greedy(golden.model, golden.prompts[prompt], len(wanted)) == wanted


@pytest.mark.long
@BOTH
def test_cached_decoding_continues_every_prompt_with_the_same_tokens(golden: "Golden") -> None:
    for prompt, wanted in golden.greedy().items():
        assert greedy(golden.model, golden.prompts[prompt], len(wanted)) == wanted, prompt


def greedy(model: LingModel, prompt: Tensor, count: int) -> list[int]:
    state = model.new_state(1)
    hidden = model.forward_hidden(prompt, state)
    tokens: list[int] = []
    while True:
        tokens.append(int(model.logits(hidden[:, -1]).argmax()))
        if len(tokens) == count:
            return tokens
        hidden = model.forward_hidden(torch.tensor([tokens[-1:]]), state)


@BOTH
def test_hidden_states_of_every_layer_agree(golden: "Golden") -> None:
    for key, wanted in golden.tensors("hidden").items():
        prompt, _, place = key.partition(".")
        taps: dict[str, Tensor] = {}
        golden.model(golden.prompts[prompt], taps=taps)
        tap = place.replace("layer", "layers.").replace("_input", ".input")

        assert largest(taps[tap][0], wanted) <= HIDDEN, key


@BOTH
def test_router_chooses_the_same_experts_in_the_same_order(golden: "Golden") -> None:
    wanted = golden.tensors("router")
    for key in wanted:
        prompt, layer, part = key.split(".")
        if part != "ids":
            continue
        taps: dict[str, Tensor] = {}
        golden.model(golden.prompts[prompt], taps=taps)
        found = {part: taps[f"layers.{layer[5:]}.router.{part}"][0] for part in PARTS}

        assert torch.equal(found["ids"], wanted[key].long()), key
        stem = f"{prompt}.{layer}"
        assert largest(found["weights"], wanted[f"{stem}.weights"]) <= ROUTER_WEIGHTS, key
        assert largest(found["logits"], wanted[f"{stem}.logits"]) <= ROUTER_LOGITS, key


PARTS = ("ids", "weights", "logits")


@BOTH
def test_states_after_a_prompt_agree(golden: "Golden") -> None:
    wanted = golden.tensors("state")
    prompt = next(iter(wanted)).partition(".")[0]
    state = golden.model.new_state(1)
    golden.model(golden.prompts[prompt], state)

    for key, tensor in wanted.items():
        _, place, part = key.split(".")
        layer = int(place.removeprefix("layer"))
        if part == "S":
            assert largest(state.linear[layer][0], tensor) <= STATE, key
        else:
            keys, values = expanded(golden.model, layer, state.cache[layer][0])
            assert largest(keys if part == "key" else values, tensor) <= HIDDEN, key


def expanded(model: LingModel, layer: int, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [H, n, nope + rope] and values [H, n, V] as the published code keeps them."""
    config = model.config
    rank, rope, heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    attention = model.model.layers[layer].get_submodule("attention.kv_b_proj")
    kv = attention(cache[:, :rank]).view(len(cache), heads, -1).transpose(0, 1)
    k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
    # It moves even entries before odd ones and then rotates halves.
    k_rope = torch.cat((cache[:, rank::2], cache[:, rank + 1 :: 2]), dim=-1)
    return torch.cat((k_nope, k_rope.expand(heads, -1, rope)), dim=-1), v


def window_nll(model: LingModel, window: Tensor) -> float:
    logits = model(window)[0, :-1].double()
    return cross_entropy(logits, window[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("index", [0, 40, -1])
def test_loss_of_a_window_of_the_evaluation_text_agrees(
    tiny: "Golden", eval_windows: list[Tensor], index: int
) -> None:
    metrics = json.loads((tiny.folder / "metrics.json").read_text(encoding="utf-8"))
    wanted = metrics["eval_window_nll_bf16_weights"][index]

    found = window_nll(tiny.model, eval_windows[index])

    assert found == pytest.approx(wanted, abs=2e-3)


@pytest.mark.long
def test_perplexity_of_the_evaluation_text_is_equal_to_four_digits(
    tiny: "Golden", eval_windows: list[Tensor]
) -> None:
    predicted = sum(window.shape[1] - 1 for window in eval_windows)

    loss = math.fsum(window_nll(tiny.model, window) for window in eval_windows) / predicted

    assert predicted == 90199
    assert round(math.exp(loss), 3) == 7.499
