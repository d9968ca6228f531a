"""Tactics for many tokens: what is refused, what is chosen, and what fits."""

from dataclasses import replace

import pytest

from lingc import targets
from lingc.kernel import Tactic
from lingc.kernels import experts, gemm, gemv

H200 = targets.get("h200-sxm")

LINEAR = gemv.Shape(
    tokens=8192, rows=4096, width=4096, format="fp8", group=0, before="group_norm_gate",
    after="none", groups=4, residual=True, wide=False, x_pitch=4096, gate_pitch=16384, eps=1e-6,
)  # fmt: skip
EXPERTS = experts.Shape(
    tokens=8192, width=4096, inner=1024, experts=256, top_k=8, shared=1, format="fp8", group=0,
    pitch=4096,
)  # fmt: skip


def _space(tactic: Tactic, name: str) -> int:
    return next(space.bytes for space in tactic.workspaces if space.name == name)


@pytest.mark.parametrize(("stored", "group"), [("bf16", 0), ("fp8", 0), ("int4", 32)])
@pytest.mark.parametrize("tokens", [17, 127, 1000, 8192, 131072])
def test_every_format_and_length_has_tactics_that_fit_a_block(
    tokens: int, stored: str, group: int
) -> None:
    linear = replace(LINEAR, tokens=tokens, format=stored, group=group)
    stack = replace(EXPERTS, tokens=tokens, format=stored, group=group)

    found = (
        *gemm.tactics(H200, linear),
        *gemm.expert_up_tactics(H200, stack),
        *gemm.expert_down_tactics(H200, stack),
    )

    assert gemm.refusal(linear) is None
    assert gemm.expert_refusal(stack) is None
    assert len(found) >= 3
    for tactic in found:
        for launch in tactic.launches:
            assert launch.kernel.shared_bytes <= (H200.smem_per_block_bytes or 0), tactic.name


@pytest.mark.parametrize(("stored", "group"), [("bf16", 0), ("fp8", 0), ("int4", 128)])
@pytest.mark.parametrize("tokens", [8192, 32768, 131072, 1 << 20])
def test_however_many_tokens_there_are_the_workspace_is_bounded(
    tokens: int, stored: str, group: int
) -> None:
    linear = replace(LINEAR, tokens=tokens, width=9216, before="none", format=stored, group=group)
    stack = replace(EXPERTS, tokens=tokens, format=stored, group=group)

    for tactic in (
        *gemm.tactics(H200, linear),
        *gemm.expert_up_tactics(H200, stack),
        *gemm.expert_down_tactics(H200, stack),
    ):
        assert sum(space.bytes for space in tactic.workspaces) <= gemm.MOST_BYTES, tactic.name


def test_int4_weights_are_never_the_columns_of_a_tile() -> None:
    found = gemm.tactics(H200, replace(LINEAR, format="int4", group=128))

    assert all(".swap." in tactic.name for tactic in found)


def test_activations_are_padded_to_whole_tiles() -> None:
    tactic = gemm.tactics(H200, replace(LINEAR, tokens=1000))[0]

    assert _space(tactic, "codes") == 1024 * 4096
    assert _space(tactic, "code_scales") == 1024 * 32 * 4


def test_rows_of_experts_have_room_for_the_padding_of_each() -> None:
    tactic = gemm.expert_up_tactics(H200, EXPERTS)[0]

    rows = 8192 * 9 + 15 * 256

    assert _space(tactic, "rows") >= rows * 4
    assert _space(tactic, "codes") >= rows * 4096


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 192}, "K = 192 is not a multiple of 128"),
        ({"rows": 40}, "40 rows of the weight are not a multiple of 16"),
        ({"rows": 384, "after": "swiglu"}, "192 rows of a gate are not a multiple of 128"),
        ({"x_pitch": 4100}, "4100 and 16384 columns are not aligned"),
        ({"groups": 32, "width": 6144}, "groups of 192 channels"),
        ({"format": "int4", "group": 16}, "groups of 16 are none of"),
    ],
)
def test_a_linear_it_cannot_run_is_refused_with_the_value(
    change: dict[str, int | str], reason: str
) -> None:
    refused = gemm.refusal(replace(LINEAR, **change))  # type: ignore[arg-type]

    assert refused is not None
    assert reason in refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inner": 1000}, "4096 and 1000 channels are not multiples of 128"),
        ({"top_k": 32}, "33 experts of a token are more than 32"),
        ({"pitch": 4097}, "rows of 4097 columns"),
    ],
)
def test_experts_it_cannot_run_are_refused_with_the_value(
    change: dict[str, int], reason: str
) -> None:
    refused = gemm.expert_refusal(replace(EXPERTS, **change))  # type: ignore[arg-type]

    assert refused is not None
    assert reason in refused
