"""The backend: every phase equals the interpreter's, state stays in place, errors have names."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
from onnxruntime import InferenceSession, IOBinding

from lingc.errors import IncompatibleError, InputError, LingcError, UsageError
from lingc.interpret import InterpreterBackend
from lingc.runtime import onnx_session
from lingc.runtime.backend import Backend
from lingc.runtime.onnx_backend import OnnxBackend, OnnxModels
from lingc.runtime.onnx_session import PROVIDER
from lingc.targets.onnx import lower
from tests.onnx.engines import LIMITS, Array, Batch, accepted, backend, interpreter, packed, weights
from tests.programs import compiled

VARIANTS = [
    ("tiny", "bf16", "ort", "load"),
    ("tiny", "bf16", "standard", "step"),
    ("odd", "fp8", "ort", "step"),
    ("odd", "fp8", "standard", "load"),
    ("whole-blocks", "int4", "ort", "load"),
    ("whole-blocks", "int4", "standard", "step"),
]
MORE_VARIANTS = [
    (model, precision, library, widen)
    for model in ("odd", "whole-head-rope", "one-head", "groups-of-two", "whole-blocks")
    for precision in ("bf16", "fp8", "int4")
    for library, widen in (("ort", "load"), ("ort", "step"), ("standard", "load"))
]


def steps(batch: Batch) -> Iterator[tuple[str, dict[str, Array]]]:
    """Prompts, tokens, drafts of which some are accepted, and a slot that is taken over."""
    yield "prefill", batch.step("prefill", [(0, 0, 7), (2, 0, 3), (None, 0, 2)])
    yield "decode", batch.step("decode", [(0, 7, 1), (2, 3, 1)], **accepted(0, 0))
    yield "verify", batch.step("verify", [(0, 8, 4), (2, 4, 4)], **accepted(0, 0))
    yield "verify", batch.step("verify", [(0, 10, 3), (2, 8, 3)], **accepted(2, 4))
    spans = [(2, 8, 1), (None, 0, 1), (0, 13, 1)]
    yield "decode", batch.step("decode", spans, **accepted(0, 1, 3))
    yield "prefill", batch.step("prefill", [(1, 0, 5), (0, 14, 2)])
    yield "prefill", batch.step("prefill", [(1, 5, 6)])
    yield "decode", batch.step("decode", [(2, 0, 1)], **accepted(0))
    # Neighbouring slots that go on with nothing to commit: in place, one and several of them.
    yield "decode", batch.step("decode", [(1, 11, 1)], **accepted(0))
    yield "decode", batch.step("decode", [(1, 12, 1), (2, 1, 1)], **accepted(0, 0))
    yield "decode", batch.step("decode", [(0, 16, 1), (1, 13, 1), (2, 2, 1)], **accepted(0, 0, 0))
    yield "decode", batch.step("decode", [(2, 3, 1), (1, 14, 1)], **accepted(0, 0))
    yield "prefill", batch.step("prefill", [(2, 0, 4)])
    if "draft" in batch.plan.programs:
        hidden = batch.random.standard_normal((6, batch.plan.config["hidden_size"]))
        more = {"hidden": hidden.astype(np.float32)}
        yield "draft", batch.step("draft", [(0, 0, 4), (2, 0, 2)], **more)


def assert_same_states(got: Backend, want: Backend) -> None:
    for name in want.plan.states:
        found, expected = got.state(name)[:-1], want.state(name)[:-1]
        largest = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("model", "precision", "library", "widen"),
    [*VARIANTS, *(pytest.param(*v, marks=pytest.mark.long) for v in MORE_VARIANTS)],
)
def test_every_phase_equals_the_interpreter(
    model: str, precision: str, library: str, widen: str
) -> None:
    assert_equal_phases(model, precision, library, widen)


class OnDevice:
    """A session whose provider has memory of its own, where nothing can stay bound."""

    def __init__(self, session: InferenceSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", *self._session.get_providers()]

    def run_with_iobinding(self, _binding: IOBinding) -> None:
        raise AssertionError("it would read what inputs were when they were bound")


def test_a_device_of_its_own_is_given_what_a_step_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    made = onnx_session.make_session
    monkeypatch.setattr(
        "lingc.runtime.onnx_backend.make_session",
        lambda *args, **kwargs: OnDevice(made(*args, **kwargs)),
    )

    assert_equal_phases("tiny", "bf16", "ort", "load")


@pytest.mark.gpu
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="onnxruntime-gpu is not installed",
)
@pytest.mark.parametrize(("model", "precision", "library", "widen"), VARIANTS)
def test_every_phase_equals_the_interpreter_on_a_gpu(
    model: str, precision: str, library: str, widen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROVIDER, "cuda")
    assert_equal_phases(model, precision, library, widen)


def assert_equal_phases(model: str, precision: str, library: str, widen: str) -> None:
    got = backend(model, precision, library=library, widen=widen)
    want: InterpreterBackend = interpreter(model, precision)

    for phase, inputs in steps(Batch(got.plan)):
        found, expected = got.run(phase, inputs), want.run(phase, inputs)

        assert found.keys() == expected.keys()
        for role, values in expected.items():
            np.testing.assert_allclose(
                found[role], values, rtol=1e-3, atol=2e-4, err_msg=f"{role} of {phase}"
            )
        assert_same_states(got, want)


def test_state_stays_where_it_is() -> None:
    runs = backend("tiny")
    states = {name: runs.state(name) for name in runs.plan.states}
    batch = Batch(runs.plan)

    runs.run("prefill", batch.step("prefill", [(1, 0, 5)]))

    assert all(runs.state(name) is array for name, array in states.items())
    state = runs.state("linear_state.0")
    assert state[1].any()
    assert not state[0].any()
    assert not state[2].any()


def test_settled_decoding_writes_its_own_slots_alone() -> None:
    runs = backend("tiny")
    batch = Batch(runs.plan)
    runs.run("prefill", batch.step("prefill", [(0, 0, 5), (1, 0, 5), (2, 0, 5)]))
    before = {name: runs.state(name).copy() for name in runs.plan.states}

    runs.run("decode", batch.step("decode", [(1, 5, 1)], **accepted(0)))

    assert runs._runners.keys() == {"prefill", "decode_one"}
    for name in ("linear_state.0", "linear_state.2"):
        changed = [bool((runs.state(name)[s] != before[name][s]).any()) for s in range(4)]
        assert changed == [False, True, False, False]


def test_outputs_belong_to_the_caller() -> None:
    runs = backend("tiny")
    batch = Batch(runs.plan)
    first = runs.run("prefill", batch.step("prefill", [(0, 0, 5)]))
    kept = first["logits"].copy()

    runs.run("prefill", batch.step("prefill", [(1, 0, 5)]))

    np.testing.assert_array_equal(first["logits"], kept)


def test_a_saved_slot_goes_on_in_another() -> None:
    runs = backend("tiny")
    batch = Batch(runs.plan)
    runs.run("prefill", batch.step("prefill", [(0, 0, 5)]))
    runs.run("verify", batch.step("verify", [(0, 5, 2)], **accepted(0)))
    saved = runs.save_slot(0)
    token = batch.step("decode", [(0, 6, 1)], **accepted(1))
    want = runs.run("decode", token)["logits"]

    runs.load_slot(2, saved)
    got = runs.run("decode", token | {"slots": np.array([2], np.int32)})["logits"]

    np.testing.assert_array_equal(got, want)
    with pytest.raises(UsageError, match="slot 3 is not one of 3"):
        runs.save_slot(3)
    with pytest.raises(InputError, match=r"the saved slot lacks 'linear_state\.0'"):
        runs.load_slot(0, {})


def test_taps_show_values_between_the_steps() -> None:
    plan = compiled("tiny")
    name = next(s.outputs[0] for s in plan.programs["decode"].steps if s.op == "lingc.router")
    runs, plain = backend("tiny", taps=[name, "no such value"]), backend("tiny")
    given = Batch(plan).step("decode", [(0, 0, 1), (1, 0, 1)], **accepted(0, 0))

    made = runs.run("decode", given)

    assert made.keys() == {"logits", "hidden", name}
    assert made[name].shape == (2, plan.config["num_experts_per_tok"])
    np.testing.assert_array_equal(made["logits"], plain.run("decode", given)["logits"])


def test_wrong_inputs_are_named() -> None:
    runs = backend("tiny")
    given = Batch(runs.plan).step("prefill", [(0, 0, 5)])

    with pytest.raises(UsageError, match="no phase 'train'"):
        runs.run("train", given)
    with pytest.raises(InputError, match="takes 'slots', which is missing"):
        runs.run("prefill", {n: v for n, v in given.items() if n != "slots"})
    with pytest.raises(InputError, match=r"'slots' of phase 'prefill' is int64 \[1\], not i32"):
        runs.run("prefill", given | {"slots": np.zeros(1, np.int64)})
    with pytest.raises(InputError, match=r"'positions' .* is int32 \[4\], not i32 \[5\]"):
        runs.run("prefill", given | {"positions": np.arange(4, dtype=np.int32)})
    with pytest.raises(InputError, match=r"'slots' .* is int32 \[2\], not i32 \[1\]"):
        runs.run("prefill", given | {"slots": np.array([0, 1], np.int32)})
    with pytest.raises(UsageError, match=r"no state 'latent_cache\.0'"):
        runs.state("latent_cache.0")


def test_an_index_out_of_range_is_an_error_and_not_a_crash() -> None:
    runs = backend("tiny")
    given = Batch(runs.plan).step("prefill", [(0, 0, 5)])

    with pytest.raises(IncompatibleError, match=r"phase 'prefill' failed: ONNX Runtime .* says: "):
        runs.run("prefill", given | {"token_ids": np.full(5, 1000, np.int32)})


def test_broken_code_and_foreign_weights_are_named() -> None:
    plan = compiled("tiny")
    engine = lower(plan)
    held = packed(engine, weights("tiny", "bf16"))
    good = OnnxModels(plan=plan, models=engine.models, info=engine.info)
    cut = {phase: model[: len(model) // 2] for phase, model in engine.models.items()}
    bad = OnnxModels(plan=plan, models=cut, info=engine.info)
    given = Batch(plan).step("prefill", [(0, 0, 5)])

    with pytest.raises(IncompatibleError, match="the engine's code cannot be loaded"):
        OnnxBackend(bad, held, LIMITS).run("prefill", given)
    name = "layers.0.input_layernorm.weight"
    with pytest.raises(InputError, match=f"the engine's weights lack '{name}'"):
        OnnxBackend(good, {n: w for n, w in held.items() if n != name}, LIMITS)
    with pytest.raises(InputError, match=rf"'{name}' of shape .* cannot be made of"):
        OnnxBackend(good, held | {name: held[name][:-1]}, LIMITS)


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ("gpu", UsageError, "LINGC_ONNX_PROVIDER is 'gpu', it may be cpu or cuda"),
        ("cuda", IncompatibleError, "this ONNX Runtime was built without it"),
    ],
)
def test_a_provider_that_is_not_there_is_named(
    said: str, kind: type[LingcError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = backend("tiny")
    monkeypatch.setenv(PROVIDER, said)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])

    with pytest.raises(kind, match=message):
        runs.run("prefill", Batch(runs.plan).step("prefill", [(0, 0, 5)]))


def test_a_provider_that_does_not_load_is_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = backend("tiny")
    monkeypatch.setenv(PROVIDER, "cuda")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    make = onnx_session.InferenceSession
    monkeypatch.setattr(
        onnx_session,
        "InferenceSession",
        lambda *given, **more: make(*given, **more | {"providers": both[1:]}),
    )

    with pytest.raises(IncompatibleError, match=r"CUDA provider .* cannot be loaded"):
        runs.run("prefill", Batch(runs.plan).step("prefill", [(0, 0, 5)]))


def test_a_closed_backend_holds_nothing() -> None:
    runs = backend("tiny")
    runs.run("prefill", Batch(runs.plan).step("prefill", [(0, 0, 5)]))

    runs.close()

    assert not runs._runners
    assert not runs._weights


@pytest.mark.parametrize("missing", ["onnxruntime", "onnx"])
def test_a_missing_library_is_answered_with_the_extra_to_install(missing: str) -> None:
    module = {"onnxruntime": "lingc.runtime.onnx_backend", "onnx": "lingc.targets.onnx"}[missing]
    code = f"""
import sys
sys.modules[{missing!r}] = None
from lingc.errors import MissingExtraError
try:
    import {module}
except MissingExtraError as error:
    print(error)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert f"needs the package '{missing}', which is not installed" in done.stdout
    assert "pip install 'lingc[onnx]'" in done.stdout
