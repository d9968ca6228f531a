"""MLA's launches: which kernels serve which sizes, and that their grids cover the work."""

from typing import Any

import pytest

from lingc.kernels import mla
from lingc.op import type_of
from lingc.plugins import mla_attention, mla_latent_attention
from lingc.targets.nvidia import H20, H200_SXM, RTX_89
from lingc.targets.spec import Target


def latent(
    lengths: tuple[int, ...], past: tuple[int, ...], *, heads: int = 32, page: int = 64
) -> list[Any]:
    given = mla_latent_attention.OP.inputs(
        lengths, past, heads, 128, 32, 128, 512, page, dtype="bf16", device="meta"
    )
    return [type_of(value) for value in given]


def entries(target: Target, arguments: list[Any]) -> list[tuple[str, ...]]:
    tactics = mla_latent_attention.OP.tactics(target, *arguments)
    return [tuple(one.kernel.entry for one in tactic.launches) for tactic in tactics]


def test_one_token_over_a_short_context_can_be_one_launch() -> None:
    assert ("mla_short",) in entries(H200_SXM, latent((1,), (300,)))


def test_a_long_context_is_split_over_the_whole_device() -> None:
    for target in (H200_SXM, H20):
        tactics = mla_latent_attention.OP.tactics(target, *latent((1,), (65535,)))

        for tactic in tactics:
            _, attend, combine = tactic.launches
            assert 0.9 * target.sms <= attend.grid[1] <= target.sms  # type: ignore[operator]
            assert dict(combine.kernel.constants)["SPLITS"] * attend.cluster[1] == attend.grid[1]


def test_the_sum_of_many_tokens_takes_no_more_blocks_than_fit_at_once() -> None:
    for tokens in (1, 8, 9, 64, 300):
        for tactic in mla_latent_attention.OP.tactics(
            H200_SXM, *latent((1,) * tokens, (600,) * tokens)
        ):
            combine = tactic.launches[-1]
            blocks = combine.grid[0] * combine.grid[1]

            assert blocks <= combine.blocks_per_sm * H200_SXM.sms  # type: ignore[operator]
            assert blocks % combine.cluster[0] == 0


def test_drafts_of_a_sequence_can_share_a_pass_over_its_rows() -> None:
    tactics = mla_latent_attention.OP.tactics(H200_SXM, *latent((4,), (65532,)))

    groups = {tactic.name.partition(".")[0]: tactic.launches[1].grid[0] for tactic in tactics}
    assert groups == {"single": 4, "paired": 2}


def test_a_prompt_makes_keys_and_values() -> None:
    made = entries(H200_SXM, latent((513,), (0,)))

    assert {one[-1] for one in made} == {"mla_prefill", "attend_rows"}


def test_devices_without_wgmma_have_kernels_too() -> None:
    made = entries(RTX_89, latent((1,), (300,)))

    assert {one[-2] for one in made} == {"attend_latents"}


def test_sizes_that_only_triton_takes_go_to_triton() -> None:
    assert {one[-2] for one in entries(H200_SXM, latent((1,), (300,), heads=40))} == {
        "attend_latents"
    }
    assert {one[-2] for one in entries(H200_SXM, latent((1,), (300,), page=4))} == {
        "attend_latents"
    }


@pytest.mark.parametrize("tokens", [1, 17, 127, 8192])
def test_attention_of_a_prompt_has_a_tile_for_every_token(tokens: int) -> None:
    given = mla_attention.OP.inputs(
        (tokens, 0, 3), 32, 128, 32, 128, 512, 64, (5, 0, 9), dtype="bf16", device="meta"
    )

    for tactic in mla_attention.OP.tactics(H200_SXM, *(type_of(value) for value in given)):
        tile = int(tactic.config["rows"])
        heads = sum(launch.grid[1] for launch in tactic.launches[1::2])
        assert heads == 32
        assert tactic.launches[1].grid[0] >= -(-tokens // tile) + 1


def causal(lengths: tuple[int, ...], past: tuple[int, ...], page: int = 64) -> list[Any]:
    given = mla_attention.OP.inputs(
        lengths, 32, 128, 32, 128, 512, page, past, dtype="bf16", device="meta"
    )
    return [type_of(value) for value in given]


@pytest.mark.parametrize("past", [0, 90_000])
@pytest.mark.parametrize("lengths", [(8192,), (300, 7, 1200), (32768,)])
def test_keys_and_values_of_a_pass_are_bounded_and_all_heads_have_one(
    lengths: tuple[int, ...], past: int
) -> None:
    found = mla_attention.OP.tactics(H200_SXM, *causal(lengths, (past,) * len(lengths)))

    assert found[0].name == "wgmma.rows128.keys128"
    for tactic in found:
        spaces = {space.name: space.bytes for space in tactic.workspaces}
        heads = sum(one.grid[1] for one in tactic.launches[1::2])

        assert spaces["keys"] + spaces["values"] <= mla.SPACE
        assert heads == 32


def test_tiles_of_128_rows_cover_pages_of_any_size() -> None:
    for page in (1, 8, 64, 100):
        tactic = mla_attention.OP.tactics(H200_SXM, *causal((130, 5), (77, 300), page))[0]
        expand, attend = tactic.launches
        room = -(-(77 + 130) // page) * page, -(-(300 + 5) // page) * page

        assert expand.grid[0] * 128 >= max(room)
        assert attend.grid[0] >= -(-130 // 128) + -(-5 // 128)


def test_other_devices_and_heads_attend_through_triton() -> None:
    arguments = causal((600,), (0,))
    small = mla_attention.OP.inputs((600,), 2, 16, 8, 16, 32, 16, (0,), dtype="bf16", device="meta")
    for target, given in ((RTX_89, arguments), (H200_SXM, [type_of(value) for value in small])):
        for tactic in mla_attention.OP.tactics(target, *given):
            assert {one.kernel.language for one in tactic.launches} == {"triton"}
