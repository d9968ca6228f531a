"""Seeded example tensors for the cases of ops.

Values are drawn on the CPU and moved, so that one case means the same numbers on every device.
Weights are drawn in the storage dtype that a plan would give them beside these activations.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lingc.op import TORCH_DTYPE

DRAWN = 2**24 + 1
"""Numbers after which a tensor repeats itself, so that those of benchmarks are soon drawn. Odd, so
that no row repeats another.
"""


class Samples:
    """A source of tensors for one activation dtype.

    Args:
        dtype: `f32`, `bf16` or, for checks of the maths, `f64`.
        device: Where the tensors go.
        seed: Equal seeds and equal calls give equal tensors.
    """

    def __init__(self, *, dtype: str, device: str, seed: int = 0) -> None:
        self.activation = TORCH_DTYPE[dtype]
        self.device = device
        # Weights and tables that are exact in f64 let two f64 formulas be compared to 1e-12.
        self.storage = torch.float64 if dtype == "f64" else torch.bfloat16
        self.table = torch.float64 if dtype == "f64" else torch.float32
        self._generator = torch.Generator().manual_seed(seed)

    def _normal(self, *shape: int) -> Tensor:
        return self._many(
            shape, lambda n: torch.randn(n, generator=self._generator, dtype=torch.float64)
        )

    def _many(self, shape: Sequence[int], draw: Callable[[int], Tensor]) -> Tensor:
        """Drawn values; of more than `DRAWN`, the first ones again and again."""
        count = math.prod(shape)
        if self.device == "meta":
            return torch.empty(tuple(shape), dtype=draw(1).dtype, device="meta")
        if count <= DRAWN:
            return draw(count).reshape(tuple(shape))
        drawn = draw(DRAWN).to(self.device)
        return drawn.repeat(-(-count // DRAWN))[:count].reshape(tuple(shape))

    def _put(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Activations."""
        return self._put(self._normal(*shape), self.activation)

    def weight(self, *shape: int) -> Tensor:
        """A matrix, or a stack of them, that keeps the scale of its input."""
        return self._put(self._normal(*shape) * shape[-1] ** -0.5, self.storage)

    def norm_weight(self, width: int) -> Tensor:
        return self._put(1 + 0.1 * self._normal(width), self.storage)

    def state(self, *shape: int) -> Tensor:
        """Linear state, or anything else that is f32 beside any activations."""
        return self._put(self._normal(*shape), self.table)

    def decay(self, heads: int) -> Tensor:
        """Rates from about one token's memory to about 250 tokens'."""
        i = torch.arange(heads, dtype=torch.float64)
        return self._put(2 ** (-8 * (i + 1) / heads), self.table)

    def rope(self, positions: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
        rates = 1e4 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        at = torch.zeros(positions.shape) if positions.is_meta else positions.cpu()
        angle = at.double()[:, None] * rates
        return self._put(angle.cos(), self.table), self._put(angle.sin(), self.table)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def below(self, bound: int, *shape: int) -> Tensor:
        """Integers from 0 to bound - 1."""
        drawn = torch.randint(bound, shape, generator=self._generator)
        return self._put(drawn, torch.int32)

    def experts(self, tokens: int, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
        """Distinct expert ids and weights that add up to 2.5, for each token."""
        order = torch.rand(tokens, experts, generator=self._generator).argsort(-1)
        shares = torch.rand(tokens, top_k, generator=self._generator, dtype=torch.float64) + 0.1
        weights = 2.5 * shares / shares.sum(-1, keepdim=True)
        return self._put(order[:, :top_k], torch.int32), self._put(weights, self.table)

    def sequences(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Packed sequences: slots, offsets and positions.

        The first starts at position 0, the others go on from earlier steps; of three and more,
        the last is padding.
        """
        count = len(lengths)
        slots = list(reversed(range(count)))
        if count > 2:
            slots[-1] = -1
        offsets, positions = [0], list[int]()
        for b, length in enumerate(lengths):
            offsets.append(offsets[-1] + length)
            positions.extend(range(5 * b, 5 * b + length))
        return self.ints(slots), self.ints(offsets), self.ints(positions)

    def pages(self, lengths: Sequence[int], page_size: int) -> tuple[Tensor, int]:
        """Page table for `sequences` of these lengths, and the rows of a cache that holds them.

        Pages are handed out from the back, so that no sequence lies where it would by luck.
        """
        needed = [-(-(5 * b + length) // page_size) for b, length in enumerate(lengths)]
        free = list(range(sum(needed)))
        table = [[free.pop() for _ in range(n)] + [0] * (max(needed) - n) for n in needed]
        rows = sum(needed) * page_size + 1
        return torch.tensor(table, dtype=torch.int32, device=self.device), rows

    def histories(
        self, lengths: Sequence[int], past: Sequence[int], page_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Packed sequences that go on after `past` cached tokens each.

        Pages are handed out from the back; of three sequences and more, the last is padding.

        Returns:
            Offsets, positions, row of the cache that each token writes, page table, and how many
            rows the cache has.
        """
        needed = [-(-(p + n) // page_size) for p, n in zip(past, lengths, strict=True)]
        free = list(range(sum(needed)))
        table = [[free.pop() for _ in range(n)] + [0] * (max(needed) - n) for n in needed]
        offsets, positions, rows = [0], list[int](), list[int]()
        for b, length in enumerate(lengths):
            offsets.append(offsets[-1] + length)
            at = range(past[b], past[b] + length)
            positions.extend(at)
            padding = b == len(lengths) - 1 >= 2
            rows.extend(
                -1 if padding else table[b][x // page_size] * page_size + x % page_size for x in at
            )
        pages = torch.tensor(table, dtype=torch.int32, device=self.device)
        made = self.ints(offsets), self.ints(positions), self.ints(rows)
        return *made, pages, sum(needed) * page_size + 1

    def fp8_rows(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of activations."""
        codes = self._codes(tokens, width)
        return codes, self._scales(tokens, -(-width // 128), size=0.01)

    def fp8_weight(self, *shape: int, halves: int = 1) -> tuple[Tensor, Tensor]:
        """Codes and scales of a matrix or stack; `halves` matrices are joined along the rows."""
        *stack, rows, width = shape
        codes = self._codes(*shape)
        blocks = halves * -(-rows // halves // 128)
        return codes, self._scales(*stack, blocks, -(-width // 128), size=0.01 * width**-0.5)

    def fp8_scaled(self, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale of inputs, codes of a matrix and its one scale."""
        codes = self._codes(rows, width)
        return self._scales(1, size=0.01), codes, self._scales(1, size=0.01 * width**-0.5)

    def int4_weight(self, *shape: int, group: int) -> tuple[Tensor, Tensor]:
        """Packed nibbles and scales of a matrix or stack."""
        *outer, width = shape
        words = (*outer, -(-width // 8))
        drawn = self._many(
            words, lambda n: torch.randint(-(2**31), 2**31, (n,), generator=self._generator)
        )
        scales = self._scales(*outer, -(-width // group), size=0.2 * width**-0.5)
        return self._put(drawn, torch.int32), scales.to(torch.bfloat16)

    def stored_weight(
        self, *shape: int, stored: str, group: int, halves: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """A matrix or stack in `bf16`, `fp8` or `int4`, and its scales where it has some."""
        if stored == "fp8":
            return self.fp8_weight(*shape, halves=halves)
        if stored == "int4":
            return self.int4_weight(*shape, group=group)
        return self.weight(*shape), None

    def _codes(self, *shape: int) -> Tensor:
        # A cast beyond the largest code gives NaN.
        values = (self._normal(*shape) * 100).clamp(-448, 448)
        return self._put(values, torch.float8_e4m3fn)

    def _scales(self, *shape: int, size: float) -> Tensor:
        drawn = self._many(shape, lambda n: torch.rand(n, generator=self._generator)) + 0.5
        return self._put(drawn * size, torch.float32)
