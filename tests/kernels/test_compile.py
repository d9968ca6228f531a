"""Kernels of every op compile ahead of time, for every architecture that has what they need."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lingc import targets
from lingc.kernel import Kernel, Tactic
from lingc.op import Op, type_of
from lingc.plugins.table import OPS
from lingc.targets.cuda.binaries import FEATURES, compile_all, compile_kernel, missing_features

H200 = targets.get("h200-sxm")
WITH_KERNELS = [op for op in OPS.values() if op.benchmarks]


def _types(op: Op, case: tuple[Any, ...]) -> list[Any]:
    return [type_of(value) for value in op.inputs(*case, dtype="bf16", device="meta")]


@cache
def _tactics(op: Op) -> tuple[tuple[str, Tactic], ...]:
    """Tactics of an op's cases and benchmarks, with what they are for."""
    found: list[tuple[str, Tactic]] = []
    work = [(str(case), case) for case in op.cases]
    work += [(f"{b.name}, {n} tokens", b.case(n)) for b in op.benchmarks for n in b.tokens]
    for label, case in work:
        types = _types(op, case)
        if op.refusal(H200, *types) is None:
            found += [(label, tactic) for tactic in op.tactics(H200, *types)]
    return tuple(found)


def _kernels(op: Op) -> Iterator[Kernel]:
    for _, tactic in _tactics(op):
        for launch in tactic.launches:
            yield launch.kernel


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_every_benchmark_has_a_tactic(op: Op) -> None:
    for benchmark in op.benchmarks:
        for tokens in benchmark.tokens:
            types = _types(op, benchmark.case(tokens))
            reason = op.refusal(H200, *types)

            assert reason is None, f"{benchmark.name}, {tokens} tokens: {reason}"
            assert op.tactics(H200, *types), f"{benchmark.name}, {tokens} tokens"


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_tactics_for_one_shape_have_names_of_their_own_and_launches_that_fit(op: Op) -> None:
    for label, tactic in _tactics(op):
        assert tactic.launches, f"{label}: {tactic.name}"
        for launch in tactic.launches:
            assert all(size >= 1 for size in launch.grid), f"{label}: {tactic.name}"
            assert launch.grid[1] < 1 << 16, f"{label}: {tactic.name}"
            assert launch.grid[2] < 1 << 16, f"{label}: {tactic.name}"
            assert launch.kernel.shared_bytes <= (H200.smem_per_block_bytes or 0), tactic.name
        names = {space.name for space in tactic.workspaces}
        assert not names & {*op.arguments, *op.results}, f"{tactic.name} hides an argument"


@pytest.mark.parametrize("op", WITH_KERNELS, ids=lambda op: op.name)
def test_a_sample_compiles(op: Op, tmp_path: Path) -> None:
    """The first kernel of each source; all of them are in the long test."""
    first = {kernel.source: kernel for kernel in reversed(list(_kernels(op)))}

    made = compile_all(first.values(), "sm_90a", tmp_path, jobs=1)

    assert len(made) == len(set(first.values()))


@pytest.mark.long
@pytest.mark.parametrize("arch", list(FEATURES))
def test_every_tactic_compiles(arch: str, tmp_path: Path) -> None:
    every = dict.fromkeys(kernel for op in WITH_KERNELS for kernel in _kernels(op))
    able = [kernel for kernel in every if not missing_features(kernel, arch)]

    made = compile_all(able, arch, tmp_path)

    assert able
    assert set(made) == set(able)


@pytest.mark.parametrize("arch", ["sm_89", "sm_120a", "sm_121a"])
def test_an_elementwise_kernel_compiles_for_other_architectures(arch: str) -> None:
    op = OPS["rms_norm"]
    kernel = next(k for k in _kernels(op) if not missing_features(k, arch))

    assert compile_kernel(kernel, arch).code[:4] == b"\x7fELF"
