"""An interpreted plan says what eager says, however its tokens are cut into steps."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingc.compare import assert_close
from lingc.errors import StageError
from lingc.interpret import InterpreterBackend, stored_tensor
from lingc.plan import Step, TensorType
from tests.driver import (
    LIMITS,
    Array,
    Held,
    Padding,
    Share,
    backend,
    backend_float64,
    eager,
    step,
)
from tests.evaluate import one_thread
from tests.programs import CHANGES, EVERYDAY, SIZES, compiled, config

EVERY_MODEL = [
    pytest.param(model, marks=[] if model in EVERYDAY else pytest.mark.long) for model in CHANGES
]
MOST_STEPS = 14


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with torch.inference_mode(), one_thread():
        yield


def draw_sequences(data: st.DataObject, vocab: int) -> list[Held]:
    """One to three sequences, anywhere in the state, over page borders or not."""
    lengths = data.draw(st.lists(st.integers(1, 18), min_size=1, max_size=3), label="lengths")
    slots = data.draw(st.permutations(range(LIMITS.slots)), label="slots")
    pages = data.draw(st.permutations(range(LIMITS.pages)), label="pages")
    seed = data.draw(st.integers(0, 999), label="tokens")
    random = np.random.default_rng(seed)
    return [
        Held(
            tokens=random.integers(0, vocab, length).tolist(),
            slot=slots[i],
            # Room for drafts that are rejected behind the last token.
            pages=pages[8 * i : 8 * i + -(-(length + SIZES.max_draft) // SIZES.page_size)],
        )
        for i, length in enumerate(lengths)
    ]


def draw_step(data: st.DataObject, held: Sequence[Held]) -> tuple[str, list[Share], list[int]]:
    """A phase, what each sequence brings to it, and how much of that counts."""
    phase = data.draw(st.sampled_from(["prefill", "decode", "verify"]), label="phase")
    # A prompt goes on only where nothing is pending.
    able = [h for h in held if h.left and not (phase == "prefill" and h.pending)]
    if not able:
        phase, able = "decode", [h for h in held if h.left]
    chosen = data.draw(st.permutations(able), label="order")
    chosen = chosen[: data.draw(st.integers(1, len(able)), label="members")]
    width = data.draw(st.integers(1, SIZES.max_draft + 1), label="width")
    batch: list[Share] = []
    counts = []
    for h in chosen:
        if phase == "prefill":
            counts.append(data.draw(st.integers(1, h.left), label="tokens"))
            batch.append((h, h.tokens[h.done : h.done + counts[-1]]))
        elif phase == "decode":
            counts.append(1)
            batch.append((h, h.tokens[h.done : h.done + 1]))
        else:
            counts.append(data.draw(st.integers(0, min(width, h.left)), label="accepted"))
            right = h.tokens[h.done : h.done + counts[-1]]
            batch.append((h, [*right, *[7] * (width - len(right))]))
    if data.draw(st.booleans(), label="padding"):
        at = data.draw(st.integers(0, len(batch)), label="at")
        batch.insert(at, (Padding(), [3] * len(batch[0][1])))
        counts.insert(at, 0)
    return phase, batch, counts


def drive(data: st.DataObject, run: InterpreterBackend, want: Array, held: Sequence[Held]) -> float:
    """Run random steps; the largest difference of a logit that counts.

    Args:
        want: Logits of every token of every sequence, one after the other, in one pass.
    """
    starts = dict(zip(map(id, held), np.cumsum([0, *(len(h.tokens) for h in held)]), strict=False))
    worst = 0.0
    for _ in range(MOST_STEPS):
        if not any(h.left for h in held):
            break
        phase, batch, counts = draw_step(data, held)
        for (h, _), count, (logits, _) in zip(batch, counts, step(run, phase, batch), strict=True):
            assert np.isfinite(logits).all()
            if not isinstance(h, Held):
                continue
            at = starts[id(h)] + h.done
            worst = max(worst, float(np.abs(logits[:count] - want[at : at + count]).max(initial=0)))
            h.done += count
            h.pending = count if phase == "verify" else 0
    return worst


def in_one_pass(model: str, held: Sequence[Held], dtype: torch.dtype) -> Array:
    rows = [eager(model, dtype=dtype)(torch.tensor([h.tokens]))[0] for h in held]
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("model", EVERY_MODEL)
@settings(max_examples=20)
@given(data=st.data())
def test_steps_of_any_kind_agree_with_one_pass_of_eager(model: str, data: st.DataObject) -> None:
    held = draw_sequences(data, config(model).vocab_size)

    want, exact = (in_one_pass(model, held, dtype) for dtype in (torch.float32, torch.float64))

    worst = drive(data, backend(model), want, held)

    # A group norm over one channel is nearly a sign: there eager itself is off by more in f32.
    assert worst < max(1e-4, 4 * float(np.abs(want - exact).max()))


@pytest.mark.parametrize("target", ["cpu", "h20"])
@pytest.mark.parametrize("model", EVERY_MODEL)
@settings(max_examples=20)
@given(data=st.data())
def test_steps_of_any_kind_agree_with_each_other_in_float64(
    model: str, target: str, data: st.DataObject
) -> None:
    held = draw_sequences(data, config(model).vocab_size)
    run = backend_float64(model, target=target)
    one_by_one = [step(run, "prefill", [(h, h.tokens)])[0][0] for h in held]

    worst = drive(data, run, np.concatenate(one_by_one), held)

    assert worst < 1e-9


def in_pieces(run: InterpreterBackend, tokens: list[int], **hidden: Array) -> list[Array]:
    """Logits and hidden states of 13 tokens in steps of every kind, or as drafts."""
    held, made = Held(tokens=tokens, slot=2, pages=[3, 1, 8, 5]), []
    phases = ["draft"] if hidden else ["prefill", "decode", "verify", "verify", "decode"]
    for phase, count in zip(phases * 5, [6, 1, 3, 2, 1], strict=False):
        span = slice(held.done, held.done + count)
        extra = {name: value[span] for name, value in hidden.items()}
        made += step(run, phase, [(held, tokens[span])], **extra)
        held.done, held.pending = held.done + count, count if phase == "verify" else 0
    return [np.concatenate(one) for one in zip(*made, strict=True)]


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        *((model, "bf16") for model in EVERYDAY),
        *(("whole-blocks", precision) for precision in ("bf16", "int4", "int4-all")),
    ],
)
def test_a_plan_for_a_gpu_is_that_for_a_cpu_in_float64(model: str, precision: str) -> None:
    tokens = np.random.default_rng(5).integers(0, config(model).vocab_size, 13).tolist()
    gpu, cpu = (backend_float64(model, precision, target) for target in ("h20", "cpu"))

    got, want = (in_pieces(run, tokens) for run in (gpu, cpu))

    assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-9
    if config(model).has_mtp:
        got, want = (in_pieces(run, tokens, hidden=want[1]) for run in (gpu, cpu))
        assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-9


def test_weights_of_a_gpu_plan_lie_in_layouts_of_their_own() -> None:
    plan = backend_float64("whole-blocks", "int4-all", "h20").plan

    layouts = {spec.layout for spec in plan.weights.values()}

    assert layouts == {"plain", "tiled", "tiled_gated", "tiled_scales", "tiled_gated_scales"}


@pytest.mark.parametrize("model", [m for m in EVERYDAY if config(m).has_mtp])
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, 11), max_size=3))
def test_drafts_in_any_pieces_agree_with_eager(model: str, cuts: set[int]) -> None:
    tokens = np.random.default_rng(1).integers(0, config(model).vocab_size, 13).tolist()
    hidden = eager(model).forward_hidden(torch.tensor([tokens[:-1]]))
    logits, after = eager(model).mtp(torch.tensor([tokens[1:]]), hidden)
    run, held = backend(model), Held(tokens=tokens[1:], slot=0, pages=[5, 2, 9])

    got = []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
        share = held.tokens[start:end]
        got += step(run, "draft", [(held, share)], hidden=hidden[0, start:end].numpy())
        held.done = end

    for made, want in ((0, logits[0]), (1, after[0])):
        joined = torch.from_numpy(np.concatenate([one[made] for one in got]))
        assert_close(joined, want, dtype="f32", mechanism="lightning")


@pytest.mark.parametrize(
    "precision", ["fp8", "int4", pytest.param("int4-all", marks=pytest.mark.long)]
)
@pytest.mark.parametrize("model", ["tiny", pytest.param("odd", marks=pytest.mark.long)])
def test_quantized_weights_mean_what_eager_reads_of_them(model: str, precision: str) -> None:
    tokens = np.random.default_rng(2).integers(0, config(model).vocab_size, 11).tolist()
    want = eager(model, precision)(torch.tensor([tokens]))[0]
    held = Held(tokens=tokens, slot=1, pages=[3, 1, 7])

    ((prompt, _),) = step(backend(model, precision), "prefill", [(held, tokens)])

    assert_close(torch.from_numpy(prompt), want, dtype="f32", mechanism="lightning")


def test_a_plan_for_a_gpu_runs_by_its_references() -> None:
    tokens = np.random.default_rng(3).integers(0, config("tiny").vocab_size, 9).tolist()
    want = eager("tiny")(torch.tensor([tokens]))[0].numpy()
    run, held = backend("tiny", "bf16", "h20"), Held(tokens=tokens, slot=0, pages=[0, 1, 2])

    ((first, hidden),) = step(run, "prefill", [(held, tokens[:-1])])
    held.done = 8
    ((last, _),) = step(run, "decode", [(held, tokens[-1:])])

    got = np.concatenate([first, last])
    assert {one.dtype for one in (got, hidden)} == {np.dtype(np.float32)}
    error = 1 - 2 * (got * want).sum() / (got**2 + want**2).sum()
    assert error < 0.02  # a row of this batch routes elsewhere in bf16


@pytest.mark.parametrize("target", ["cpu", "h20"])
def test_a_rejected_draft_leaves_no_trace(target: str) -> None:
    tokens = np.random.default_rng(4).integers(0, config("tiny").vocab_size, 10).tolist()
    straight, detour = (backend_float64("tiny", target=target) for _ in range(2))

    def finish(run: InterpreterBackend, held: Held) -> tuple[Array, Array]:
        ((logits, _),) = step(run, "decode", [(held, [tokens[6]])])
        return logits, run.state("linear_state.0")[2]

    one = Held(tokens=tokens, slot=2, pages=[4, 5, 6])
    step(straight, "prefill", [(one, tokens[:6])])
    one.done = 6
    other = Held(tokens=tokens, slot=2, pages=[4, 5, 6])
    step(detour, "prefill", [(other, tokens[:5])])
    other.done = 5
    step(detour, "verify", [(other, [tokens[5], 1, 2, 3])])
    other.done, other.pending = 6, 1

    for got, want in zip(finish(detour, other), finish(straight, one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_padding_writes_nothing_that_is_read() -> None:
    run = backend("tiny")
    held = Held(tokens=[1, 2, 3, 4], slot=1, pages=[2, 3])
    step(run, "prefill", [(held, held.tokens)])
    before = {name: run.state(name)[:-1] for name in run.plan.states}

    step(run, "decode", [(Padding(), [5])])
    step(run, "verify", [(Padding(), [5, 6])])
    step(run, "prefill", [(Padding(), [5, 6, 7])])

    for name, value in before.items():
        np.testing.assert_array_equal(run.state(name)[:-1], value)


@pytest.mark.parametrize("target", ["cpu", "h20"])
def test_a_slot_can_be_put_back_and_moved(target: str) -> None:
    run = backend("tiny", "bf16", target)
    held = Held(tokens=[1, 2, 3, 4, 5], slot=1, pages=[2, 3])
    step(run, "prefill", [(held, held.tokens[:3])])
    held.done = 3
    saved = run.save_slot(1)
    ((first, _),) = step(run, "decode", [(held, [4])])

    run.load_slot(3, saved)
    held.slot = 3
    ((again, _),) = step(run, "decode", [(held, [4])])

    np.testing.assert_array_equal(again, first)


def test_what_it_gives_is_the_callers_own() -> None:
    run = backend("tiny")
    held = Held(tokens=[1, 2, 3], slot=0, pages=[0])
    step(run, "prefill", [(held, held.tokens)])

    state = run.state("linear_state.0")
    state[:] = np.nan

    assert np.isfinite(run.state("linear_state.0")).all()


def test_shows_every_step_with_its_results() -> None:
    run, seen = backend("tiny"), list[tuple[Step, tuple[torch.Tensor, ...]]]()
    run.watch = lambda made, results: seen.append((made, results))
    held = Held(tokens=[1, 2, 3], slot=0, pages=[0])

    step(run, "prefill", [(held, held.tokens)])

    program = run.plan.programs["prefill"]
    assert [made for made, _ in seen] == [*program.steps]
    dims = {"T": 3, "B": 1, "S": LIMITS.slots + 1, "R": LIMITS.pages * SIZES.page_size + 1, "N": 3}
    for made, results in seen:
        kinds = [program.types[name] for name in made.outputs]
        assert [tuple(r.shape) for r in results] == [kind.bind(dims) for kind in kinds]


def test_refuses_a_phase_that_the_plan_lacks() -> None:
    with pytest.raises(StageError, match="the plan has no 'draft' program"):
        backend("odd").run("draft", {})


def test_names_the_step_that_fails_and_its_line() -> None:
    run = backend("tiny")
    held = Held(tokens=[1, 2, 3], slot=0, pages=[0])
    run.weights["layers.0.attention.dense.weight"] = torch.zeros(3, 3)

    with pytest.raises(StageError, match=r"step 'layers\.0\.linear\.1' \(lingc\.linear, linear_"):
        step(run, "prefill", [(held, held.tokens)])


def test_closing_lets_go_of_weights_and_state() -> None:
    run = backend("tiny")

    run.close()

    assert not run.weights
    assert not run.states
    assert compiled("tiny").weights


@pytest.mark.parametrize(
    ("array", "dtype", "values"),
    [
        (np.array([0x3F80, 0xC000], np.uint16), "bf16", [1.0, -2.0]),
        (np.array([0x38, 0xB8], np.uint8), "f8e4m3", [1.0, -1.0]),
        (np.array([1.5, 2.5], np.float32), "f32", [1.5, 2.5]),
        (np.array([7, -7], np.int32), "i32", [7, -7]),
    ],
)
def test_a_stored_weight_is_read_in_its_element_type(
    array: Array, dtype: str, values: list[float]
) -> None:
    tensor = stored_tensor(array, TensorType(dtype, (2,)))

    assert tensor.float().tolist() == values
