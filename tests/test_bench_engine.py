"""`lingc bench` of a CUDA engine: real tables and memory, references in the place of kernels."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from lingc import targets
from lingc.bench import engine, engine_checks, engine_times, kernels, speculation, synthetic
from lingc.bench.engine import Report, Settings
from lingc.bench.record import device_facts
from lingc.bench.synthetic import Fill, router_bias
from lingc.device import Binary, Graph
from lingc.errors import UsageError
from lingc.kernel import Launch, Tensor
from lingc.op import TORCH_DTYPE
from lingc.plan import TensorType
from lingc.round_memory import ROUND, round_axes
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_backend import CudaBackend
from lingc.runtime.cuda_code import CudaCode
from lingc.runtime.cuda_memory import Held
from lingc.runtime.cuda_rounds import CudaRounds
from lingc.targets.cuda.buckets import Sizes
from tests.kernels import emulated
from tests.runtime.cuda_engine import TARGET, plan_and_weights, sizes
from tests.runtime.host_device import HostDevice, HostGraph, reference_code

SETTINGS = Settings(
    cache_dir=Path(), batches=(1, 2), contexts=(40,), prefills=(70,), tokens=2, seed=3, profile=True
)
BUCKETS = (
    *(sizes("prefill", tokens, 3, 12) for tokens in (16, 64)),
    *(sizes("decode", n, n, 12) for n in (1, 2)),
    *(sizes("verify", 2 * n, n, 12) for n in (1, 2)),
    *(sizes("draft", n, n, 12) for n in (1, 2)),
    *(sizes("draft", 2 * n, n, 12) for n in (1, 2)),
    sizes("draft", 64, 3, 12),
    *(Sizes(phase=ROUND, axes=round_axes(n, 2, 12)) for n in (1, 2)),
)


class Timed(HostGraph):
    def seconds(self, replays: int) -> list[float]:
        for _ in range(replays):
            self.replay()
        self.host.synchronize()
        return [1e-3 * len(self.work)] * replays


class Bench(HostDevice):
    """Draws by the kernel itself, on the CPU, and takes a millisecond for every launch."""

    sms, l2_bytes = 132, 1 << 20

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.kinds = {kernel.constants[0][1]: kernel for kernel in synthetic.kernels().values()}

    @contextmanager
    def recording(self) -> Iterator[Graph]:
        made = Timed(self)
        self.record = made.work
        try:
            yield made
        finally:
            self.record = None

    def put(self, binary: Binary, values: Sequence[Any], **more: Any) -> None:
        if binary.entry != "fill":
            super().put(binary, values, **more)
            return
        address, *rest = values
        self.check(address, values[1])
        launch = Launch(
            kernel=self.kinds[int(binary.name)],
            grid=(min(more["grid"][0], 4), 1, 1),
            operands=(Tensor("out"), *rest),
        )
        problem = emulated._launch(launch, {"out": address}, self.folder)
        assert not problem


@cache
def binaries() -> dict[int, Binary]:
    return {
        kind: Binary(name=str(kind), arch="sm_90a", code=b"", entry="fill",
                     arguments=kernel.arguments, hidden=0, threads=256, shared_bytes=0)
        for kind, kernel in synthetic.kernels().items()
    }  # fmt: skip


@cache
def code() -> CudaCode:
    return reference_code(plan_and_weights()[0], targets.get(TARGET), BUCKETS)


class Here(TorchFunctionMode):
    """Puts on the host what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def on_the_host(device: HostDevice) -> Any:
    return lambda held: device.tensor(held.address, held.kind)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    if emulated.COMPILER is None:
        pytest.skip("no C++ compiler: neither g++ nor clang++")
    code()  # compiled as it always is
    found = Bench(tmp_path)
    monkeypatch.setattr(synthetic, "binaries", lambda *_: binaries())
    monkeypatch.setattr(engine_times, "WARM_S", 0.0)
    monkeypatch.setattr(engine_checks, "view", on_the_host(found))
    for cached in (kernels._row_order, kernels._piece_order):
        cached.cache_clear()
    with Here():
        yield found
    for cached in (kernels._row_order, kernels._piece_order):
        cached.cache_clear()


@pytest.fixture
def backend(device: Bench) -> Iterator[CudaBackend]:
    made = CudaBackend(code(), None, Limits(slots=2, pages=12), device=device)
    engine.draw(made, SETTINGS)
    yield made
    made.close()


def test_an_engine_with_drawn_weights_is_right_and_gets_its_numbers(backend: CudaBackend) -> None:
    report = Report(device=device_facts(backend.device), loaded=1.0)

    hit = engine.gate(backend, SETTINGS, report)
    engine.measure(backend, SETTINGS, report, hit)

    assert [check for check in report.gate if check.problem is not None] == []
    assert {check.name for check in report.gate} >= {
        "decode", "prefill", "decode, expert_up", "prefill, lightning_prefill_qkv",
    }  # fmt: skip
    one, two = report.decodes
    assert (one.batch, two.batch) == (1, 2)
    assert one.experts is not None
    assert all(1 <= hit <= 4 for hit in one.experts)
    assert one.tokens_per_s == pytest.approx(1 / (1e-3 * one.launches))
    assert two.tokens_per_s == pytest.approx(2 / (1e-3 * two.launches))
    assert one.profiled == pytest.approx(one.step.p50)  # every launch takes the same here
    assert sum(kind.steps for kind in one.profile) == one.launches
    parts = {kind.op: [part["kind"] for part in kind.parts] for kind in one.profile}
    assert len(parts["mla_latent_attention"]) == 3
    assert all(parts.values())
    assert [made.batch for made in report.generations] == [1, 2]
    assert all(made.tokens_per_s > 0 for made in report.generations)
    (prompt,) = report.prefills
    assert prompt.last is not None
    launches = sum(kind.steps * kind.launches for kind in prompt.profile)
    assert prompt.last.p50 == pytest.approx(1e-3 * launches)
    assert [kind.measured for kind in prompt.profile] == pytest.approx(
        [1e3 * kind.launches for kind in prompt.profile]
    )
    assert (prompt.tokens, prompt.chunks) == (70, 2)
    assert one.predicted > 0
    assert prompt.predicted > 0


def test_rounds_of_drafts_are_right_and_get_their_numbers(backend: CudaBackend) -> None:
    """Kept by force all, none, and as the model judges, which with drawn weights keeps none."""
    settings = replace(
        SETTINGS, batches=(2,), prefills=(16,), profile=False, drafts=(1,),
        acceptances=(1.0, 0.0, None),
    )  # fmt: skip
    report = Report(device=device_facts(backend.device), loaded=1.0)

    engine.gate(backend, settings, report)
    engine.measure(backend, settings, report)

    assert [check for check in report.gate if check.problem is not None] == []
    assert {check.name for check in report.gate} >= {"verify", "draft", "verify, expert_up"}
    found = [(one.acceptance, one.kept) for one in report.speculations]
    assert found == [(1.0, 1.0), (0.0, 0.0), (None, 0.0)]
    assert [(part.phase, part.tokens) for part in report.parts] == [("verify", 4), ("draft", 4)]
    for one in report.speculations:
        assert one.round.p50 == pytest.approx(1e-3 * one.launches)  # every launch takes the same
        # A round is a verify and a draft, what is between them, and the drawing of the draft.
        assert one.launches == sum(part.launches for part in report.parts) + 4
        assert one.predicted > sum(part.predicted for part in report.parts) > 0
        assert one.tokens_per_s > 0
    assert [(one.drafts, one.kept) for one in report.generations] == [(0, 0.0), (1, 0.0)]
    told: Any = engine.document(report, Opened(), settings, {}, "2026-11-22")  # type: ignore[arg-type]
    read = json.loads(json.dumps(told, allow_nan=False))
    assert [one["acceptance"] for one in read["speculate"]] == [1.0, 0.0, None]
    assert [one["phase"] for one in read["parts"]] == ["verify", "draft"]


def test_rounds_that_the_engine_has_no_code_for_are_refused(backend: CudaBackend) -> None:
    with pytest.raises(UsageError, match="no code for rounds of 1 sequences with 2 drafts"):
        speculation.speculate(backend, 1, 40, 2, rounds=1)


def test_rounds_that_the_engine_has_no_code_for_are_left_out(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(CudaRounds, "fits", lambda *_: False)
    report = Report(device={}, loaded=1.0)
    few = replace(SETTINGS, batches=(1,), prefills=(16,), profile=False, drafts=(1,))

    engine.measure(backend, few, report, tell=told.append)

    assert "no code for rounds of 1 sequences, 1 drafts: not timed" in told
    assert not report.speculations
    assert [(one.drafts, one.batch) for one in report.generations] == [(0, 1), (1, 1)]


def test_a_wrong_step_is_found(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from lingc.op import OPS  # noqa: PLC0415

    right = OPS["expert_up"]
    wrong = replace(right, reference=lambda *given: right.reference(*given) + 1)
    monkeypatch.setitem(OPS, "expert_up", wrong)
    report = Report(device={}, loaded=1.0)
    # The kernels' side keeps the right one.
    monkeypatch.setattr("tests.runtime.host_device.OPS", {**OPS, "expert_up": right})

    engine.gate(backend, SETTINGS, report)

    assert {check.name for check in report.gate if check.problem} == {
        "decode, expert_up", "prefill, expert_up",
    }  # fmt: skip
    assert not report.is_right


def test_the_record_is_json(backend: CudaBackend) -> None:
    report = Report(device=device_facts(backend.device), loaded=1.0,
                    ceilings={"read": 4.6e12})  # fmt: skip
    engine.measure(backend, SETTINGS, report)

    told: Any = engine.document(report, Opened(), SETTINGS, {}, "2026-11-22")  # type: ignore[arg-type]

    read = json.loads(json.dumps(told, allow_nan=False))
    assert read["weights"] == {"seed": 3, "routing": "uniform"}
    assert read["decode"][0]["share_of_read"] > 0
    assert read["gate"]["ok"]


class Opened:
    """A package of which only so much is asked."""

    def __init__(self, *, has_weights: bool = False) -> None:
        self.plan = plan_and_weights()[0]
        manifest = SimpleNamespace(has_weights=has_weights, bundle_id="0" * 64)
        code = SimpleNamespace(target=TARGET)
        self.package = SimpleNamespace(manifest=manifest, code=lambda: code)


def test_a_run_checks_before_it_measures(device: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[Limits] = []

    def start(_opened: Any, settings: Settings, on: Bench, limits: Limits) -> CudaBackend:
        rooms.append(limits)
        made = CudaBackend(code(), None, limits, device=on)
        engine.draw(made, settings)
        return made

    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setattr("lingc.bench.limited.open_device", lambda _: device)
    monkeypatch.setattr(engine, "ceilings", lambda *_: {"read": 4.6e12})
    said: list[str] = []

    report = engine.run(Opened(), replace(SETTINGS, batches=(1,)), said.append)  # type: ignore[arg-type]

    assert report.is_right
    assert said[:2] == ["load, to check that it is right", "check that it is right"]
    assert len(report.decodes) == len(report.prefills) == len(report.generations) == 1
    assert len(rooms) == 2
    assert not device.blocks  # everything was given back


@pytest.mark.parametrize(
    ("has_weights", "seed", "said"),
    [(True, 0, "has weights of its own"), (False, None, "has no weights to run with")],
)
def test_weights_are_drawn_where_there_are_none_and_only_there(
    *, has_weights: bool, seed: int | None, said: str
) -> None:
    opened: Any = Opened(has_weights=has_weights)

    with pytest.raises(UsageError, match=said):
        engine.run(opened, replace(SETTINGS, seed=seed))


def test_experts_that_were_not_hit_are_not_counted(backend: CudaBackend) -> None:
    bound = backend.prepare("decode", engine_checks.decode_inputs(backend, 2, 40))
    layers = len(synthetic.router_biases(backend.plan)) - 1  # the draft layer is not in the step
    even = 4 * (1 - (1 - 2 / 4) ** 2)

    def bytes_off(hit: float) -> float:
        return engine_times.not_hit(backend, bound, (hit,) * layers)  # type: ignore[arg-type]

    program = backend.plan.programs["decode"]
    names = {name for name in program.weights if ".all_experts." in name}
    each = sum(program.types[name].bytes() / program.types[name].bind({})[0] for name in names)
    assert bytes_off(even) == pytest.approx(0.0)
    assert bytes_off(even - 1) == pytest.approx(each)
    assert engine_times.not_hit(backend, bound, None) == 0


def test_rounds_have_room_for_all_that_they_may_keep() -> None:
    plan, _ = plan_and_weights()
    plain = engine.limits_of(plan, SETTINGS)

    more = engine.limits_of(plan, replace(SETTINGS, drafts=(1, 3)))

    assert more.pages * plan.page_size >= 2 * (speculation.room(40, 3, SETTINGS.tokens) + 3)
    assert more.slots == plain.slots


def test_the_gate_takes_less_state_than_the_timing() -> None:
    plan, _ = plan_and_weights()
    some = Settings(cache_dir=Path(), batches=(1, 32), contexts=(4095, 32767), prefills=(131072,))

    whole, few = engine.limits_of(plan, some), engine.limits_of(plan, some, gate=True)

    assert whole == Limits(slots=32, pages=32 * 512)
    assert few == Limits(slots=32, pages=32 * 64)


# ------------------------------------------------------------------------------------------- drawn


def drawn(device: Bench, kind: TensorType, fill: Fill, name: str = "w", seed: int = 0) -> Any:
    address = device.allocate(kind.bytes())
    held = Held(kind=kind, address=address, bytes=kind.bytes())
    synthetic.Drawn(device, seed, binaries()).tensor(name, held, fill)
    return device.tensor(address, kind).clone()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_numbers_have_their_mean_and_deviation(device: Bench, dtype: str) -> None:
    found = drawn(device, TensorType(dtype, (64, 512)), Fill(scale=0.5, offset=2.0)).float()

    assert found.mean() == pytest.approx(2.0, abs=0.02)
    assert found.std() == pytest.approx(0.5, rel=0.03)
    assert found.unique().numel() > 200


def test_codes_are_finite_and_of_the_size_that_scales_are_made_for(device: Bench) -> None:
    found = drawn(device, TensorType("f8e4m3", (128, 256)), Fill())

    values = found.float()
    assert bool(values.isfinite().all())
    assert values.square().mean().sqrt() == pytest.approx(synthetic.CODE_RMS, rel=0.02)


def test_nibbles_are_of_the_size_that_scales_are_made_for(device: Bench) -> None:
    found = drawn(device, TensorType("i32", (128, 256)), Fill())

    nibbles = torch.stack([found >> 4 * i & 15 for i in range(8)]).float() - 8
    assert nibbles.square().mean().sqrt() == pytest.approx(synthetic.NIBBLE_RMS, rel=0.02)
    assert nibbles.mean() == pytest.approx(0.0, abs=0.03)  # or tokens become alike


def test_a_name_and_a_seed_are_the_same_numbers_again(device: Bench) -> None:
    kind = TensorType("f32", (64,))

    first = drawn(device, kind, Fill())
    assert torch.equal(first, drawn(device, kind, Fill()))
    assert not torch.equal(first, drawn(device, kind, Fill(), name="other"))
    assert not torch.equal(first, drawn(device, kind, Fill(), seed=1))


def test_zipfs_biases_hit_as_many_experts_as_draws_by_the_law() -> None:
    random = np.random.default_rng(0)
    law = -np.log(np.arange(256) + 1) + random.gumbel(size=(3200, 256))
    scores = 1 / (1 + np.exp(-random.standard_normal((3200, 256))))

    def distinct(noisy: Any) -> float:
        chosen = np.argsort(-noisy, axis=1)[:, :8].reshape(100, -1)
        return float(np.mean([len(np.unique(batch)) for batch in chosen]))  # 32 tokens each

    assert distinct(scores + router_bias(256, "zipf", seed=0)) == pytest.approx(
        distinct(law), rel=0.1
    )
    assert not router_bias(256, "uniform", seed=0).any()
    assert distinct(scores) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 32), rel=0.02)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("tiled", "f8e4m3"), ("tiled_gated", "f8e4m3"), ("tiled", "i32"), ("tiled_gated", "i32"),
     ("tiled_gated", "bf16"), ("tiled_scales", "bf16"), ("tiled_gated_scales", "bf16")],
)  # fmt: skip
def test_a_weight_comes_back_in_the_plans_order(device: Bench, layout: str, dtype: str) -> None:
    assert device is not None
    raw = torch.randint(256, (3, 64, 256), dtype=torch.uint8)
    values = raw.view(TORCH_DTYPE[dtype])

    back = kernels.plain_tensor(layout, kernels.arranged_tensor(layout, values))

    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
