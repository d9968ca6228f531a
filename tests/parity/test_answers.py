"""Five questions, answered by what was found and by nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from lingc.parity import plots
from lingc.parity.answers import Answer, answers
from lingc.parity.budget import load_budget
from lingc.parity.layers import Inside, LayerError, StateError
from lingc.parity.run import Result
from lingc.parity.side import Scores
from lingc.parity.stored import StoredAs, folded
from lingc.parity.usage import listed, silent
from tests.parity.test_page import outline, result


def with_summary(given: Result, **changes: object) -> Result:
    """A result whose first mode found something else."""
    first, *rest = given.modes
    summary = replace(first.summary, **changes)  # type: ignore[arg-type]
    return replace(given, modes=(replace(first, summary=summary), *rest))


def texts(given: Result) -> list[str]:
    return [" ".join(answer.lines) for answer in answers(given)]


def answer(given: Result, place: int) -> Answer:
    return answers(given)[place]


def test_it_passes_or_says_what_is_over() -> None:
    good, bad = answer(result(), 0), answer(result(bump=30), 0)
    modes = tuple(replace(mode, checks=mode.checks[:1]) for mode in result().modes)
    reported = answer(replace(result(), budget=load_budget("quantized"), modes=modes), 0)

    assert (good.is_good, bad.is_good, reported.is_good) == (True, False, None)
    assert good.lines[0].startswith("Yes: within budget 'engine-vs-eager'")
    assert bad.lines[0].startswith("No: over budget 'engine-vs-eager'; prefill: mean_kl is")
    assert "mean KL 0; the likeliest next token is the same for 100.00% of them" in good.lines[1]


def test_the_layer_that_adds_most_is_named_and_not_only_the_last() -> None:
    layers = tuple(
        LayerError(layer=layer, mean=mean, max=3 * mean)
        for layer, mean in enumerate((0.001, 0.002, 0.05, 0.051))
    )
    states = (StateError(layer=1, position=64, rows=2, mean=0.01, max=0.03),)

    text = texts(with_summary(result(bump=9.0), layers=layers, states=states, mean_kl=5.0))[1]

    assert "grows most in layer 2, from 0.002 to 0.05 of the residual stream" in text
    assert "largest behind layer 3: 0.051 on average" in text
    assert "that of layer 1 after 64 tokens: 0.03" in text
    assert "line 2 at position 33" in text


def test_equal_sides_have_their_error_nowhere() -> None:
    assert texts(result())[1].startswith("Nowhere")


def test_a_dead_expert_is_named() -> None:
    usage = {1: (3, 4, 5), 2: (9, 0, 3)}

    found = answer(with_summary(result(), usage=usage), 2)

    assert found.is_good is False
    assert found.lines[0].startswith("1 of 6 experts got none of the 45 tokens")
    assert found.lines[1] == "Layer 2: 1."
    assert "--data MORE.jsonl" in " ".join(answer(with_summary(result(), usage=usage), 4).commands)


def test_experts_are_silent_where_they_got_nothing() -> None:
    assert silent({0: (1, 2), 3: (0, 0, 1, 0)}) == {3: (0, 1, 3)}
    assert listed((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"


def test_what_is_not_quantized_is_listed_with_its_share() -> None:
    stored = (
        StoredAs(format="int4_group(32)", is_quantized=True, matrices=9, elements=750,
                 modules=("layers.*.mlp.experts.*.up_proj",)),
        StoredAs(format="bf16", is_quantized=False, matrices=2, elements=250,
                 modules=("lm_head", "layers.*.attention.dense")),
    )  # fmt: skip
    given = result()
    given = replace(given, other=replace(given.other, stored=stored))

    text = texts(given)[3]

    assert "25.0% of the elements are not, the rest is int4_group(32)" in text
    assert "In bf16: lm_head, layers.*.attention.dense." in text


def test_what_to_do_next_depends_on_what_was_found() -> None:
    wrong = answer(result(bump=30), 4)
    lost = answer(replace(result(bump=30), weights="checkpoint",
                          budget=replace(load_budget("quantized"), mean_kl=1e-9)), 4)  # fmt: skip

    assert "lingc parity  tiny.ling --bisect" in wrong.commands
    assert any(command.startswith("lingc calibrate") for command in lost.commands)
    assert all("--weights checkpoint" in c for c in lost.commands if "parity" in c)


def test_names_are_folded_over_layers_and_experts() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(3) for e in range(4)]

    assert folded([*names, "lm_head.weight"]) == ["layers.*.mlp.experts.*.up_proj", "lm_head"]


def test_errors_inside_are_shares_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    stream = rng.standard_normal((6, 8)).astype(np.float32)
    state = rng.standard_normal((2, 4, 4)).astype(np.float32)
    nothing = np.zeros((6, 3), np.float32)
    spoilt = stream.copy()
    spoilt[4] *= 1.25
    found = Inside()

    found.add(
        Scores(logits=nothing, experts={}, layers={0: stream, 1: stream}, states={(2, 64): state}),
        Scores(logits=nothing, experts={}, layers={1: spoilt}, states={(2, 64): 0.5 * state}),
    )

    (layer,), (held,) = found.layers, found.states
    assert layer.layer == 1
    assert layer.max == pytest.approx(0.25, rel=1e-6)
    assert layer.mean == pytest.approx(0.25 / 6, rel=1e-6)
    assert (held.layer, held.position) == (2, 64)
    assert held.max == pytest.approx(0.5)


def test_plots_of_what_is_inside_are_whole() -> None:
    for made in (
        plots.by_layer([0, 1, 2], [0.0, 1e-3, float("inf")], [0.0, 1e-2, float("inf")]),
        plots.growth([16, 64, 16384], [1e-6, 1e-5, 1e-3], [1e-6, 1e-4, 1e-2]),
        plots.heat({1: (0, 5, 9), 2: (1, 1, 1)}, label="layer by expert"),
        plots.counts([1.0, 1.0, 4.0]),
    ):
        assert outline(made).tags >= {"svg", "text"}
        assert "nan" not in made
        assert "inf" not in made
    assert plots.heat({1: (0, 5, 9)}, label="x").count('class="none"') == 1
