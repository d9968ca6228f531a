"""Tactics of experts for few tokens: what is refused, what is launched, and what fits."""

from dataclasses import replace

import pytest

from lingc import targets
from lingc.kernels import expert_down_one, experts
from lingc.plan import TensorType
from lingc.plugins import expert_down, expert_up

H200 = targets.get("h200-sxm")

FULL = experts.Shape(
    tokens=1, width=4096, inner=1024, experts=256, top_k=8, shared=1, format="fp8", group=0,
    pitch=4096, eps=1e-6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "group"), [("bf16", 0), ("fp8", 0), ("int4", 32), ("int4", 128)]
)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 9, 17, 32, 33, 64])
def test_every_format_and_number_of_tokens_has_tactics_that_fit(
    tokens: int, stored: str, group: int
) -> None:
    shape = replace(FULL, tokens=tokens, format=stored, group=group)

    assert experts.refusal(H200, shape, lists=True) is None
    for tactic in (*experts.up_tactics(H200, shape), *experts.down_tactics(H200, shape)):
        for launch in tactic.launches:
            assert launch.dependent
            assert launch.kernel.shared_bytes + 1024 <= (H200.smem_per_block_bytes or 0)


def test_as_many_blocks_fit_as_are_meant_for_one_token() -> None:
    for tactic in (*experts.up_tactics(H200, FULL), *experts.down_tactics(H200, FULL)):
        (launch,) = tactic.launches

        room = (H200.smem_per_block_bytes or 0) + 1024
        assert room // (launch.kernel.shared_bytes + 1024) >= launch.blocks_per_sm


def test_one_token_needs_no_lists_and_takes_one_launch() -> None:
    assert experts.refusal(H200, FULL, lists=False) is None
    for tactic in (*experts.up_tactics(H200, FULL), *experts.down_tactics(H200, FULL)):
        assert len(tactic.launches) == 1
        assert not tactic.workspaces


def test_one_token_goes_down_through_four_bits_by_blocks_that_are_alone() -> None:
    shape = replace(FULL, format="int4", group=128)

    for tactic in expert_down_one.tactics(H200, shape):
        (launch,) = tactic.launches
        assert launch.grid == (128, 1, 1)
        assert 114 * 1024 < launch.kernel.shared_bytes + 1024 <= (H200.smem_per_block_bytes or 0)
    assert expert_down_one.tactics(H200, shape)
    assert not expert_down_one.tactics(H200, replace(shape, tokens=2))


@pytest.mark.parametrize(
    ("stored", "group", "tokens"),
    [("fp8", 0, 1), ("bf16", 0, 4), ("int4", 128, 1), ("int4", 128, 4)],
)
def test_all_tiles_go_down_at_once_on_a_device_of_few_multiprocessors(
    stored: str, group: int, tokens: int
) -> None:
    h20 = targets.get("h20")
    shape = replace(FULL, tokens=tokens, format=stored, group=group)
    first, *others = expert_down_one.tactics(h20, shape) or experts.down_tactics(h20, shape)

    (launch,) = first.launches
    fit = 228 * 1024 // (launch.kernel.shared_bytes + 1024)
    assert fit == launch.blocks_per_sm
    assert launch.grid[0] <= fit * (h20.sms or 0)
    assert [one.name for one in others] == [
        one.name
        for one in expert_down_one.tactics(H200, shape) or experts.down_tactics(H200, shape)
    ]


def test_rows_of_many_tokens_are_quantized_once() -> None:
    shape = replace(FULL, tokens=32)

    up, down = experts.up_tactics(H200, shape)[0], experts.down_tactics(H200, shape)[0]

    assert [one.kernel.entry for one in up.launches] == ["prepare_rows", "expert_up"]
    assert [one.kernel.entry for one in down.launches] == ["prepare_rows", "expert_down"]
    assert {space.name: space.bytes for space in up.workspaces} == {
        "rows": 32 * 4096,
        "row_scales": 32 * 32 * 4,
    }
    assert {space.name: space.bytes for space in down.workspaces} == {
        "rows": 32 * 9 * 1024,
        "row_scales": 32 * 9 * 8 * 4,
    }


def test_slices_of_a_small_model_are_shorter_and_fewer() -> None:
    shape = replace(FULL, width=256, inner=128, experts=16, top_k=2, pitch=256)

    (up, *_), (down, *_) = experts.up_tactics(H200, shape), experts.down_tactics(H200, shape)

    assert up.config["warps"] == 2
    assert down.config["warps"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 65}, "65 tokens are more than 64"),
        ({"inner": 192}, "4096 and 192 channels are not multiples of 128"),
        ({"format": "bf16", "width": 96}, "96 and 1024 channels are not multiples of 64"),
        ({"format": "int4", "group": 64}, "INT4 groups of 64 are neither 32 nor 128"),
        ({"pitch": 4100}, "rows of 4100 columns are not aligned to 16 bytes"),
    ],
)
def test_a_shape_that_the_kernels_cannot_run_is_refused(
    change: dict[str, int | str], reason: str
) -> None:
    shape = replace(FULL, **change)  # type: ignore[arg-type]

    assert experts.refusal(H200, shape, lists=True) == reason


def test_several_tokens_without_lists_are_refused() -> None:
    reason = experts.refusal(H200, replace(FULL, tokens=3), lists=False)

    assert reason == "3 tokens without lists of their experts' pairs"


def test_a_target_of_unknown_shared_memory_is_refused() -> None:
    unknown = replace(H200, smem_per_block_bytes=None)

    reason = experts.refusal(unknown, FULL, lists=True)

    assert reason == "how much shared memory a block of h200-sxm may have is not known"


def test_activations_other_than_bf16_are_refused() -> None:
    x, ids = TensorType("f32", (1, 256)), TensorType("i32", (1, 2))
    a, y = TensorType("f32", (1, 3, 128)), TensorType("bf16", (1, 256))
    norm, stack = TensorType("bf16", (256,)), TensorType("bf16", (5, 256, 256))
    weights, down = TensorType("f32", (1, 2)), TensorType("bf16", (5, 256, 128))

    up = expert_up.refusal(H200, x, norm, ids, None, None, stack, None, "bf16", 0, 1e-6, 1)
    back = expert_down.refusal(H200, a, ids, weights, None, None, down, None, y, "bf16", 0, 1)

    assert up == "activations are f32, not bf16"
    assert back == "activations are f32 and bf16, not bf16"
