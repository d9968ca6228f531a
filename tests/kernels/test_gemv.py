"""What the kernels for few tokens accept, how they split tokens, and what they say of the rest."""

from dataclasses import replace

import pytest

from lingc import targets
from lingc.kernel import Tensor
from lingc.kernels import gemv
from lingc.kernels.gemv import Narrow, Shape, Whole, Wide

H200 = targets.get("h200-sxm")
SHAPE = Shape(
    tokens=1, rows=4096, width=4096, format="fp8", group=0, before="group_norm_gate", after="none",
    groups=4, residual=True, wide=False, x_pitch=4096, gate_pitch=16384, eps=1e-6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 4000}, "K = 4000 is not a multiple of 128"),
        ({"rows": 4090}, "4090 rows of the weight are not a multiple of 16"),
        ({"rows": 4224, "after": "swiglu"}, "2112 rows of a gate are not a multiple of 128"),
        ({"format": "int4", "group": 64}, "INT4 groups of 64 are none of (32, 128)"),
        ({"x_pitch": 4100}, "rows of 4100 and 16384 columns are not aligned to 16 bytes"),
        ({"tokens": 65}, "65 tokens > 64"),
        ({"width": 384, "groups": 2}, "2 groups of K = 384 channels share a block of 128"),
    ],
)
def test_refuses_and_says_the_value(change: dict[str, int | str], reason: str) -> None:
    found = gemv.refusal(H200, replace(SHAPE, **change))  # type: ignore[arg-type]

    assert found == reason


def test_refuses_an_architecture_without_bulk_copies() -> None:
    assert gemv.refusal(targets.get("rtx-89"), SHAPE) == "sm_89 has no bulk copies"


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
def test_launches_cover_every_token_once(tokens: int, kind: str) -> None:
    shape = replace(SHAPE, tokens=tokens, format=kind, group=128, before="rms_norm", groups=1)

    for tactic in gemv.tactics(H200, shape):
        ends = []
        for launch in tactic.launches:
            names = [name for name, _ in launch.kernel.arguments]
            given = dict(zip(names, launch.operands, strict=True))
            x, y, count = given["x"], given["y"], given["tokens"]
            assert isinstance(x, Tensor)
            assert isinstance(y, Tensor)
            assert x.offset // (2 * shape.x_pitch) == y.offset // (2 * shape.rows)
            assert x.offset % 16 == y.offset % 16 == 0
            ends.append((x.offset // (2 * shape.x_pitch), int(str(count))))
        assert [start for start, _ in ends] == [
            sum(n for _, n in ends[:i]) for i in range(len(ends))
        ]
        assert sum(n for _, n in ends) == tokens


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_no_more_blocks_of_a_launch_share_a_multiprocessor_than_meant(
    tokens: int, kind: str
) -> None:
    for tactic in gemv.tactics(H200, replace(SHAPE, tokens=tokens, format=kind, group=128)):
        for launch in tactic.launches:
            fit = 228 * 1024 // (launch.kernel.shared_bytes + 1024)
            assert launch.kernel.shared_bytes <= 227 * 1024, tactic.name
            beside = tactic.name.endswith(".beside")  # room for a block of the next launch
            assert fit == launch.blocks_per_sm + beside, tactic.name


def test_a_warps_channels_lie_in_one_group_of_the_norm() -> None:
    assert not Narrow(warps=6, depth=3).suits(SHAPE)
    assert Narrow(warps=8, depth=3).suits(SHAPE)
    assert not Wide(groups=2, slots=8).suits(SHAPE)
    assert Wide(groups=4, slots=8).suits(SHAPE)
    four_bits = replace(SHAPE, format="int4", group=128)
    assert not Whole(tiles=2, warps=4, depth=1).suits(four_bits)
    assert Whole(tiles=2, warps=8, depth=1).suits(four_bits)


@pytest.mark.parametrize(("tokens", "source"), [(1, "gemv_int4"), (4, "gemv_int4"), (5, "gemv")])
def test_four_bits_are_multiplied_as_integers_by_up_to_four_tokens(
    tokens: int, source: str
) -> None:
    shape = replace(SHAPE, tokens=tokens, format="int4", group=128)

    (launch,) = gemv.tactics(H200, shape)[0].launches

    assert launch.kernel.source == f"kernels/{source}.cu"
