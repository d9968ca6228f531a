"""From the arrays of a step to a bucket: which one, and what stands in the rows that are left over.

Padding is made so that nothing of it is read or written in the state: no token, no slot, no row of
the cache. In decode and verify whole sequences are padding. In prefill and draft the tokens that
are left over belong to one more sequence behind the others, and sequences behind that are empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from lingc.errors import InputError, UsageError
from lingc.launch_table import Bucket
from lingc.plan import Dim, Program, TensorType
from lingc.quantize.formats import round_bf16
from lingc.runtime.backend import Array, Limits
from lingc.runtime.cuda_memory import Held

NUMPY_DTYPE: Mapping[str, type[np.generic]] = {
    "f32": np.float32, "i32": np.int32, "i64": np.int64, "bf16": np.uint16,
}  # fmt: skip
"""What holds a value on the host; bf16 as bits."""

PADDING: Mapping[str, int] = {
    "token_ids": -1, "cache_rows": -1, "slots": -1, "logit_rows": -1, "top_p": 1,
}  # fmt: skip
"""What padding holds, of inputs where it is not 0."""

EVEN = ("decode", "verify")
"""Phases whose sequences all have the same number of tokens."""

ROWS = "logit_rows"

TOKENS = "tokens"
SAMPLING: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "temperature": ("f32", ()), "top_k": ("i32", ()), "top_p": ("f32", ()), "draws": ("i32", (6,)),
}  # fmt: skip
"""What the drawing of tokens takes for each row of logits: element type, and what a row holds."""

_BY_SEQUENCE = ("slots", "page_table", "accepted")


def drawing(program: Program) -> Program:
    """The program with the drawing of tokens behind it: more inputs, and tokens as its output."""
    logits = program.types[program.outputs["logits"]]
    rows = logits.shape[0]
    kinds = {name: TensorType(dtype, (rows, *more)) for name, (dtype, more) in SAMPLING.items()}
    return replace(
        program,
        inputs=(*program.inputs, *kinds),
        outputs={TOKENS: TOKENS},
        types={**program.types, **kinds, TOKENS: TensorType("i32", (rows,))},
    )


def sizes_of(phase: str, program: Program, inputs: Mapping[str, Array]) -> dict[str, int]:
    """The value of every symbolic axis, from inputs that were checked.

    Raises:
        InputError: An input is missing, or of another type or shape.
    """
    sizes: dict[str, int] = {}
    for name in program.inputs:
        kind, array = program.types[name], inputs.get(name)
        if array is None:
            raise InputError(f"phase {phase!r} takes {name!r}, which is missing")
        fits = array.dtype == NUMPY_DTYPE[kind.dtype] or (
            kind.dtype == "bf16" and array.dtype == np.float32
        )
        known = [_noted(*pair, sizes) for pair in zip_longest(kind.shape, array.shape)]
        if not fits or known != [*array.shape]:
            wanted = ", ".join(map(str, known[: len(kind.shape)]))
            raise InputError(
                f"input {name!r} of phase {phase!r} is {array.dtype} {list(array.shape)}, "
                f"not {kind.dtype} [{wanted}]"
            )
    return sizes


def _noted(dim: Dim | None, found: int | None, sizes: dict[str, int]) -> int | None:
    """What a size must be; an open one, `B` or `B+1`, is what it is found to be first."""
    if not isinstance(dim, str):
        return dim
    axis, _, more = dim.partition("+")
    if found is None:
        return sizes.get(axis)
    return sizes.setdefault(axis, found - int(more or 0)) + int(more or 0)


def smallest(phase: str, buckets: Iterable[Bucket], sizes: Mapping[str, int]) -> Bucket | None:
    """The first bucket that a step fits, or None.

    Args:
        buckets: Of the phase, in the order of `order`.
        sizes: Of the step.
    """
    return next((one for one in buckets if fits(phase, one.sizes, sizes)), None)


def too_large(phase: str, sizes: Mapping[str, int]) -> UsageError:
    """What is said of a step that no bucket holds."""
    asked = ", ".join(f"{name} = {sizes[name]}" for name in ("T", "B", "P") if name in sizes)
    return UsageError(
        f"no {phase} bucket of the engine holds {asked} (tokens, sequences, pages a sequence)",
        hint="feed less at once, or build the engine with larger buckets",
    )


def reachable(phase: str, buckets: Sequence[Bucket], limits: Limits) -> list[Bucket]:
    """Those that a step can need which has no more sequences and pages than there are.

    Args:
        buckets: Of the phase, in the order of `order`.
    """

    def around(axis: str, most: int | None = None) -> set[int]:
        """Sizes of that axis at which the next bucket begins, and those before."""
        ends = {bucket.sizes.get(axis, bucket.sizes["B"]) for bucket in buckets}
        found = {1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)}
        return {n for n in (found if most is None else {*found, most}) if 0 < n <= (most or n)}

    sequences, pages = around("B", limits.slots), around("P", limits.pages)
    each = {_each(bucket.sizes) for bucket in buckets} if phase in EVEN else set()
    tokens = around("T")
    steps = [
        {"B": b, "P": p, "T": t}
        for b in sequences
        for p in pages
        for t in ({b * n for n in each} or tokens)
        if t >= b
    ]
    needed = {
        index
        for step in steps
        for index in [next((i for i, x in enumerate(buckets) if fits(phase, x.sizes, step)), -1)]
    }
    return [bucket for index, bucket in enumerate(buckets) if index in needed]


def order(bucket: Bucket) -> tuple[int, ...]:
    """Smaller ones cost less: by tokens, then context, then sequences."""
    sizes = bucket.sizes
    return (sizes.get("T", sizes["B"]), sizes["P"], sizes["B"], sizes.get("N", 0))


def fits(phase: str, bucket: Mapping[str, int], step: Mapping[str, int]) -> bool:
    """Whether a step can run in a bucket. Rows of logits may come in several turns."""
    if step["P"] > bucket["P"] or step["B"] > bucket["B"]:
        return False
    if phase in EVEN:
        return _each(bucket) == _each(step)
    left = bucket["T"] - step["T"]
    # What is left over needs a sequence to belong to.
    return left == 0 or (left > 0 and step["B"] < bucket["B"])


def _each(sizes: Mapping[str, int]) -> int:
    """Tokens of a sequence."""
    each, odd = divmod(sizes.get("T", sizes["B"]), max(sizes["B"], 1))
    return 0 if odd else each


def halves(inputs: Mapping[str, Array]) -> list[tuple[dict[str, Array], Array, Array]]:
    """A step of several sequences as two, of the first ones and of the others.

    Sequences do not see each other.

    Returns:
        For each its inputs, and where its tokens and its rows of logits stand among all.
    """
    offsets = inputs["offsets"]
    middle = (len(offsets) - 1) // 2
    tokens = np.arange(len(inputs["token_ids"]))
    rows = inputs.get(ROWS, tokens)
    found = []
    for first, last in ((0, middle), (middle, len(offsets) - 1)):
        start, end = int(offsets[first]), int(offsets[last])
        mine = np.flatnonzero((rows >= start) & (rows < end))
        part = {
            name: array[mine]
            if name in SAMPLING
            else array[first:last]
            if name in _BY_SEQUENCE
            else array[start:end]
            for name, array in inputs.items()
            if name not in {"offsets", ROWS}
        }
        part["offsets"] = (offsets[first : last + 1] - start).astype(np.int32)
        if ROWS in inputs:
            part[ROWS] = (rows[mine] - start).astype(np.int32)
        found.append((part, tokens[start:end], mine))
    return found


def fill(
    phase: str,
    views: Mapping[str, Array],
    inputs: Mapping[str, Array],
    *,
    without: Sequence[str] = (),
) -> None:
    """Put a step's inputs where a bucket's are, padded.

    Args:
        views: Every input of the bucket.
        inputs: Those of the step; rows of logits no more than there is room for.
        without: Inputs to leave as they are.
    """
    for name, into in views.items():
        if name not in inputs or name in without:
            continue
        given = inputs[name]
        if name == "offsets":
            _fill_offsets(phase, into, given, len(views["token_ids"]))
            continue
        if into.dtype == np.uint16 and given.dtype == np.float32:
            given = round_bf16(given)
        if into.shape != given.shape:
            into[...] = PADDING.get(name, 0)
        into[tuple(slice(size) for size in given.shape)] = given


def _fill_offsets(phase: str, into: Array, given: Array, tokens: int) -> None:
    if phase in EVEN:
        into[:] = np.arange(len(into)) * (tokens // (len(into) - 1))
        return
    into[: len(given)] = given
    into[len(given) :] = tokens


def runs(places: Mapping[str, Held], kept: str | None) -> list[tuple[int, int]]:
    """Addresses from where to where to copy."""
    rest = [held for name, held in places.items() if name != kept]
    groups = [rest]
    if kept is not None:
        at = places[kept].address
        groups = [[x for x in rest if x.address < at], [x for x in rest if x.address > at]]
    return [
        (min(x.address for x in group), max(x.address + x.bytes for x in group))
        for group in groups
        if group
    ]


def view_of(block: Array, held: Held, start: int) -> Array:
    """Where a tensor's bytes stand in a block."""
    raw = block[start : start + held.bytes]
    return raw.view(NUMPY_DTYPE[held.kind.dtype]).reshape(held.kind.bind({}))
