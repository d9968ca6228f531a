"""Batch-invariant engines: one arithmetic for each kind of call, in all buckets."""

from collections.abc import Hashable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from lingc import compile as compiler
from lingc import targets
from lingc.errors import InputError
from lingc.kernel import Kernel, Launch, Tactic
from lingc.launch_table import Bucket, LaunchTable, TableTactic
from lingc.model.config import ModelConfig
from lingc.op import OPS, Op, type_of
from lingc.plan import Plan
from lingc.plugins import table as _table
from lingc.quantize.recipes import load_recipe
from lingc.targets.cuda.buckets import INVARIANT_FROM, buckets
from lingc.targets.cuda.lower import schedule_all
from lingc.targets.cuda.pins import FAMILIES, Pins
from lingc.targets.cuda.tactics import offered
from tests.kernels.emulated import COMPILER, TARGET, results, runs

assert _table.OPS is OPS

CHECKPOINTS = Path(__file__).parents[2] / "artifacts" / "checkpoints"
H200 = targets.get("h200-sxm")
RUN = 512
"""Rows of a run of attention in such engines."""


@cache
def plan(precision: str) -> Plan:
    config = ModelConfig.from_file(CHECKPOINTS / "ling-tiny")
    request = compiler.Request(precision=precision, target="h200-sxm")
    recipe = load_recipe(precision)
    return compiler.compile_plan(config, recipe, H200, has_mtp=True, request=request).plan


@cache
def table(precision: str = "fp8", *, invariant: bool = True) -> LaunchTable:
    return schedule_all(plan(precision), H200, invariant=invariant).table


def of_family(found: LaunchTable, family: str) -> Iterator[tuple[Bucket, int, TableTactic]]:
    """Bucket, number of the step, its tactic."""
    for bucket in found.buckets:
        if FAMILIES.get(bucket.phase) == family:
            for number, index in enumerate(bucket.tactics):
                yield bucket, number, found.tactics[index]


def kernels(tactic: TableTactic) -> tuple[int, ...]:
    """Each once, in their order: how often one is launched is a matter of how many tokens."""
    return (*dict.fromkeys(launch.kernel for launch in tactic.launches),)


def differing(found: LaunchTable, phase: str) -> dict[str, set[Hashable]]:
    """Ops of a phase that have not the same kernels in all of its buckets.

    Attention has its ways by their names: its kernels know how many runs or sequences there are.
    """
    seen: dict[tuple[str, int], set[Hashable]] = {}
    for bucket, number, tactic in of_family(found, FAMILIES[phase]):
        if bucket.phase == phase and tactic.op != "mla_latent_attention":
            way = tactic.tactic if tactic.op == "mla_attention" else kernels(tactic)
            seen.setdefault((tactic.op, number), set()).add(way)
    return {op: ways for (op, _), ways in seen.items() if len(ways) > 1}


# ---------------------------------------------------------------------------------- of an engine


@pytest.mark.parametrize(
    "precision", ["fp8", *(pytest.param(one, marks=pytest.mark.long) for one in ("int4", "bf16"))]
)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_step_has_the_same_kernels_in_every_bucket(precision: str, phase: str) -> None:
    assert differing(table(precision), phase) == {}


def test_other_engines_have_the_kernels_that_suit_each_bucket() -> None:
    assert {"fused_linear", "expert_up"} <= differing(table(invariant=False), "decode").keys()


def test_verify_multiplies_by_the_kernels_of_decode() -> None:
    """By op and weight, since the two programs have other steps."""
    found: dict[tuple[str, str | None], set[tuple[int, ...]]] = {}
    phases = table().phases
    for bucket, number, tactic in of_family(table(), "steps"):
        if bucket.phase in {"decode", "verify"}:
            step = phases[bucket.phase].steps[number]
            weight = next((step.buffers[n] for n in ("weight", "gate_up", "down")
                           if n in step.buffers), None)  # fmt: skip
            if weight is not None:
                found.setdefault((step.op, weight), set()).add(kernels(tactic))

    assert {op for op, _ in found} >= {"fused_linear", "norm_router", "expert_up", "expert_down"}
    assert all(len(ways) == 1 for ways in found.values())


def test_verify_takes_tokens_one_by_one_as_decode_does() -> None:
    """One name of their arithmetic, though the kernels of each number of drafts are others."""
    names = set()
    for name, case in (("lightning_decode_qkv", (3, 2, 128, 32, 4)),
                       ("lightning_verify_qkv", (3, 4, 2, 128, 32, 4)),
                       ("lightning_verify_qkv", (1, 2, 2, 128, 32, 4))):  # fmt: skip
        op = OPS[name]
        types = [type_of(one) for one in op.inputs(*case, dtype="bf16", device="meta")]
        names |= {one.arithmetic for one in op.pinned(H200, *types)}

    assert len(names) == 1


def test_attention_cuts_every_context_into_runs_of_one_length() -> None:
    shapes = set()
    for bucket, _, tactic in of_family(table(), "steps"):
        if tactic.op == "mla_latent_attention":
            absorb, attend, _ = tactic.launches
            rows = bucket.sizes["P"] * plan("fp8").page_size
            assert (attend.grid[1] - 1) * RUN < rows <= attend.grid[1] * RUN
            shapes.add((absorb.kernel, attend.kernel))

    assert len(shapes) == 1


def test_prefill_has_buckets_of_many_tokens_alone() -> None:
    sizes = [one for one in buckets(plan("fp8"), invariant=True) if one.phase == "prefill"]

    assert min(one.axes["T"] for one in sizes) == INVARIANT_FROM
    assert min(one.axes["T"] for one in buckets(plan("fp8")) if one.phase == "prefill") < 64


def test_an_engine_for_which_there_are_no_such_kernels_is_refused() -> None:
    """Shared memory and arithmetic of an older generation: latent attention has one way there."""
    ada = replace(H200, arch="sm_89")

    with pytest.raises(InputError, match=r"^\w+ with .*: \w+ has no kernel for "):
        schedule_all(plan("fp8"), ada, invariant=True)


# --------------------------------------------------------------------------------------- the rule


def kernel(name: str) -> Kernel:
    return Kernel(language="cuda", source="kernels/x.cu", entry=name, arguments=(), warps=4)


def tactic(name: str, *, by: str, gigabytes: float, sums: str | None = "") -> Tactic:
    launch = Launch(kernel=kernel(by), grid=(512, 1, 1), operands=(), moved_bytes=gigabytes * 1e9)
    return Tactic(name=name, launches=(launch, launch), sums=sums)


def op(*made: list[Tactic]) -> Op:
    """Offers the i-th list to the argument i."""
    return replace(
        OPS["silu_mul"], pinned=lambda _target, i: made[i], refusal=lambda *_: None
    )  # fmt: skip


def chosen(some: Op, count: int) -> list[str]:
    kind, pins = ("steps", some.name, "*"), Pins(H200)
    for i in range(count):
        pins.see(kind, some, [i])
    return [pins.choose(kind, [i]).tactic.name for i in range(count)]


def test_what_loses_least_on_average_is_taken_everywhere() -> None:
    first = [tactic("a", by="one", gigabytes=1), tactic("b", by="two", gigabytes=2)]
    second = [tactic("a", by="one", gigabytes=5), tactic("b", by="two", gigabytes=1)]

    assert chosen(op(first, second), 2) == ["b", "b"]


def test_of_one_arithmetic_the_fastest_is_taken_for_each_size() -> None:
    first = [tactic("deep", by="one", gigabytes=2), tactic("wide", by="one", gigabytes=1)]
    second = [tactic("deep", by="one", gigabytes=1), tactic("wide", by="one", gigabytes=2)]

    assert chosen(op(first, second), 2) == ["wide", "deep"]


def test_what_is_not_offered_everywhere_is_passed_over() -> None:
    first = [tactic("a", by="one", gigabytes=1), tactic("b", by="two", gigabytes=9)]

    assert chosen(op(first, [tactic("b", by="two", gigabytes=1)]), 2) == ["b", "b"]


def test_what_depends_on_sizes_is_never_taken() -> None:
    free = tactic("free", by="one", gigabytes=1, sums=None)

    assert chosen(op([free, tactic("b", by="two", gigabytes=9)]), 1) == ["b"]
    with pytest.raises(InputError, match=r"silu_mul of \* has no kernel that adds up alike in all"):
        chosen(op([free], [free]), 2)


def test_a_name_of_the_arithmetic_stands_for_other_kernels() -> None:
    first = [tactic("a", by="one", gigabytes=1, sums="in turn")]

    assert chosen(op(first, [tactic("b", by="two", gigabytes=1, sums="in turn")]), 2) == ["a", "b"]


def test_launching_a_kernel_more_often_is_no_other_arithmetic() -> None:
    once = tactic("a", by="one", gigabytes=1)
    twice = replace(once, launches=once.launches * 2)

    assert once.arithmetic == twice.arithmetic
    assert once.arithmetic != tactic("a", by="two", gigabytes=1).arithmetic


# ------------------------------------------------------------------------- bits, by the emulator


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
@pytest.mark.parametrize(
    ("name", "case", "by_token"),
    [
        ("fused_linear", (300, 256, 128, "rms_norm", "swiglu", "fp8", 0, 1), (0, 5)),
        ("fused_linear", (300, 144, 256, "none", "none", "bf16", 0, 0), (0,)),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(
    name: str, case: tuple[object, ...], by_token: tuple[int, ...], tmp_path: Path
) -> None:
    """Products of many tokens: 300, and the last 101 of them alone."""
    some, few = OPS[name], 101
    arguments = list(some.inputs(*case, dtype="bf16", device="cpu"))
    less = [x[-few:] if i in by_token and x is not None else x for i, x in enumerate(arguments)]
    made = []
    for given in (arguments, less):
        tactics = offered(some, TARGET, [type_of(one) for one in given], invariant=True)
        (one,) = (one for one in tactics if runs(one))
        made.append((one.arithmetic, results(some, given, one, tmp_path)[0]))

    (same, whole), (also, part) = made
    assert _is(same, also)
    assert torch.equal(whole[-few:], part)


def _is(one: Hashable, other: Hashable) -> bool:
    return one is not None and one == other
