"""Segments of sequences: enough blocks and states for any lengths; Triton's kernels compile."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lingc import targets
from lingc.kernel import Tensor
from lingc.kernels import lightning
from lingc.kernels.lightning import CHUNK, WHOLE, WIDTH, Sequences, spans
from lingc.op import type_of
from lingc.plugins.table import OPS
from lingc.targets.cuda.binaries import FEATURES, compile_all, kernels
from lingc.targets.cuda.tactics import rank
from lingc.targets.spec import Target

H200, H20, SPARK = (targets.get(name) for name in ("h200-sxm", "h20", "spark"))
STATE_BYTES = 4 * WIDTH * WIDTH


def test_one_sequence_is_cut_so_that_its_heads_fill_the_device_about_once() -> None:
    first = spans(H200, 8192, heads=32)[0]

    assert first == 2048
    assert 32 * 8192 // first <= (H200.sms or 0)


def test_short_sequences_stay_whole() -> None:
    assert spans(H200, 300, heads=32) == [WHOLE]


@given(
    lengths=st.lists(st.integers(0, 9000), min_size=1, max_size=12),
    tail=st.integers(0, 700),
    target=st.sampled_from([H200, H20, SPARK]),
    heads=st.sampled_from([1, 2, 32]),
)
def test_blocks_and_states_are_enough_for_any_lengths(
    lengths: list[int], tail: int, target: Target, heads: int
) -> None:
    tokens, q = sum(lengths) + tail, Tensor("q")
    found = lightning.tactics(
        target,
        Sequences(
            tokens=tokens, sequences=len(lengths), heads=heads, q=q, k=q, v=q, o=q,
            pitch=heads * WIDTH, v_pitch=heads * WIDTH,
        ),
    )  # fmt: skip

    for tactic in found:
        span = int(tactic.config["span"]) or WHOLE
        counts = [-(-length // span) for length in (*lengths, tail)]
        blocks = max(tactic.launches[-1].grid[1:])
        states = sum(count for count in counts[:-1] if count > 1)
        assert sum(counts) <= blocks
        assert span % CHUNK == 0
        if len(tactic.launches) == 2:
            assert sum(counts[:-1]) <= max(tactic.launches[0].grid[1:])
            assert states * heads * STATE_BYTES <= tactic.workspaces[0].bytes
        else:
            assert states == 0


@pytest.mark.long
@pytest.mark.parametrize("target", [SPARK, targets.get("rtx-89"), targets.get("rtx-120")])
def test_other_architectures_run_through_triton(target: Target, tmp_path: Path) -> None:
    op = OPS["lightning_prefill_qkv"]
    types = [type_of(value) for value in op.inputs((700,), 1, 128, 32, dtype="bf16", device="meta")]
    tactics = op.tactics(target, *types)

    made = compile_all(kernels(tactics), target.arch, tmp_path, jobs=1)

    assert target.arch in FEATURES
    assert all(
        binary.shared_bytes <= (target.smem_per_block_bytes or 0) for binary in made.values()
    )


@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
def test_a_prompt_alone_is_cut_into_segments_and_many_prompts_are_not(tokens: int) -> None:
    """By the model of time: a grid has room for a sequence of padding, which does nothing."""

    def first(sequences: int) -> str:
        q = Tensor("q")
        given = Sequences(
            tokens=tokens, sequences=sequences, heads=32, q=q, k=q, v=q, o=q, pitch=4096,
            v_pitch=4096,
        )  # fmt: skip
        return rank(lightning.tactics(H200, given), H200)[0].tactic.name

    assert ".segments" in first(2)
    assert first(9) == first(65) == "wgmma.whole"
