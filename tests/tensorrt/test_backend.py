"""The runtime of TensorRT engines, on networks that are walked in host memory."""

import hashlib
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lingc.engine import canonical
from lingc.errors import IncompatibleError, IntegrityError, LingcError, ResourceError, UsageError
from lingc.launch_table import Bucket
from lingc.parity.engine import EngineSide
from lingc.parity.side import MODES, Mode
from lingc.plugin_table import from_value, to_value
from lingc.runtime.backend import Backend, Keeping, Limits
from lingc.runtime.tensorrt_backend import TensorrtBackend
from lingc.runtime.tensorrt_package import TensorrtCode, check_engine, read_code
from lingc.targets.tensorrt.profile import sizes
from tests.evaluate import one_thread
from tests.runtime.host_device import HostDevice
from tests.tensorrt.engines import has_rtx, networks, plan, plugins, rows, weights

TARGET, PRECISION = "spark", "int4-all"
VERSION = "1.7.1.116"
LIMITS = Limits(slots=2, pages=4)


def code(precision: str = PRECISION) -> TensorrtCode:
    made, table = plan(TARGET, precision), plugins(TARGET, precision)
    buckets = tuple(
        Bucket(phase=one.phase, sizes=one.axes, tactics=(), offsets=(), scratch=(), arena_bytes=0)
        for one in sizes(made)
    )

    def none(_index: int) -> Any:
        raise AssertionError("walked engines launch nothing")

    return TensorrtCode(
        plan=made,
        module="tensorrt_rtx",
        version=VERSION,
        table=table.table,
        digest=table.digest,
        engines={phase: phase.encode for phase in made.programs},
        buckets=buckets,
        kernel=none,
    )


def library(device: HostDevice, version: str = VERSION, precision: str = PRECISION) -> Any:
    from tests.tensorrt.walked import Library  # noqa: PLC0415 (needs TensorRT)

    lowering, made = networks(TARGET, precision)
    return Library(lowering.plan, made, lowering.backend.trt, device, version)


def started(
    device: HostDevice,
    *,
    limits: Limits = LIMITS,
    version: str = VERSION,
    precision: str = PRECISION,
) -> TensorrtBackend:
    trt = library(device, version, precision)
    held = weights(TARGET, precision)
    return TensorrtBackend(code(precision), held, limits, threads=1, device=device, trt=trt)


def gpu(**facts: Any) -> HostDevice:
    return HostDevice(**{"capability": (12, 1), **facts})


# -------------------------------------------------------------------------------------------- runs


@has_rtx
@pytest.mark.parametrize(
    ("precision", "modes"),
    [(PRECISION, MODES), ("fp8-static", ("decode",))],
    ids=["weights inside", "scales inside"],
)
def test_every_mode_is_the_walk_of_its_networks(precision: str, modes: Sequence[Mode]) -> None:
    from lingc.targets.tensorrt.interpret import NetworkBackend  # noqa: PLC0415

    lowering, made = networks(TARGET, precision)
    tokens = rows(2, 9)
    device = gpu()
    with one_thread():
        backend: Backend = started(device, precision=precision)
        for mode in modes:
            got = EngineSide(backend, "tensorrt", chunk=8).score(tokens, mode)
            held = weights(TARGET, precision)
            walk = NetworkBackend(
                lowering.plan, made, lowering.backend.trt, held, LIMITS, rounded=True
            )
            want = EngineSide(walk, "walk", chunk=8).score(tokens, mode)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a.logits, b.logits, atol=0.05, err_msg=mode)
        backend.close()

    assert device.replays > 0
    assert device.blocks == {}


@has_rtx
def test_slots_and_rows_are_saved_and_put_back() -> None:
    backend = started(gpu())
    assert isinstance(backend, Keeping)
    with one_thread():
        EngineSide(backend, "tensorrt", chunk=8).score(rows(2, 9), "decode")
    saved, kept = backend.save_slot(0), backend.save_rows(np.arange(3))
    backend.load_slot(1, saved)
    backend.load_rows(np.arange(64, 67), kept)

    for name, value in saved.items():
        np.testing.assert_array_equal(backend.save_slot(1)[name], value)
    for name, value in kept.items():
        np.testing.assert_array_equal(backend.save_rows(np.arange(64, 67))[name], value)
    with pytest.raises(UsageError, match="slot 2 is not one of 2"):
        backend.save_slot(2)
    backend.close()


@has_rtx
def test_what_no_profile_holds_is_named_before_tensorrt_is_called() -> None:
    backend = started(gpu())
    tokens = 5000
    inputs = {
        "token_ids": np.zeros(tokens, np.int32), "positions": np.arange(tokens, dtype=np.int32),
        "offsets": np.array([0, tokens], np.int32), "slots": np.zeros(1, np.int32),
        "cache_rows": np.full(tokens, -1, np.int32), "page_table": np.zeros((1, 80), np.int32),
        "logit_rows": np.zeros(1, np.int32),
    }  # fmt: skip
    with pytest.raises(UsageError, match="no prefill bucket of the engine holds T = 5000"):
        backend.run("prefill", inputs)
    with pytest.raises(UsageError, match="the engine has no phase 'train'"):
        backend.run("train", inputs)
    backend.close()


# ---------------------------------------------------------------------------------------- refusals


@has_rtx
@pytest.mark.parametrize(
    ("device", "version", "error", "told"),
    [
        (gpu(), "1.7.2.0", IncompatibleError, "written by tensorrt_rtx 1.7.1.116, installed is"),
        (
            gpu(capability=(9, 0)),
            VERSION,
            IncompatibleError,
            r"for 'spark' \(compute capability 12.1\); Host GPU has compute capability 9.0",
        ),
        (gpu(memory=64 << 20), VERSION, ResourceError, "of device memory: weights"),
    ],
)
def test_an_engine_is_refused_before_tensorrt_sees_it(
    device: HostDevice, version: str, error: type[LingcError], told: str
) -> None:
    trt = library(device, version)
    with pytest.raises(error, match=told):
        TensorrtBackend(
            code(), weights(TARGET, PRECISION), LIMITS, threads=1, device=device, trt=trt
        )

    assert trt.seen == []
    assert device.blocks == {}


def test_a_device_that_is_refused_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu(capability=(9, 0))
    monkeypatch.setattr("lingc.runtime.tensorrt_backend.Device", lambda: device)
    with pytest.raises(IncompatibleError, match=r"has compute capability 9\.0"):
        TensorrtBackend(code(), {}, LIMITS, trt=SimpleNamespace(__version__=VERSION))

    assert device.is_closed


def rtx_engine(size: int | None = None, version: tuple[int, ...] = (1, 7, 1, 116)) -> bytes:
    """The beginning of an engine as TensorRT for RTX writes it."""
    length = 64 if size is None else size
    data = b"vtrt" + bytes(12) + length.to_bytes(8, "little") + bytes(version)
    return data + bytes(64 - len(data))


def test_a_cut_or_foreign_engine_is_named() -> None:
    check_engine("decode", rtx_engine(), VERSION)
    check_engine("decode", b"an engine of standard TensorRT", VERSION)
    with pytest.raises(IntegrityError, match="says that it has 100 bytes, and has 64"):
        check_engine("decode", rtx_engine(100), VERSION)
    with pytest.raises(IncompatibleError, match=r"written by TensorRT 1\.6\.1\.120, installed"):
        check_engine("decode", rtx_engine(version=(1, 6, 1, 120)), VERSION)


@has_rtx
@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (rtx_engine(100), IntegrityError, "the prefill engine says that it has 100 bytes"),
        (
            rtx_engine(version=(1, 6, 1, 120)),
            IncompatibleError,
            r"the prefill engine was written by TensorRT 1\.6\.1\.120",
        ),
    ],
)
def test_such_an_engine_never_reaches_tensorrt(
    data: bytes, error: type[LingcError], told: str
) -> None:
    device = gpu()
    trt, made = library(device), code()
    engines = {phase: lambda: data for phase in made.engines}
    with pytest.raises(error, match=told):
        TensorrtBackend(replace(made, engines=engines), {}, LIMITS, device=device, trt=trt)

    assert trt.seen == []
    assert device.blocks == {}


@has_rtx
def test_a_real_engine_says_its_size_and_version() -> None:
    made, found = networks("rtx-120", "bf16")
    engine = made.engine(found["draft"])

    check_engine("draft", engine, VERSION)
    with pytest.raises(IntegrityError, match="it was cut off"):
        check_engine("draft", engine[:-1], VERSION)
    with pytest.raises(IncompatibleError, match="was written by TensorRT"):
        check_engine("draft", engine, "1.6.1.120")


class Held:
    """A package's files and facts in memory."""

    def __init__(self) -> None:
        made, table = plan(TARGET, PRECISION), plugins(TARGET, PRECISION)
        self.plan = made
        self.files = {f"variants/{TARGET}/plugins.json.xz": table.data}
        self.kernels = {f"kernels/{digest}.xz" for digest in table.kernels}
        self.info: dict[str, Any] = {
            "module": "tensorrt_rtx",
            "tensorrt": VERSION,
            "table": "plugins.json.xz",
            "table_sha256": table.digest,
            "engines": {phase: f"{phase}.engine" for phase in made.programs},
            "calls": {
                phase: [n for n in numbers if n is not None]
                for phase, numbers in table.numbers.items()
            },
            "buckets": [{"phase": one.phase, "sizes": dict(one.axes)} for one in sizes(made)],
        }

    def code(self) -> Any:
        return SimpleNamespace(info=self.info, target=TARGET)

    def read(self, path: str) -> bytes:
        return self.files[path]

    def names(self, _role: str) -> tuple[str, ...]:
        return tuple(self.kernels)

    def change_table(self, change: Callable[[dict[str, Any]], None], *, told: bool = True) -> None:
        """Write another table; `told` says whether the facts know of it."""
        value: dict[str, Any] = to_value(plugins(TARGET, PRECISION).table)
        change(value)
        data = canonical.encode(value)
        self.files[f"variants/{TARGET}/plugins.json.xz"] = lzma.compress(data)
        if told:
            self.info["table_sha256"] = hashlib.sha256(data).hexdigest()


def test_a_whole_package_reads() -> None:
    held = Held()
    read = read_code(held)  # type: ignore[arg-type]

    assert read.table == plugins(TARGET, PRECISION).table
    assert read.table == from_value(to_value(read.table))
    assert {bucket.phase for bucket in read.buckets} == {*held.plan.programs}


def test_a_package_for_several_targets_is_read_as_the_one_that_was_chosen() -> None:
    """They share a plan, which names one of them."""
    held = Held()
    held.plan = replace(held.plan, target="rtx-89")

    assert read_code(held).target == TARGET  # type: ignore[arg-type]


@has_rtx
def test_an_engine_of_a_package_for_several_targets_runs_on_each() -> None:
    shared = code()
    shared = replace(shared, plan=replace(shared.plan, target="rtx-89"))
    device = gpu()
    held = weights(TARGET, PRECISION)
    TensorrtBackend(shared, held, LIMITS, threads=1, device=device, trt=library(device)).close()
    with pytest.raises(IncompatibleError, match=r"is for 'spark' \(compute capability 12\.1\)"):
        TensorrtBackend(
            shared, held, LIMITS, threads=1, device=gpu(capability=(8, 9)), trt=library(device)
        )


def changed_call(**more: Any) -> Callable[[Held], None]:
    """Of the call of `router`."""

    def change(value: dict[str, Any]) -> None:
        next(one for one in value["calls"] if one["op"] == "router").update(more)

    return lambda held: held.change_table(change)


def unknown_operand(value: dict[str, Any]) -> None:
    index = next(one for one in value["calls"] if one["op"] == "router")["choices"][0][-1]
    value["tactics"][index]["launches"][0]["operands"][0] = {"at": "nothing"}


def changed_tactic(**more: Any) -> Callable[[Held], None]:
    """Of the first one, and its first launch where that has such a field."""

    def change(value: dict[str, Any]) -> None:
        tactic = value["tactics"][0]
        for name, one in more.items():
            (tactic if name in tactic else tactic["launches"][0])[name] = one

    return lambda held: held.change_table(change)


def _with_phase(name: str) -> Callable[[Held], None]:
    def change(held: Held) -> None:
        programs = held.plan.programs
        held.plan = replace(held.plan, programs={**programs, name: programs["decode"]})
        held.info["engines"][name] = "decode.engine"

    return change


def _changes() -> Mapping[str, tuple[Callable[[Held], None], type[LingcError], str]]:
    def table(**more: Any) -> Callable[[Held], None]:
        return lambda held: held.change_table(lambda value: value.update(more))

    return {
        "of another build": (
            lambda held: held.change_table(lambda v: v.update(page_size=32), told=False),
            IntegrityError,
            "launch from table .*… the package holds|which is of another build",
        ),
        "newer": (table(format=3), IncompatibleError, "has format 3, this version reads 2"),
        "contents are missing": (table(images=[]), IntegrityError, "and the contents of 0"),
        "of another target": (table(target="rtx-89"), IntegrityError, "is for 'rtx-89'"),
        "not a table": (table(calls=7), IncompatibleError, "plugin table cannot be read"),
        "a kernel is missing": (
            lambda held: held.kernels.pop() and None,
            IntegrityError,
            "launch 1 kernels that the package does not hold",
        ),
        "a plugin is missing": (
            lambda held: held.info["calls"]["decode"].append(999),
            IntegrityError,
            "the decode engine has plugin 999, the table has",
        ),
        "a phase is missing": (
            lambda held: held.info["engines"].pop("verify") and None,
            IntegrityError,
            "there is no engine for the phases verify",
        ),
        "a phase that is none": (
            lambda held: held.info["engines"].update({"../../up": "decode.engine"}),
            IntegrityError,
            "has an engine of '../../up', which is no phase of its plan",
        ),
        "a phase that is none, in the plan too": (
            _with_phase("/up"),
            IntegrityError,
            "has an engine of '/up', which is no phase of its plan",
        ),
        "no facts": (lambda held: held.info.clear(), IntegrityError, "facts of the 'spark'"),
        "another input": (
            changed_call(axes=[[3, 0, 1]]),
            IntegrityError,
            "router: it reads a size",
        ),
        "another axis": (changed_call(axes=[[0, -1, 1]]), IntegrityError, "a size from Axis"),
        "no axis": (changed_call(slots=[0, "0", 1]), IntegrityError, "a size from Axis"),
        "no rank": (
            changed_call(inputs=[["x", "bf16", "2"]]),
            IntegrityError,
            "router: it cannot be read",
        ),
        "no tactic": (changed_call(choices=[[16, "0"]]), IntegrityError, "names tactic '0'"),
        "no sizes": (changed_call(choices=[["16", 0]]), IntegrityError, "are not 1 numbers"),
        "too many sizes": (changed_call(choices=[[1, 1, 0]]), IntegrityError, "are not 1 numbers"),
        "an operand that is none": (
            lambda held: held.change_table(unknown_operand),
            IntegrityError,
            "router: a launch takes 'nothing', which is not there",
        ),
        "a kernel that is none": (
            changed_tactic(kernel=-1),
            IntegrityError,
            r"tactic 0, \w+: there is no kernel -1",
        ),
        "no grid": (changed_tactic(grid=[0, 1, 1]), IntegrityError, r"the grid \(0, 1, 1\)"),
        "a workspace of less than nothing": (
            changed_tactic(workspaces=[["w", -1]]),
            IntegrityError,
            "the workspace 'w' is of -1 bytes",
        ),
        "workspaces that no device has": (
            changed_tactic(workspaces=[["v", 1 << 40], ["w", 1]]),
            IntegrityError,
            f"its workspaces are of {(1 << 40) + 1} bytes",
        ),
        "a number of more than 64 bits": (
            changed_tactic(operands=[1 << 63]),
            IntegrityError,
            f"a launch takes {1 << 63}, which is no operand",
        ),
        "a text for a number": (
            changed_tactic(operands=[{"slots": "1", "pages": 0, "plus": 0}]),
            IntegrityError,
            "which is no operand",
        ),
        "tactics are missing": (table(tactics=[]), IntegrityError, "which is not there"),
    }


@pytest.mark.parametrize("name", _changes())
def test_a_damaged_package_is_named(name: str) -> None:
    change, error, told = _changes()[name]
    held = Held()
    change(held)
    with pytest.raises(error, match=told):
        read_code(held)  # type: ignore[arg-type]


def test_sizes_that_a_table_has_not_are_named() -> None:
    table = plugins(TARGET, PRECISION).table
    call = next(one for one in table.calls if one.op == "router")
    with pytest.raises(UsageError, match=r"plugin 'router' has no launches for sizes \[7\]"):
        table.tactic(call, [(7, 256), (16, 256), (16,)])
    assert replace(call, choices={}).choices == {}
