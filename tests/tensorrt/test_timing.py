"""What standard TensorRT measures is kept, named, and held to; on a recorder of its bindings."""

import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingc import tensorrt_code
from lingc.code import refuse
from lingc.compile import Compiled, Request, silent
from lingc.engine import summary
from lingc.engine.machine import Gpu, Machine
from lingc.errors import IncompatibleError, LingcError, ResourceError, StageError, UsageError
from lingc.pipeline import Report
from lingc.quantize.recipes import load_recipe
from lingc.targets import get
from lingc.targets.spec import Target
from lingc.targets.tensorrt import backend as backends
from lingc.targets.tensorrt import report
from lingc.targets.tensorrt.backend import StandardBackend
from lingc.targets.tensorrt.timing import Timing
from tests.tensorrt.engines import plan, plugins, weights
from tests.tensorrt.recording import Recording, Thing
from tests.tensorrt.surface import load
from tests.tensorrt.test_surface import TARGET, VERSIONS

H20 = Gpu(name="NVIDIA H20", capability="9.0", driver="13.0", memory_bytes=96 << 30)
MEASURED = b"IHostMemory"  # what the recorder serializes
PRECISION = "bf16"

Host = Callable[..., Recording]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with standard TensorRT, as a recorder, and a GPU."""

    def made(version: str = VERSIONS[1], gpu: Gpu | str = H20) -> Recording:
        recording = Recording(load(version))
        machine = Machine(os="linux", arch="x86_64", version_of=lambda _: "", gpu=lambda: gpu)
        monkeypatch.setattr(backends, "this_machine", lambda: machine)
        monkeypatch.setattr(tensorrt_code, "backend", lambda _target: StandardBackend(recording))
        monkeypatch.setattr(
            tensorrt_code, "_plugins", lambda *_a, **_more: plugins(TARGET, PRECISION)
        )
        return recording

    return made


def build(timing: Timing, cache_dir: Path | None = None, target: str = TARGET) -> Any:
    compiled = Compiled(
        plan=plan(TARGET, PRECISION), report=Report(), recipe=load_recipe(PRECISION),
        target=get(target),
    )  # fmt: skip
    held = weights(TARGET, PRECISION)
    return tensorrt_code.make(compiled, held, timing=timing, cache_dir=cache_dir, stage=silent)


def given(recording: Recording, name: str) -> list[tuple[Any, ...]]:
    return [args for called, args in recording.given if called == name]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_measured_serves_the_next_phase_and_the_next_build(
    host: Host, version: str, tmp_path: Path
) -> None:
    recording, file = host(version), tmp_path / "h20.cache"
    made = build(Timing(path=file))

    phases = len(plan(TARGET, PRECISION).programs)
    taken = [args[0] for args in given(recording, "IBuilderConfig.create_timing_cache")]
    assert taken == [b"", *[MEASURED] * (phases - 1)]
    assert all(args[1] is False for args in given(recording, "IBuilderConfig.set_timing_cache"))
    assert file.read_bytes() == MEASURED
    assert [*tmp_path.iterdir()] == [file]
    assert made.info["measurements_sha256"] == hashlib.sha256(MEASURED).hexdigest()

    again = host(version)
    build(Timing(path=file))
    assert given(again, "IBuilderConfig.create_timing_cache")[0] == (MEASURED,)


def test_lingc_keeps_measurements_by_version_gpu_and_precision(host: Host, tmp_path: Path) -> None:
    for version in VERSIONS:
        for name in ("NVIDIA H20", "NVIDIA H200"):
            gpu = Gpu(name=name, capability="9.0", driver="13.0", memory_bytes=96 << 30)
            host(version, gpu)
            build(Timing(), tmp_path)
    kept = {path.name for path in (tmp_path / "timing").iterdir()}
    assert len(kept) == 4

    host()
    build(Timing(), tmp_path)
    assert {path.name for path in (tmp_path / "timing").iterdir()} == kept

    recording = host()
    build(Timing())
    assert given(recording, "IBuilderConfig.create_timing_cache")[0] == (b"",)


def test_a_package_says_where_it_was_tuned_and_where_it_runs(host: Host) -> None:
    h200 = Gpu(name="NVIDIA H200", capability="9.0", driver="13.0", memory_bytes=141 << 30)
    recording = host(gpu=h200)
    info = build(Timing()).info

    assert info["tuned_on"] == "NVIDIA H200"
    assert info["runs_on"]["gpu"]["capability"] == "9.0"
    assert info["hardware_compatibility"] == "SAME_COMPUTE_CAPABILITY"
    assert info["tactics_locked"] is False
    assert "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY" in recording.used
    assert summary.variant(info)["tuned_on"] == "NVIDIA H200"
    assert "tuned_on" not in summary.variant({"engine": "cuda"})


def test_a_log_that_cannot_be_read_is_told_and_ends_no_build(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host()
    made = build(Timing())
    files = made.files

    ours = [record.levelname for record in caplog.records if record.name == "lingc"]
    assert ours == ["WARNING"] * 4
    assert "the build of 'decode' listed its layers 0 times, not once" in caplog.text
    assert files["decode.engine"] == MEASURED
    assert made.info["faults"]["decode"] == [
        "the build of 'decode' listed its layers 0 times, not once: how it was fused is not known"
    ]
    assert summary.variant(made.info)["faults"] == 4


def test_what_is_fused_otherwise_is_told_and_stays_in_the_package(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host()
    monkeypatch.setattr(
        report, "parse",
        lambda _messages, network: report.Report(
            phase=network.phase, layers=(), activation_bytes=1, weight_bytes=2, scratch_bytes=3
        ),
    )  # fmt: skip
    made = build(Timing())
    files, faults = made.files, made.info["faults"]
    phases = json.loads(lzma.decompress(files[tensorrt_code.REPORT]))["phases"]

    ours = [record.levelname for record in caplog.records if record.name == "lingc"]
    assert ours == ["WARNING"] * 4
    assert "the decode engine is not what was lowered" in caplog.text
    assert {*phases} == {*plan(TARGET, PRECISION).programs}
    assert phases["decode"]["scratch_bytes"] == 3
    # All of them, where the warning has the first.
    called = sum(n is not None for n in plugins(TARGET, PRECISION).numbers["decode"])
    assert {*faults} == {*phases}
    assert len(faults["decode"]) == called + 1
    assert faults["decode"][-1] == f"the engine calls 0 plugins, the network has {called}"
    assert summary.variant(made.info)["faults"] == sum(map(len, faults.values()))
    assert files["decode.engine"] == MEASURED


def test_a_build_can_be_held_to_what_was_measured(host: Host, tmp_path: Path) -> None:
    file = tmp_path / "h20.cache"
    file.write_bytes(b"measured before")
    recording = host()
    info = build(Timing(path=file, locked=True)).info

    flags = {args[0] for args in given(recording, "IBuilderConfig.set_flag")}
    assert flags == {"EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS"}
    assert file.read_bytes() == b"measured before"
    assert info["tactics_locked"] is True


def test_what_was_not_measured_ends_a_build_that_is_held_to_measurements(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "h20.cache"
    file.write_bytes(b"measured before")
    host()
    monkeypatch.setattr(Thing, "_call", _answering("build_serialized_network", answer=None))

    with pytest.raises(StageError, match="TensorRT builds no engine of 'prefill'") as caught:
        build(Timing(path=file, locked=True))
    assert "--lock-tactics" in str(caught.value.hint)
    assert file.read_bytes() == b"measured before"


def test_a_build_that_failed_says_so_where_its_measurements_are_lost_too(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "h20.cache"
    file.write_bytes(b"measured before")
    host()
    for method in ("build_serialized_network", "serialize"):
        monkeypatch.setattr(Thing, "_call", _answering(method, answer=None))

    with pytest.raises(StageError, match="TensorRT builds no engine of 'prefill'"):
        build(Timing(path=file))
    assert file.read_bytes() == b"measured before"


def test_measurements_of_another_gpu_are_refused_where_named_and_dropped_where_own(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "other.cache"
    file.write_bytes(b"of another")
    host()
    build(Timing(), tmp_path)
    (own,) = (tmp_path / "timing").iterdir()
    own.write_bytes(b"of another")
    monkeypatch.setattr(
        Thing, "_call", _answering("set_timing_cache", answer=False, only_for=b"of another")
    )

    with pytest.raises(IncompatibleError, match=r"other\.cache' holds no measurements of TensorRT"):
        build(Timing(path=file))
    assert file.read_bytes() == b"of another"

    recording = host()
    build(Timing(), tmp_path)
    taken = [args[0] for args in given(recording, "IBuilderConfig.create_timing_cache")]
    assert taken[:3] == [b"of another", b"", MEASURED]
    assert own.read_bytes() == MEASURED


def _answering(method: str, *, answer: Any, only_for: bytes | None = None) -> Any:
    """`Thing._call` with another answer of a method, perhaps only to some measurements."""
    whole = Thing._call
    held: list[Any] = [None]

    def call(self: Any, name: str, overloads: Any, args: tuple[Any, ...], more: Any) -> Any:
        made = whole(self, name, overloads, args, more)
        if name == "create_timing_cache":
            held[0] = args[0]
        wrong = name == method and only_for in (None, held[0])
        return answer if wrong else made

    return call


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        ("no GPU was found", "and here no GPU was found"),
        (
            Gpu(name="NVIDIA A100", capability="8.0", driver="13.0", memory_bytes=1),
            "and here NVIDIA A100 has 8.0",
        ),
    ],
)
def test_a_host_without_such_a_gpu_is_refused(host: Host, gpu: Gpu | str, told: str) -> None:
    recording = host(gpu=gpu)
    with pytest.raises(IncompatibleError, match="times its kernels on a GPU of compute") as caught:
        build(Timing())

    assert told in caught.value.problem
    assert "--engine cuda" in str(caught.value.hint)
    assert recording.calls == []


class Selecting(StandardBackend):
    """Chooses tactics by hand, which version 11 has no more."""

    __slots__ = ()

    def _aim(self, config: Any, target: Target) -> None:
        super()._aim(config, target)
        config.algorithm_selector = None


def test_a_removed_way_to_choose_tactics_is_named(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, fails in zip(VERSIONS, (False, True), strict=True):
        recording = host(version)
        monkeypatch.setattr(tensorrt_code, "backend", lambda _, r=recording: Selecting(r))
        if not fails:
            build(Timing())
            continue
        with pytest.raises(AttributeError, match=r"IBuilderConfig .* has no 'algorithm_selector'"):
            build(Timing())


@pytest.mark.parametrize(
    ("kind", "request_", "told"),
    [
        ("tensorrt", {"target": "spark", "timing_cache": Path("x")}, "'tensorrt' for 'spark'"),
        ("cuda", {"target": "h20", "timing_cache": Path("x")}, "'cuda' for 'h20'"),
        ("onnx", {"target": "cpu", "lock_tactics": True}, "--lock-tactics is for standard"),
        ("tensorrt", {"target": "h20", "lock_tactics": True}, "and none is named"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    kind: Any, request_: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError) as caught:
        refuse(kind, Request(**request_))
    assert told in caught.value.problem


@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_must_hold_measurements_and_does_not_is_named(
    host: Host, tmp_path: Path, *, there: bool
) -> None:
    file = tmp_path / "none.cache"
    if there:
        file.write_bytes(b"")
    host()
    with pytest.raises(LingcError, match=r"none\.cache' holds nothing"):
        build(Timing(path=file, locked=True))


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_built(
    host: Host, tmp_path: Path
) -> None:
    recording = host()
    with pytest.raises(ResourceError, match=r"absent/h20\.cache"):
        build(Timing(path=tmp_path / "absent" / "h20.cache"))
    assert recording.calls == []
