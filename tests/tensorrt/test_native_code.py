"""The C++ plugins evaluate plugin tables as Python's do, and name what is wrong."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lingc.engine import canonical
from lingc.launch_table import Counted, Place, TableLaunch
from lingc.plugin_table import Axis, PluginTable, to_value
from lingc.runtime.tensorrt_plugin import timing_id
from tests.tensorrt.native_code import (
    STREAM,
    Evaluator,
    at_hand,
    bundle,
    compiled,
    expected,
    has_compiler,
    of_tiny,
    shapes_of,
    small_table,
)

pytestmark = has_compiler

CASES = [
    ("spark", "int4-all"),
    pytest.param("rtx-120", "bf16", marks=pytest.mark.long),
    pytest.param("rtx-89", "fp8", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("native"))


@pytest.fixture
def start(program: Path) -> Iterator[Callable[..., Evaluator]]:
    made: list[Evaluator] = []

    def begin(folder: Path, **variables: str) -> Evaluator:
        made.append(Evaluator(program, folder, **variables))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def told(evaluator: Evaluator, call: dict[str, Any]) -> list[Any]:
    """What reaches the driver, loading apart: that is once a kernel."""
    return [one for one in evaluator(**call) if "load" not in one and "attribute" not in one]


def request(
    table: PluginTable, number: int, sizes: tuple[int, ...], digest: str, *, other: int = 33,
    in_place: bool = False, base: int = 1 << 40,
) -> dict[str, Any]:  # fmt: skip
    call = table.calls[number]
    inputs = [base + (i << 32) for i in range(len(call.inputs))]
    outputs = [
        inputs[one.place] if in_place and one.place >= 0 else base + (1 << 50) + (i << 32)
        for i, one in enumerate(call.outputs)
    ]
    return {
        "table": digest, "call": number, "shapes": shapes_of(call, sizes, other),
        "inputs": inputs, "outputs": outputs, "places": [base >> 1, STREAM],
    }  # fmt: skip


@pytest.mark.parametrize(("target", "precision"), CASES)
def test_every_plugin_of_the_shipped_checkpoint_launches_what_pythons_does(
    target: str, precision: str, tmp_path: Path, start: Callable[..., Evaluator]
) -> None:
    table, binaries = of_tiny(target, precision)
    digest = bundle(tmp_path, table, binaries)
    evaluator, launches = start(tmp_path), 0
    for number, call in enumerate(table.calls):
        for sizes in call.choices:
            for in_place in (False, True):
                asked = request(table, number, sizes, digest, in_place=in_place)
                got = told(evaluator, asked)
                assert got == expected(table, binaries, asked), (call.op, sizes)
                launches += sum("launch" in one for one in got)

    assert launches > 2 * len(table.tactics)


@pytest.fixture(scope="module")
def small(
    program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Evaluator, str]]:
    folder = tmp_path_factory.mktemp("small")
    digest = bundle(folder, *small_table())
    evaluator = Evaluator(program, folder)
    yield evaluator, digest
    evaluator.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    slots=st.integers(1, 1 << 20), rows=st.integers(1, 1 << 31), large=st.booleans(),
    in_place=st.booleans(), base=st.integers(1, 1 << 47),
)  # fmt: skip
def test_operands_follow_the_runtimes_sizes(
    slots: int, rows: int, *, large: bool, in_place: bool, base: int, small: tuple[Evaluator, str]
) -> None:
    table, binaries = small_table()
    evaluator, digest = small
    asked = request(table, 0, (4, 64), digest, in_place=in_place, base=base)
    asked["shapes"] = [[8 if large else 4, 64], [slots], [rows, 3]]
    want = 3 * (slots - 1) - 2 * ((rows - 1) // 16) + 7
    if not -(1 << 31) <= want < 1 << 31:
        assert "argument 1 of kernel is not of the type" in told(evaluator, asked)[-1]["error"]
        return
    got = told(evaluator, asked)

    assert got == expected(table, binaries, asked)
    assert got[0]["workspace"] == 256 + 512 + 256
    assert [one for one in got if "clear" in one] == [
        {"clear": [(base >> 1) + 768, 12, 0], "stream": STREAM}
    ]
    assert [one["dependent"] for one in got if "launch" in one] == [0, 1, 0]
    assert sum("copy" in one for one in got) == (not in_place)


def test_a_kernel_is_loaded_once_and_given_the_shared_memory_that_it_needs(
    tmp_path: Path, start: Callable[..., Evaluator]
) -> None:
    table, binaries = small_table()
    digest = bundle(tmp_path, table, binaries)
    evaluator = start(tmp_path)
    asked = request(table, 0, (4, 64), digest)
    first = evaluator(**asked)

    assert [one["load"].partition(":")[0] for one in first if "load" in one] == ["k50", "k7"]
    assert [one for one in first if "attribute" in one] == [{"attribute": 8, "value": 50 * 1024}]
    assert not any("load" in one for one in evaluator(**asked))


def _launch(table: PluginTable, **more: Any) -> PluginTable:
    tactic = table.tactics[0]
    launches = (replace(tactic.launches[0], **more), *tactic.launches[1:])
    return replace(table, tactics=(replace(tactic, launches=launches),))


def _operands(table: PluginTable, index: int, value: Any) -> PluginTable:
    launch: TableLaunch = table.tactics[0].launches[0]
    operands = (*launch.operands[:index], value, *launch.operands[index + 1 :])
    return _launch(table, operands=operands)


def _tactic(table: PluginTable, **more: Any) -> PluginTable:
    return replace(table, tactics=(replace(table.tactics[0], **more),))


def _output(table: PluginTable, **more: Any) -> PluginTable:
    first, *others = table.calls[0].outputs
    return _call(table, outputs=(replace(first, **more), *others))


def _call(table: PluginTable, **more: Any) -> PluginTable:
    return replace(table, calls=(replace(table.calls[0], **more),))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: replace(t, format=3), "it has format 3, this library reads 2"),
        (lambda t: replace(t, page_size=0), "its page size is 0"),
        (lambda t: replace(t, target=7), "a value is not a text"),
        (lambda t: _launch(t, kernel=2), "there is no kernel 2"),
        (lambda t: _launch(t, grid=(0, 1, 1)), "a grid of 0 blocks"),
        (lambda t: _launch(t, operands=()), "kernel takes 8 arguments, the table has 0"),
        (lambda t: _operands(t, 0, 7), "argument 0 of kernel is not of the type that it takes"),
        (lambda t: _operands(t, 1, 1.5), "argument 1 of kernel is not of the type"),
        (lambda t: _operands(t, 1, 1 << 31), "argument 1 of kernel is not of the type"),
        (lambda t: _operands(t, 3, None), "argument 3 of kernel is not of the type"),
        (lambda t: _call(t, choices={(8, 64): 1}), "there is no tactic 1"),
        (lambda t: _call(t, inputs=t.calls[0].inputs[:2]), "there is no input 2"),
        (lambda t: _output(t, shape=(1,) * 9), 'output "y" has 9 axes, TensorRT has 8'),
        (lambda t: _tactic(t, workspaces=(("v", -1),)), "a workspace of -1 bytes"),
        (lambda t: _tactic(t, counters=(("c", 1 << 62),)), f"a workspace of {1 << 62} bytes"),
        (lambda t: _call(t, inputs=(("x", "f64", 2),)), 'there is no element type "f64"'),
        (
            lambda t: _tactic(t, workspaces=(("v", 1 << 40), ("w", 1 << 40))),
            f"workspaces of {(2 << 40) + 256} bytes",
        ),
        (lambda t: _output(t, shape=(4, -1)), 'output "y" has a size of -1'),
        (lambda t: _output(t, shape=(1 << 62,)), f"64 bits do not hold 2 * {1 << 62}"),
        (
            lambda t: _call(t, axes=(Axis(0, 0, 1 << 62), Axis(0, 1))),
            f"64 bits do not hold 4 * {1 << 62}",
        ),
        (lambda t: _operands(t, 1, Counted(1 << 62, 0, 0)), f"64 bits do not hold {1 << 62} * 32"),
        (lambda t: _operands(t, 1, Counted(0, 0, 1 << 62)), "argument 1 of kernel is not of"),
        (
            lambda t: _operands(t, 2, Counted(1, 0, (1 << 63) - 1)),
            f"64 bits do not hold 32 + {(1 << 63) - 1}",
        ),
        (
            lambda t: _operands(t, 5, Place("counter", (1 << 63) - 1)),
            f"64 bits do not hold 768 + {(1 << 63) - 1}",
        ),
    ],
)  # fmt: skip
def test_a_table_that_is_wrong_is_named(
    change: Callable[[PluginTable], PluginTable], problem: str, tmp_path: Path,
    start: Callable[..., Evaluator],
) -> None:  # fmt: skip
    table, binaries = small_table()
    digest = bundle(tmp_path, change(table), binaries)
    (*_, last) = start(tmp_path)(**request(table, 0, (4, 64), digest))

    assert problem in last["error"]


CHANGES: list[tuple[bool, Callable[[PluginTable], PluginTable]]] = [
    (False, lambda t: t),
    (False, lambda t: replace(t, target="other", calls=(t.calls[0], *t.calls))),
    (False, lambda t: replace(t, tactics=(*t.tactics, t.tactics[0]))),
    (False, lambda t: _operands(t, 3, 1e-5)),
    (False, lambda t: _call(t, literals={}, choices={(16, 64): 0, (8, 64): 0})),
    (True, lambda t: replace(t, arch="sm_90a")),
    (True, lambda t: replace(t, page_size=32)),
    (True, lambda t: replace(t, images=(t.images[1], t.images[0]))),
    (True, lambda t: _launch(t, grid=(6, 2, 1))),
    (True, lambda t: _launch(t, cluster=(1, 1, 1))),
    (True, lambda t: _launch(t, dependent=False)),
    (True, lambda t: _operands(t, 0, Place("x", 33))),
    (True, lambda t: _operands(t, 1, Counted(3, -2, 8))),
    (True, lambda t: _operands(t, 2, 1 << 41)),
    (True, lambda t: _tactic(t, workspaces=(("v", 100), ("w", 301)))),
    (True, lambda t: _tactic(t, counters=(("counter", 16),))),
    (True, lambda t: _output(t, place=-1)),
    (True, lambda t: _call(t, choices={(8, 64): 0})),
    (True, lambda t: _call(t, axes=(Axis(0, 0), Axis(0, 1)))),
    (True, lambda t: _call(t, slots=None)),
    (True, lambda t: _call(t, op="other")),
]  # fmt: skip
"""Whether a call takes another time then, as far as it is known; and what is changed."""


def test_a_time_is_kept_under_what_is_launched(
    tmp_path: Path, start: Callable[..., Evaluator]
) -> None:
    """Wherever the call stands, and of the same bytes in both languages."""
    table, _ = small_table()
    evaluator, known = start(tmp_path), timing_id(table, table.calls[0])
    assert known.startswith("op-")
    for is_other, change in CHANGES:
        changed = change(table)
        digest = bundle_of(tmp_path, changed, b"none")
        (first, *_) = evaluator(**request(table, 0, (8, 64), digest))

        assert first["timing"] == timing_id(changed, changed.calls[0])
        assert (first["timing"] != known) == is_other


def _damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "variables", "problem"),
    [
        (lambda t, _k: t.unlink(), {}, 'it is not in ".*"; LINGC_PLUGINS names the folder'),
        (lambda t, _k: _damaged(t), {}, r"plugin table [0-9a-f]{64}\.json: it is not what it was"),
        (lambda _t, k: k.unlink(), {}, r"kernel [0-9a-f]{64}\.kernel: it is not in"),
        (lambda _t, k: _damaged(k), {}, r"kernel [0-9a-f]{64}\.kernel: it is not what it was"),
        (lambda _t, _k: None, {"LD_LIBRARY_PATH": ""}, "no NVIDIA driver|answered"),
        (lambda _t, _k: None, {"FAKE_CUDA_FAILS": "cuCtxGetCurrent"}, "no CUDA device is current"),
        (
            lambda _t, _k: None,
            {"FAKE_CUDA_FAILS": "cuModuleLoadData"},
            "cuModuleLoadData of kernel answered CUDA_ERROR_ILLEGAL_ADDRESS",
        ),
        (
            lambda _t, _k: None,
            {"FAKE_CUDA_FAILS": "cuLaunchKernelEx"},
            "cuLaunchKernelEx of kernel answered CUDA_ERROR_ILLEGAL_ADDRESS",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    harm: Callable[[Path, Path], None], variables: dict[str, str], problem: str, tmp_path: Path,
    start: Callable[..., Evaluator],
) -> None:  # fmt: skip
    table, binaries = small_table()
    digest = bundle(tmp_path, table, binaries)
    harm(tmp_path / f"{digest}.json", tmp_path / f"{table.images[1]}.kernel")
    (*_, last) = start(tmp_path, **variables)(**request(table, 0, (4, 64), digest))

    assert re.search(problem, last["error"]), last


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_table_of_other_bytes_is_refused_or_evaluated_but_never_crashes(
    broken: tuple[Evaluator, Path], data: st.DataObject
) -> None:
    evaluator, folder = broken
    raw = bytearray(canonical.encode(to_value(small_table()[0])))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw) - 1))
        end = start + data.draw(st.integers(0, 6))
        raw[start:end] = data.draw(st.sampled_from(PIECES))
    digest = hashlib.sha256(raw).hexdigest()
    (folder / f"{digest}.json").write_bytes(raw)
    found = evaluator(**request(small_table()[0], 0, (4, 64), digest))

    assert found[-1].get("error", "not empty")


PIECES = [
    b"", b"0", b"9", b"-", b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\\u12", b"1e9", b"null",
    b"true", b"9999999999999999999", b'{"at":"x"}', b"\0", b"\xff",
]  # fmt: skip


@pytest.fixture(scope="module")
def broken(
    program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Evaluator, Path]]:
    folder = tmp_path_factory.mktemp("broken")
    bundle(folder, *small_table())
    evaluator = Evaluator(program, folder)
    yield evaluator, folder
    evaluator.close()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda _k: b"", "it is no kernel"),
        (lambda k: b"other" + k, "it is no kernel"),
        (lambda k: k[:60], "its header is cut off"),
        (lambda k: k.replace(b"i32:16", b"i33:16"), 'it takes a "i33:16", which is unknown'),
        (lambda k: k.replace(b'"threads":128', b'"threads":-28'), "its header has -28"),
    ],
)
def test_a_kernel_that_is_none_is_named(
    harm: Callable[[bytes], bytes], problem: str, tmp_path: Path, start: Callable[..., Evaluator]
) -> None:
    table, binaries = small_table()
    image = harm(binaries[0].to_bytes())
    name = hashlib.sha256(image).hexdigest()
    changed = replace(table, images=(name, table.images[1]))
    digest = bundle_of(tmp_path, changed, image)
    found = start(tmp_path)(**request(table, 0, (4, 64), digest))

    assert re.search(rf"kernel {name}\.kernel: ({problem})", found[-1]["error"]), found


def bundle_of(folder: Path, table: PluginTable, image: bytes) -> str:
    """Write a table as it is, and one kernel; the table's digest."""
    data = canonical.encode(to_value(table))
    (folder / f"{hashlib.sha256(image).hexdigest()}.kernel").write_bytes(image)
    digest = hashlib.sha256(data).hexdigest()
    (folder / f"{digest}.json").write_bytes(data)
    return digest


def test_sizes_that_a_table_has_not_and_wrong_inputs_are_named(
    small: tuple[Evaluator, str],
) -> None:
    evaluator, digest = small
    table, _ = small_table()
    asked = request(table, 0, (4, 64), digest)
    for shapes, problem in (
        ([[5, 64], [3], [9, 3]], "no launches for sizes 10x64; pad the step .*: 8x64, 16x64"),
        ([[4, 64], [3]], "it takes 3 inputs and has 2"),
        ([[4, 64], [3], [9]], 'input "rows" has 1 axes, 2 are wanted'),
        ([[4, 64], [-1], [9, 3]], 'input "y" has a size of -1'),
    ):
        (*_, last) = evaluator(**{**asked, "shapes": shapes})
        assert re.search(problem, last["error"]), last
    (*_, last) = evaluator(**{**asked, "table": "../" + digest[3:]})
    assert "is no SHA-256" in last["error"]


def test_a_kernel_for_another_architecture_is_named(
    tmp_path: Path, start: Callable[..., Evaluator]
) -> None:
    table, binaries = small_table()
    others = (binaries[0], replace(binaries[1], arch="sm_90a"))
    changed, _ = at_hand(table, others)
    digest = bundle(tmp_path, changed, others)
    (*_, last) = start(tmp_path)(**request(table, 0, (4, 64), digest))

    assert "is compiled for sm_90a, the table is for test" in last["error"]
