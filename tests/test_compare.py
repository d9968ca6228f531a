"""What counts as close, and what a mismatch says."""

import re

import pytest
import torch

from lingc import compare
from lingc.compare import TABLE, assert_close, close, tolerance

# The least strict that is allowed: what published kernels of this model are tested with.
LOOSEST = {
    ("f32", "elementwise"): (1e-4, 1e-6),
    ("bf16", "elementwise"): (2e-2, 1e-3),
    ("f8e4m3", "elementwise"): (0.125, 0.125),
    ("f32", "rope"): (1e-4, 1e-2),
    ("bf16", "rope"): (2e-2, 1e-2),
    ("f32", "gemm"): (2e-3, 5e-3),
    ("bf16", "gemm"): (2e-2, 5e-3),
    ("f32", "experts"): (2e-2, 5e-2),
    ("bf16", "experts"): (2e-2, 5e-2),
    ("f32", "attention"): (0.05, 0.05),
    ("bf16", "attention"): (0.05, 0.05),
    ("f32", "lightning"): (0.02, 0.01),
    ("bf16", "lightning"): (0.02, 0.01),
    ("bf16", "lightning_qkv"): (0.02, 0.01),
    ("f32", "router"): (1e-3, 0.1),
}


@pytest.mark.parametrize("entry", LOOSEST, ids="-".join)
def test_no_entry_is_looser_than_published_tests(entry: tuple[str, str]) -> None:
    rtol, atol = LOOSEST[entry]

    assert TABLE[entry].rtol <= rtol
    assert TABLE[entry].atol <= atol


def test_fp8_products_are_held_to_two_percent_of_the_mean() -> None:
    for dtype in ("f32", "bf16"):
        found = tolerance(dtype, "fp8_gemm")

        assert (found.rtol, found.atol, found.of_mean) == (2e-2, 0, 2e-2)


def test_codes_that_fall_the_other_way_move_few_elements_and_not_far() -> None:
    want = torch.ones(100_000)
    few, many, far = (want.clone() for _ in range(3))
    few[:2] = 1.06  # allowed: 2 % of the value and 2 % of the mean
    many[:3] = 1.06
    far[0] = 1.09

    assert close(few, want, dtype="bf16", mechanism="fp8_gemm").ok
    assert not close(many, want, dtype="bf16", mechanism="fp8_gemm").ok
    assert not close(far, want, dtype="bf16", mechanism="fp8_gemm").ok
    assert not close(few[:49_999], want[:49_999], dtype="bf16", mechanism="fp8_gemm").ok


def test_without_quantized_inputs_no_element_may_stray() -> None:
    strays = {key for key, entry in TABLE.items() if entry.stray}

    rounded = {("bf16", "experts"), ("bf16", "lightning_qkv")}
    assert strays == {("f32", "fp8_gemm"), ("bf16", "fp8_gemm")} | rounded


def test_strays_of_long_memories_may_be_off_by_a_hundredth_of_their_row() -> None:
    """A q that rounds the other way moves what is near zero by what the rest of its row is."""
    want = torch.full((1000, 128), 10.0)
    want[:, 0] = 0.0
    few, many, far = (want.clone() for _ in range(3))
    few[:2, 0] = 0.09
    many[:3, 0] = 0.09
    far[0, 0] = 0.11

    assert close(few, want, dtype="bf16", mechanism="lightning_qkv").ok
    assert not close(few, want, dtype="bf16", mechanism="lightning").ok
    assert not close(many, want, dtype="bf16", mechanism="lightning_qkv").ok
    assert not close(far, want, dtype="bf16", mechanism="lightning_qkv").ok


def test_sums_over_a_long_memory_are_held_to_their_rows() -> None:
    want = torch.zeros(2, 128)
    want[0, 1:] = 10.0
    near, far, small = (want.clone() for _ in range(3))
    near[0, 0] = 1.9e-4
    far[0, 0] = 2.1e-4
    small[1, 0] = 1.1e-4  # a row of zeros has `atol` alone

    assert close(near, want, dtype="f32", mechanism="lightning").ok
    assert not close(far, want, dtype="f32", mechanism="lightning").ok
    assert not close(small, want, dtype="f32", mechanism="lightning").ok


def test_large_tensors_are_compared_as_a_whole_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    some = torch.Generator().manual_seed(0)
    want = torch.randn(37, 5, 12, generator=some)
    got = want + 0.03 * torch.randn(want.shape, generator=some)
    got[29, 3, 7] += 5
    whole = close(got, want, dtype="bf16", mechanism="fp8_gemm")

    monkeypatch.setattr(compare, "_PART", 100)
    parts = close(got, want, dtype="bf16", mechanism="fp8_gemm")

    assert parts.worst == whole.worst == (29, 3, 7)
    assert (parts.outside, parts.far) == (whole.outside, whole.far)
    assert parts.far > 0
    assert parts.similarity_error == pytest.approx(whole.similarity_error, rel=1e-12)
    assert parts.allowed == pytest.approx(whole.allowed, rel=1e-12)


def test_scalars_are_compared() -> None:
    found = close(torch.tensor(2.0), torch.tensor(1.0), dtype="f32")

    assert (found.ok, found.worst, found.got) == (False, (), 2.0)


def test_every_entry_says_where_it_comes_from() -> None:
    assert all(len(entry.source) > 20 for entry in TABLE.values())


def test_equal_tensors_are_close_with_no_error() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

    found = close(x, x.clone(), dtype="f32")

    assert found.ok
    assert (found.outside, found.similarity_error) == (0, 0.0)


def test_names_the_worst_element_its_values_and_the_tolerance() -> None:
    want = torch.ones(2, 3)
    got = want.clone()
    got[0, 1], got[1, 2] = 1.5, 3.0

    found = close(got, want, dtype="f32", mechanism="gemm")

    assert not found.ok
    assert (found.worst, found.got, found.want, found.outside) == ((1, 2), 3.0, 1.0, 2)
    text = str(found)
    assert "2 of 6 elements" in text
    assert "worst at [1, 2]: got 3.0, want 1.0" in text
    assert "rtol 0.0001" in text
    assert "f32 summation order" in text


def test_assert_close_raises_with_that_text() -> None:
    with pytest.raises(AssertionError, match=re.escape("worst at [0]: got 2.0, want 1.0")):
        assert_close(torch.tensor([2.0]), torch.tensor([1.0]), dtype="bf16")


def test_shapes_that_differ_are_named_and_not_broadcast() -> None:
    found = close(torch.ones(2, 1), torch.ones(2), dtype="f32")

    assert not found.ok
    assert str(found) == "got shape (2, 1), want (2,)"


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.nan, 1.0),
        (1.0, torch.nan),
        (torch.nan, torch.nan),
        (torch.inf, 1.0),
        (1.0, torch.inf),
        (torch.inf, -torch.inf),
    ],
)
def test_nan_and_unequal_infinities_are_never_close(got: float, want: float) -> None:
    found = close(torch.tensor([0.0, got]), torch.tensor([0.0, want]), dtype="bf16")

    assert (found.ok, found.worst) == (False, (1,))


def test_equal_infinities_are_close() -> None:
    x = torch.tensor([-torch.inf, 1.0])

    assert close(x, x.clone(), dtype="f32").ok


def test_an_infinity_takes_nothing_from_what_its_row_may_be_off_by() -> None:
    want = torch.tensor([[-torch.inf, 1.0]])
    near = torch.tensor([[-torch.inf, 1.0 + 1e-6]])

    assert close(near, want, dtype="f32").ok
    assert close(near, want, dtype="f32", mechanism="lightning").ok


def test_integers_are_compared_exactly_whatever_the_mechanism() -> None:
    a, b = torch.tensor([1000], dtype=torch.int32), torch.tensor([1001], dtype=torch.int32)

    assert not close(a, b, dtype="i32", mechanism="experts").ok


def test_the_mean_of_the_wanted_values_widens_fp8_products() -> None:
    want = torch.tensor([100.0, 0.0])

    assert close(torch.tensor([100.0, 0.9]), want, dtype="bf16", mechanism="fp8_gemm").ok
    assert not close(torch.tensor([100.0, 1.1]), want, dtype="bf16", mechanism="fp8_gemm").ok


def test_empty_tensors_are_close() -> None:
    assert close(torch.ones(0, 3), torch.ones(0, 3), dtype="f32").ok


def test_fp8_codes_are_compared_by_value() -> None:
    codes = torch.tensor([448.0, 1.0]).to(torch.float8_e4m3fn)
    near = torch.tensor([416.0, 1.0]).to(torch.float8_e4m3fn)
    far = torch.tensor([352.0, 1.0]).to(torch.float8_e4m3fn)

    assert close(near, codes, dtype="f8e4m3").ok
    assert not close(far, codes, dtype="f8e4m3").ok
