"""Packed sequences, set side by side and back."""

from lingc.targets.onnx.body import Body, Value


class Padding:
    """The tokens of B packed sequences as a [B, n] table, n that of the longest.

    Attributes:
        begins: First row of each sequence, [B].
        lengths: Tokens of each, [B].
        counts: Which places of the table hold a token, [B, n].
    """

    def __init__(self, body: Body, offsets: Value) -> None:
        bounds = offsets.cast("i64")
        self.begins, ends = bounds.slice(0, 0, -1), bounds.slice(0, 1)
        self.lengths = ends - self.begins
        longest = self.lengths.max(0, keep=True)
        rows = self.begins.unsqueeze(1) + body.count_to(longest)
        self.counts = body.op("Less", rows, ends.unsqueeze(1))
        self._rows = body.where(self.counts, rows, 0)
        self._body = body

    def spread(self, tokens: Value) -> Value:
        """Rows [T, ...] as [B, n, ...]; where there is no token, any row."""
        return tokens.gather(self._rows)

    def gathered(self, places: Value) -> Value:
        """Rows [B n, ...] of the table as [T, ...]."""
        held = self._body.op("NonZero", self.counts.reshape(-1)).squeeze(0)
        return places.gather(held)


class Singles:
    """One token of each sequence: a table of one column."""

    def spread(self, tokens: Value) -> Value:
        """Rows [B, ...] as [B, 1, ...]."""
        return tokens.unsqueeze(1)

    def gathered(self, places: Value) -> Value:
        """Rows [B, ...] as they are."""
        return places
