"""What a fused op is, and the table of them.

An op is one file in `plugins/`: its maths, schema, type rule, reference, limits, cost and cases.
`define` registers it with torch (namespace `lingc`), so that it can stand in an exported graph, and
in the table that passes, lowering, the interpreter, tests and docs read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from lingc.kernel import Tactic
from lingc.plan import TensorType
from lingc.targets.spec import Target

Mechanism = Literal[
    "elementwise", "rope", "gemm", "fp8_gemm", "experts", "attention", "lightning",
    "lightning_qkv", "router",
]  # fmt: skip
"""What makes two right answers differ; `lingc.compare` has a tolerance for each."""

Value = Any  # a TensorType, or a literal, as the schema has it
Types = TensorType | tuple[TensorType, ...]

LIBRARY = torch.library.Library("lingc", "DEF")
OPS: dict[str, "Op"] = {}

TORCH_DTYPE: Mapping[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one call of an op must do at the least.

    Attributes:
        flops: Multiplications and additions, counted apart.
        moved_bytes: Bytes read and written once each, weights included.
    """

    flops: float
    moved_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One shape of the full model that an op is timed at.

    Attributes:
        name: As a reader knows it, e.g. `qkv + gate projection, FP8`.
        case: Arguments of the op's `inputs` for a number of tokens.
        tokens: Numbers of tokens that it is timed at when nobody asks for others.
        vary: Arguments for the i-th call of a series, from those of the first; None where copies
            of every tensor make the series cold.
        context: Tokens already in the cache, for the table; 0 where that means nothing.
    """

    name: str
    case: Callable[[int], tuple[Any, ...]]
    tokens: tuple[int, ...] = (1,)
    vary: Callable[[tuple[Any, ...], int], tuple[Any, ...]] | None = None
    context: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """A fused op.

    Attributes:
        name: Without the namespace, e.g. `add_rms_norm`.
        schema: As given to torch, with argument names.
        reference: The maths in plain torch, any device. Widens weights to the dtype of the
            activations, or to f32 where the op's rounding section says so; pure.
        types: Types of the results from types and literals of the arguments, in schema order.
        refusal: Why a target's own kernels could not run these arguments, or None. The ONNX
            and interpreter paths take every shape that the reference takes.
        cost: Cost from the same arguments as `types`, with every size a number.
        inputs: Example arguments, seeded, for one of `cases` and an activation dtype.
        cases: Arguments of `inputs` that the generic tests run through; small first, odd sizes
            included.
        tactics: Ways to run it with the target's own kernels, from the same arguments as `types`
            with every size a number; best guess first. Empty where `refusal` gives a reason.
        pinned: What a batch-invariant engine chooses from, the same arguments as `tactics`: there
            must be one whose `arithmetic` is offered for every size. The same as `tactics` where an
            op says nothing.
        layouts: Layouts of `lingc.quantize.layouts` that those kernels want weights in, by name of
            the argument, from the same arguments as `types`; plain where none is named. The same
            for every tactic and every target that has some.
        mechanism: Which tolerance of `lingc.compare` its results are compared with.
        benchmarks: Shapes of the full model.
        judge: Why results are wrong, from (arguments, got, want), or None; where an element by
            element comparison is not the right one (expert ids whose scores nearly tie).
        rows: Arguments that have a row for each row of every result, where such a row comes of its
            own rows of these and of all of the other arguments; none where rows depend on each
            other, or where comparing all of them costs little.
        overload: The torch op that stands in graphs.

    A result that has the name of an argument is that argument, updated in place by kernels.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    types: Callable[..., Types]
    refusal: Callable[..., str | None]
    cost: Callable[..., Cost]
    inputs: Callable[..., tuple[Any, ...]]
    cases: tuple[tuple[Any, ...], ...]
    tactics: Callable[..., Sequence[Tactic]]
    pinned: Callable[..., Sequence[Tactic]]
    layouts: Callable[..., Mapping[str, str]]
    mechanism: Mechanism
    benchmarks: tuple[Benchmark, ...]
    judge: Callable[..., str | None] | None
    rows: tuple[str, ...]
    overload: Any

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(argument.name for argument in self.overload._schema.arguments)

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the results, in order; `out` where the schema gives none."""
        returns = self.overload._schema.returns
        return tuple(
            one.name or ("out" if len(returns) == 1 else f"out{i}") for i, one in enumerate(returns)
        )


def no_refusal(_target: Target, *_args: Value) -> str | None:
    """Of an op whose kernels run every shape, and of one that has no kernel."""
    return None


def no_tactics(_target: Target, *_args: Value) -> Sequence[Tactic]:
    """Of an op that has no kernel."""
    return ()


def define(  # noqa: PLR0913 (an op is what it is)
    schema: str,
    *,
    reference: Callable[..., Any],
    types: Callable[..., Types],
    cost: Callable[..., Cost],
    inputs: Callable[..., tuple[Any, ...]],
    cases: tuple[tuple[Any, ...], ...],
    refusal: Callable[..., str | None] = no_refusal,
    tactics: Callable[..., Sequence[Tactic]] = no_tactics,
    pinned: Callable[..., Sequence[Tactic]] | None = None,
    layouts: Mapping[str, str] | Callable[..., Mapping[str, str]] = MappingProxyType({}),
    mechanism: Mechanism = "elementwise",
    benchmarks: tuple[Benchmark, ...] = (),
    judge: Callable[..., str | None] | None = None,
    rows: tuple[str, ...] = (),
) -> Op:
    """Register an op with torch and in the table, and return it.

    Args:
        schema: `name(Tensor x, float eps) -> Tensor`; the op's functional signature.
        layouts: A table where they depend on no argument.

    Raises:
        ValueError: A second op of the same name.
    """
    name = schema.partition("(")[0]
    if name in OPS:
        raise ValueError(f"op {name!r} is defined twice")
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lingc::{name}", _fake_from_types(types), lib=LIBRARY)
    overload = getattr(torch.ops.lingc, name).default
    op = Op(
        name=name,
        schema=schema,
        reference=reference,
        types=types,
        refusal=refusal,
        cost=cost,
        inputs=inputs,
        cases=cases,
        tactics=tactics,
        pinned=tactics if pinned is None else pinned,
        layouts=layouts if callable(layouts) else _always(layouts),
        mechanism=mechanism,
        benchmarks=benchmarks,
        judge=judge,
        rows=rows,
        overload=overload,
    )
    OPS[name] = op
    return op


def _always(layouts: Mapping[str, str]) -> Callable[..., Mapping[str, str]]:
    return lambda *_args: layouts


def type_of(value: Any) -> Any:
    """The `TensorType` of a tensor, sizes kept as they are; anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return TensorType(DTYPE_NAME[value.dtype], tuple(value.shape))
    return value


def _fake_from_types(types: Callable[..., Types]) -> Callable[..., Any]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        assert not kwargs, "lingc ops take positional arguments"
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        made = types(*(type_of(a) for a in args))

        def empty(t: TensorType) -> torch.Tensor:
            return torch.empty(t.bind({}), dtype=TORCH_DTYPE[t.dtype], device=device)

        return empty(made) if isinstance(made, TensorType) else tuple(empty(t) for t in made)

    return fake
