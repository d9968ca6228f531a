"""What the gate lets pass of a router's kernels, and which kernels a shape has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lingc import targets
from lingc.kernels import router
from lingc.math import expert_lists
from lingc.op import type_of
from lingc.plugins import norm_router

H200 = targets.get("h200-sxm")


def routed(tokens: int = 9) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments and what the reference makes of them."""
    given = norm_router.OP.inputs(tokens, 128, 16, 4, 2, 4, dtype="bf16", device="cpu")
    return given, list(norm_router.reference(*given))


def with_ids(made: list[Tensor], ids: Tensor) -> list[Tensor]:
    return [ids, made[1], *expert_lists(ids, 16)]


def test_the_references_own_results_pass() -> None:
    given, made = routed()

    assert norm_router.judge(given, made, made) is None


def test_another_expert_does_not_pass() -> None:
    given, made = routed()
    ids = made[0].clone()
    ids[4, -1] = next(e for e in range(16) if e not in ids[4].tolist())

    assert "token 4 goes to" in (norm_router.judge(given, with_ids(made, ids), made) or "")


def test_experts_whose_scores_tie_may_change_places() -> None:
    (x, norm_weight, weight, bias, *numbers), _ = routed()
    tied: tuple[Any, ...] = (
        *(x, norm_weight, torch.ones_like(weight), torch.zeros_like(bias)),
        *numbers,
    )
    want = list(norm_router.reference(*tied))

    got = with_ids(want, want[0].flip(1).contiguous())

    assert norm_router.judge(tied, got, want) is None


def test_a_token_may_not_go_to_one_expert_twice() -> None:
    given, made = routed()
    ids = made[0].clone()
    ids[0, 1] = ids[0, 0]

    assert norm_router.judge(given, with_ids(made, ids), made) is not None


def test_lists_in_another_order_do_not_pass() -> None:
    given, made = routed()
    pairs = made[2].flip(0).contiguous()

    found = norm_router.judge(given, [made[0], made[1], pairs, made[3]], made)

    assert found == "the lists are not those of the ids"


def test_weights_that_are_off_do_not_pass() -> None:
    given, made = routed()

    found = norm_router.judge(given, [made[0], made[1] * 1.001, *made[2:]], made)

    assert found is not None
    assert found.startswith("weights: ")


@pytest.mark.parametrize(
    ("tokens", "first", "launches"),
    [(1, "rows4", 1), (3, "tiles.depth1", 1), (64, "tiles.depth1", 1), (513, "many", 5)],
)
def test_up_to_512_tokens_are_routed_in_one_launch(tokens: int, first: str, launches: int) -> None:
    given = norm_router.OP.inputs(tokens, 4096, 256, 8, 4, 8, dtype="bf16", device="meta")

    found = norm_router.tactics(H200, *map(type_of, given))

    assert (found[0].name, len(found[0].launches)) == (first, launches)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"width": 96}, "rows of 96 channels are not a multiple of 128"),
        ({"experts": 512}, "512 experts in 8 groups do not fit in one block"),
        ({"kept": 8}, "8 best of 8 groups are 64 candidates for 8 experts"),
        ({"experts": 96, "tokens": 600}, "96 experts in 8 groups do not fit in a warp"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_their_values(
    sizes: dict[str, int], reason: str
) -> None:
    full = {"tokens": 1, "pitch": 4096, "width": 4096, "experts": 256, "groups": 8, "kept": 4}

    shape = router.Shape(**{**full, **sizes}, top=8, scale=2.5, normalize=True, eps=1e-6)

    assert reason in (router.refusal(shape) or "")
