"""What is measured, what is kept of it, and what a build makes of that; no GPU is needed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.overrides import TorchFunctionMode

from lingc import compile as compiler
from lingc import targets
from lingc.bench import kernels, step, tune
from lingc.bench.kernels import Fault
from lingc.bench.step import DeviceStep
from lingc.bench.tune import Candidate, Found, Settings, Shape
from lingc.bench.work import Work, default_work, inputs_of
from lingc.cli import lingc
from lingc.device import Device
from lingc.math import expert_lists
from lingc.model.config import ModelConfig
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.targets.cuda.tactics import read_rows

ROOT = Path(__file__).parents[1]
TINY = ROOT / "artifacts" / "checkpoints" / "ling-tiny"
H200 = targets.get("h200-sxm")


@cache
def plan() -> Plan:
    config = tune.reduced(ModelConfig.from_file(TINY))
    request = compiler.Request(precision="fp8", target=H200.name)
    return compiler.compile_plan(
        config, load_recipe("fp8"), H200, has_mtp=config.has_mtp, request=request
    ).plan


def settings(tmp_path: Path, **changes: Any) -> Settings:
    work = default_work(plan(), batches=(1, 2), contexts=(64, 128), prefill=(24,))
    whole = {"target": H200, "cache_dir": tmp_path, "work": work, "command": "lingc tune",
             "date": "2026-11-22", **changes}  # fmt: skip
    return Settings(**whole)


# ------------------------------------------------------------------------------------------ shapes


def test_every_shape_is_there_once_and_by_the_letters_of_the_state(tmp_path: Path) -> None:
    found = tune.shapes(plan(), settings(tmp_path))

    names = [(one.op, one.known_as) for one in found]
    assert len(names) == len(set(names))
    assert all(len(one.tactics) > 1 for one in found)
    assert any("f32[S, " in one.known_as for one in found if one.op == "lightning_decode_qkv")
    assert all("[S, " in one.known_as or "[R, " in one.known_as
               for one in found if one.op in {"mla_latent_attention", "mla_latent_kv"})  # fmt: skip


def test_only_what_depends_on_the_context_is_measured_at_each(tmp_path: Path) -> None:
    found = tune.shapes(plan(), settings(tmp_path, every=True))

    later = {one.op for one in found if one.work.name.endswith("context 128")}
    assert later == {"mla_latent_attention"}


def test_the_inputs_are_those_of_the_bucket() -> None:
    work = Work(phase="prefill", sequences=3, context=512, tokens=40)

    inputs, limits = inputs_of(plan(), work)

    assert inputs["offsets"].tolist() == [0, 38, 39, 40]
    assert inputs["page_table"].shape == (3, 512 // plan().page_size)
    assert inputs["logit_rows"].tolist() == [37, 38, 39]
    assert limits.slots == 3


def test_what_is_verified_has_whole_sequences_behind_a_filled_cache() -> None:
    some = default_work(plan(), batches=(2,), contexts=(640,), prefill=(), drafts=(1, 3))

    assert [(one.phase, one.sequences, one.tokens) for one in some] == [
        ("decode", 2, 2), ("verify", 2, 4), ("verify", 2, 8), ("draft", 2, 2),
    ]  # fmt: skip
    inputs, _ = inputs_of(plan(), some[2])
    assert inputs["offsets"].tolist() == [0, 4, 8]
    assert inputs["positions"].tolist() == [512, 513, 514, 515] * 2
    assert inputs["page_table"].shape == (2, 640 // plan().page_size)
    assert inputs["accepted"].tolist() == [4, 4]
    assert inputs_of(plan(), some[0])[0]["accepted"].tolist() == [0, 0]
    inputs, _ = inputs_of(plan(), some[3])
    assert inputs["hidden"].shape == (2, plan().config["hidden_size"])
    assert inputs["logit_rows"].tolist() == [0, 1]


def test_steps_of_speculation_have_shapes_of_their_own(tmp_path: Path) -> None:
    work = default_work(plan(), batches=(2,), contexts=(128,), prefill=(), drafts=(3,))

    found = tune.shapes(plan(), settings(tmp_path, work=work, every=True))

    by_phase = {one.work.phase: {x.op for x in found if x.work.phase == one.work.phase}
                for one in found}  # fmt: skip
    assert {"lightning_verify_qkv", "mla_latent_attention"} <= by_phase["verify"]
    assert by_phase["draft"] & {"fused_linear", "gather_rows"}


# ---------------------------------------------------------------------------------------- measured


class Here(TorchFunctionMode):
    """Puts on the host what is asked for on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class HostGenerator:
    """Is made for whatever device, and is the host's. A class, for annotations name it."""

    def __new__(cls, **_: Any) -> Any:
        return torch.default_generator


class Idle(Device):
    """Launches nothing, and takes a microsecond for everything but one tactic."""

    memory = "cpu"
    name, sms, l2_bytes, driver_version, capability = "a GPU", 132, 1 << 16, 13000, (9, 0)

    def __init__(self) -> None: ...

    def synchronize(self) -> None: ...

    def facts(self, _binary: Any) -> Any:
        return {"registers": 1, "local_bytes": 0, "blocks_per_sm": 1}

    @contextmanager
    def recording(self) -> Iterator[Any]:
        yield Graph()


class Graph:
    def seconds(self, replays: int) -> list[float]:
        return [24e-6] * replays

    def close(self) -> None: ...


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def launch_one(self: DeviceStep, index: int) -> None:
        one = self.schedule.steps[index]
        found = one.op.reference(*(step._argument(arg, self, {}) for arg in one.step.args))
        results = [found] if isinstance(found, torch.Tensor) else list(found)
        for name, value in zip(one.op.results, results, strict=True):
            self.tensors[one.buffers[name] or ""].copy_(value)

    class Binaries(dict[Any, Any]):
        def __missing__(self, _kernel: Any) -> None:
            return None

    monkeypatch.setattr(step, "_DRAWN", 1 << 20)
    monkeypatch.setattr(DeviceStep, "launch_one", launch_one)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "Generator", HostGenerator)
    monkeypatch.setattr(tune, "open_device", lambda _sms: Idle())
    monkeypatch.setattr(tune, "compile_all", lambda *_args, **_more: Binaries())
    monkeypatch.setattr(tune, "ceilings_of", lambda *_: {"read": 4.6e12})
    monkeypatch.setattr(kernels, "launch_all", lambda *_args, **_more: None)
    for cached in (kernels._row_order, kernels._piece_order):
        cached.cache_clear()
    with Here():
        yield
    for cached in (kernels._row_order, kernels._piece_order):
        cached.cache_clear()


@pytest.mark.usefixtures("idle")
def test_every_shape_is_gated_and_timed_on_what_a_step_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def check(_device: Any, op: Any, arguments: Any, *_: Any, **_more: Any) -> Iterator[Fault]:
        seen.append(op.name)
        finite = [one for one in arguments if isinstance(one, torch.Tensor)]
        assert all(bool(one.float().isfinite().all()) for one in finite), op.name
        yield from ()

    monkeypatch.setattr(kernels, "check", check)
    wanted = tune.shapes(plan(), settings(tmp_path))
    kept: list[Found] = []

    told = tune.run(plan(), settings(tmp_path), wanted, compiler.silent,
                    lambda found, _: kept.append(found))  # fmt: skip

    assert told["left"] == 0
    assert [found.shape for found in kept] == sorted(
        wanted, key=lambda one: settings(tmp_path).work.index(one.work)
    )
    assert len(seen) == len(wanted)
    assert all(one.microseconds for found in kept for one in found.candidates)
    json.dumps([tune.entry_of(found) for found in kept])


@pytest.mark.usefixtures("idle")
def test_tokens_are_sent_to_experts_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = plan().config
    experts, top = int(config["num_experts"]), int(config["num_experts_per_tok"])
    tokens = 64
    seen: list[torch.Tensor] = []

    def check(_device: Any, op: Any, arguments: Any, *_: Any, **_more: Any) -> Iterator[Fault]:
        given = dict(zip(op.arguments, arguments, strict=True))
        lists = expert_lists(given["ids"], experts)
        assert torch.equal(given["pairs"], lists[0])
        assert torch.equal(given["starts"], lists[1])
        seen.append(given["ids"])
        yield from ()

    launch = DeviceStep.launch_one

    def all_to_one(self: DeviceStep, index: int) -> None:
        launch(self, index)
        one = self.schedule.steps[index]
        if one.op.name == "norm_router":
            self.tensors[one.buffers["ids"] or ""].copy_(torch.arange(top))

    monkeypatch.setattr(DeviceStep, "launch_one", all_to_one)
    monkeypatch.setattr(kernels, "check", check)
    work = default_work(plan(), batches=(tokens,), contexts=(64,), prefill=())
    some = settings(tmp_path, work=work, ops=("expert_up",), every=True)

    tune.run(plan(), some, tune.shapes(plan(), some), compiler.silent, lambda *_: None)

    (ids,) = seen
    assert ids.shape == (tokens, top)
    assert all(len(row.unique()) == top for row in ids)
    even = tokens * top / experts
    assert ids.flatten().bincount(minlength=experts).max() < even + 6 * even**0.5


@pytest.mark.usefixtures("idle")
def test_what_fails_its_gate_has_no_time(tmp_path: Path) -> None:
    some = settings(tmp_path, ops=("rms_norm",))
    kept: list[Found] = []

    tune.run(plan(), some, tune.shapes(plan(), some), compiler.silent,
             lambda found, _: kept.append(found))  # fmt: skip

    assert kept
    assert all(one.microseconds is None for found in kept for one in found.candidates)
    assert all(one.problem for found in kept for one in found.candidates)
    assert tune.row_of(kept[0], some, Idle()) is None


# -------------------------------------------------------------------------------------------- rows


def found(*candidates: tuple[str, float | None, float], chosen: str = "a") -> Found:
    shape = Shape(work=Work(phase="decode", sequences=1, context=64, tokens=1), index=0, calls=1,
                  op="silu_mul", known_as="bf16[1, 64]", tactics=(), chosen=chosen)  # fmt: skip
    made = [
        Candidate(tactic=name, microseconds=None if us is None else (us, us, us), predicted=us or 0,
                  least=least, launches=(), problem=None if us else "wrong")
        for name, us, least in candidates
    ]  # fmt: skip
    return Found(shape=shape, gated=True, moved_bytes=1.0, flops=1.0, candidates=made)


def test_a_row_has_the_fastest_and_what_the_model_chose(tmp_path: Path) -> None:
    row = tune.row_of(found(("a", 10.0, 0.0), ("b", 8.0, 0.0)), settings(tmp_path), Idle())

    assert row is not None
    assert (row.tactic, row.microseconds) == ("b", 8.0)
    assert (row.model, row.model_microseconds) == ("a", 10.0)
    assert (row.device, row.sms, row.date) == ("a GPU", 132, "2026-11-22")


def test_noise_overrides_nothing(tmp_path: Path) -> None:
    row = tune.row_of(found(("a", 10.0, 0.0), ("b", 9.9, 0.0)), settings(tmp_path), Idle())

    assert row is not None
    assert row.tactic == "a"


def test_a_wrong_choice_is_overridden(tmp_path: Path) -> None:
    row = tune.row_of(found(("a", None, 0.0), ("b", 99.0, 0.0)), settings(tmp_path), Idle())

    assert row is not None
    assert (row.tactic, row.model_microseconds) == ("b", None)


def test_what_the_targets_arithmetic_cannot_do_is_no_faster_for_being_measured_elsewhere(
    tmp_path: Path,
) -> None:
    row = tune.row_of(found(("a", 10.0, 4.0), ("b", 8.0, 16.0)), settings(tmp_path), Idle())

    assert row is not None
    assert row.tactic == "a"


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    row = tune.row_of(found(("a", 10.0, 0.0)), settings(tmp_path), Idle())
    assert row is not None
    file = tmp_path / "rows.json"
    file.write_text(tune.rows_text({(row.op, row.key): row}), encoding="utf-8")

    assert read_rows(file) == {(row.op, row.key): row}


def test_a_dry_run_lists_and_needs_no_device(tmp_path: Path) -> None:
    words = ["--checkpoint", str(TINY), "--batch", "1", "--context", "64", "--no-prefill",
             "--dry-run", "-q", "-o", str(tmp_path / "rows.json")]  # fmt: skip

    done = CliRunner().invoke(lingc, ["tune", *words], catch_exceptions=False)

    assert done.exit_code == 0
    assert "mla_latent_attention" in done.output
    assert not (tmp_path / "rows.json").exists()
