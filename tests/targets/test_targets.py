"""Targets are facts: consistent, found by name, and with figures that cannot be a slip of unit."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingc import targets
from lingc.errors import UnknownTargetError
from lingc.targets.spec import Target

H100 = targets.get("h100-sxm")
EVERY = pytest.mark.parametrize("target", targets.ALL.values(), ids=lambda target: target.name)


@EVERY
def test_names_round_trip(target: Target) -> None:
    assert targets.get(target.name) is target


@EVERY
def test_a_gpu_has_an_architecture_and_what_its_capability_guarantees(target: Target) -> None:
    if target.name == "cpu":
        assert target.compute_capability is None
        assert target.smem_per_block_bytes is None
        return

    capability = target.compute_capability
    assert capability is not None
    assert target.arch.removesuffix("a") == "sm_{}{}".format(*capability)
    # CUDA C++ Programming Guide, maximum shared memory per thread block.
    kib = {(8, 9): 99, (9, 0): 227, (12, 0): 99, (12, 1): 99}[capability]
    assert target.smem_per_block_bytes == kib * 1024


@EVERY
def test_fp8_is_multiplied_at_twice_the_rate_of_bf16_where_both_are_known(target: Target) -> None:
    rates = target.dense_flops_per_s
    if {"bf16", "fp8"} <= rates.keys():
        assert rates["fp8"] / rates["bf16"] == pytest.approx(2, rel=0.002)


def test_the_engine_kind_follows_from_the_target_alone() -> None:
    assert {name: target.default_engine for name, target in targets.ALL.items()} == {
        "cpu": "onnx",
        "h20": "cuda",
        "h20-3e": "cuda",
        "h100-sxm": "cuda",
        "h200-sxm": "cuda",
        "spark": "tensorrt",
        "rtx-89": "tensorrt",
        "rtx-120": "tensorrt",
    }


def test_activations_are_f32_on_a_cpu_and_quantized_weights_stay_weight_only() -> None:
    cpu = targets.get("cpu")

    assert cpu.activations == "f32"
    assert not cpu.fp8_activations
    assert {t.activations for t in targets.ALL.values() if t is not cpu} == {"bf16"}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("h100", "h100-sxm"), ("h200", "h200-sxm"), ("H20", "h20"), ("rtx120", "rtx-120")],
)
def test_a_wrong_name_is_answered_with_the_near_one(typed: str, meant: str) -> None:
    with pytest.raises(UnknownTargetError, match=f"called '{typed}'") as caught:
        targets.get(typed)

    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"did you mean '{meant}'? known: cpu, ")
    assert caught.value.exit_code == 2


@given(st.text(max_size=20))
def test_any_other_name_is_refused_with_the_list(typed: str) -> None:
    if typed in targets.ALL:
        return
    with pytest.raises(UnknownTargetError, match="no target is called") as caught:
        targets.get(typed)

    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in targets.ALL)


def test_roofline_time_is_the_slower_of_arithmetic_and_memory() -> None:
    # 3.35 GB at 3.35 TB/s, against almost no arithmetic.
    assert H100.seconds(flops=1e6, dtype="bf16", moved_bytes=3.35e9) == pytest.approx(1e-3)
    assert H100.seconds(flops=989e9, dtype="bf16", moved_bytes=1.0) == pytest.approx(1e-3)


def test_roofline_time_is_unknown_where_a_fact_is() -> None:
    spark = targets.get("spark")

    assert targets.get("cpu").seconds(flops=1.0, dtype="f32", moved_bytes=1.0) is None
    assert spark.seconds(flops=1.0, dtype="bf16", moved_bytes=1.0) is None


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"name": "H100 SXM"}, "a name is lower case, digits and hyphens"),
        ({"arch": "90"}, "arch '90' is not 'cpu' or 'sm_XY'"),
        ({"engines": ()}, "no engine kind can be built for it"),
        ({"engines": ("cuda", "cuda")}, "an engine kind is listed twice"),
        ({"engines": ("vulkan",)}, r"engine kinds \['vulkan'\] are not among"),
        ({"activations": "f32"}, "FP8 activations between f32 ops"),
        ({"hbm_bytes_per_s": 3350.0}, "hbm_bytes_per_s = 3350 is outside"),
        ({"memory_bytes": 80}, "memory_bytes = 80 is outside"),
        ({"l2_bytes": 50}, "l2_bytes = 50 is outside"),
        ({"sms": 0}, "sms = 0 is outside"),
        ({"smem_per_block_bytes": 227}, "smem_per_block_bytes = 227 is outside"),
        ({"dense_flops_per_s": {"fp8": 1979.0}}, r"\['fp8'\] = 1979 is outside"),
    ],
)
def test_a_figure_that_cannot_be_is_refused(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(H100, **wrong)  # type: ignore[arg-type]  # that is the point


def test_every_fault_of_a_target_is_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"arch 'x'.*; .*sms = 0"):
        replace(H100, arch="x", sms=0)
