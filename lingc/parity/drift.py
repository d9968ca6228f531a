"""How the output of linear attention drifts when its state is held in a narrow type.

The recurrence S = exp(-s) S + k (outer) v is run token by token, with S rounded after each to the
type, and once in f64. The error of a token and head is |o - o64| / |o64| over the head's channels,
with o = q @ S / sqrt(K). Decay rates s are the config's; slow heads hold most and drift most.

Keys, values and queries are the model's own where there are weights: what eager makes of rows of
data, in each layer as if those before it were exact. For a config alone they are drawn from a
normal distribution, which is what norms make of anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lingc.errors import InputError, UsageError
from lingc.model.config import ModelConfig
from lingc.model.linear_attention import lightning_chunk
from lingc.model.model import LingModel
from lingc.op import TORCH_DTYPE
from lingc.parity.bisect.watch import watched

StateDtype = Literal["bf16", "f16", "f32"]
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)

WINDOW = 32
"""Tokens before each power of two that are looked at."""

BLOCK = 512
"""Tokens that are made, and fed to eager, at a time."""

MOST_HEADS = 16

Qkv = tuple[Tensor, Tensor, Tensor]
Advance = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Errors over the last `WINDOW` tokens before a position.

    Attributes:
        mean: Of their outputs as a whole.
        max: Of any of them, whose own output may be small.
    """

    position: int
    mean: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDrift:
    """One head of one layer.

    Attributes:
        rate: Its decay a token; it remembers 1 / rate tokens.
        points: By position.
        exact: The same with the state in f32, for scale.
    """

    layer: int
    head: int
    rate: float
    points: tuple[Point, ...]
    exact: tuple[Point, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A whole measurement.

    Attributes:
        source: What keys and values were.
    """

    name: str
    source: str
    tokens: int
    state_dtype: StateDtype
    heads: tuple[HeadDrift, ...]

    @property
    def worst(self) -> HeadDrift:
        """The head that has drifted farthest at the end."""
        return max(self.heads, key=lambda head: head.points[-1].max)

    def document(self) -> dict[str, Any]:
        """In JSON's types."""
        return {"kind": "drift", **asdict(self)}


def of_config(
    config: ModelConfig,
    name: str,
    *,
    tokens: int,
    state_dtype: StateDtype,
    heads: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Drift:
    """Measure with drawn keys and values.

    Args:
        heads: (layer, head) to look at; fast, middling and slow ones of the first, middle and last
            linear layer where empty.

    Raises:
        UsageError: The model has no linear layer, or fewer than 64 tokens are asked for.
    """
    _check(config, tokens)
    chosen = tuple(heads) or _spread(config)
    generator = torch.Generator().manual_seed(seed)

    def blocks() -> Iterator[Qkv]:
        for start in range(0, tokens, BLOCK):
            shape = (min(BLOCK, tokens - start), len(chosen), config.head_dim)
            q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
            yield q, k, v

    source = f"keys and values drawn from a normal distribution, seed {seed}"
    found = _measure(config, chosen, blocks(), tokens, state_dtype, advance)
    return Drift(
        name=name, source=source, tokens=tokens, state_dtype=state_dtype, heads=tuple(found)
    )  # fmt: skip


def of_model(
    module: LingModel,
    name: str,
    row: Sequence[int],
    *,
    state_dtype: StateDtype,
    advance: Advance = lambda _: None,
) -> Drift:
    """Measure with what a model makes of a row of tokens.

    Raises:
        UsageError: The model has no linear layer, or the row fewer than 64 tokens.
        InputError: What the model makes of the row is not finite.
    """
    config = module.config
    _check(config, len(row))
    chosen = _spread(config)

    def blocks() -> Iterator[Qkv]:
        state = module.new_state(1)
        for start in range(0, len(row), BLOCK):
            seen: dict[str, Tensor] = {}

            def keep(
                name: str, value: Tensor, _source: str, seen: dict[str, Tensor] = seen
            ) -> Tensor:
                if name.endswith(("attention.q", "attention.k", "attention.v")):
                    seen[name] = value
                return value

            with watched(module, keep):
                module.forward_hidden(torch.tensor([list(row[start : start + BLOCK])]), state)
            yield _of_heads(seen, chosen)

    found = _measure(config, chosen, blocks(), len(row), state_dtype, advance)
    return Drift(
        name=name, source="the model's own keys and values", tokens=len(row),
        state_dtype=state_dtype, heads=tuple(found),
    )  # fmt: skip


def _of_heads(seen: Mapping[str, Tensor], chosen: Sequence[tuple[int, int]]) -> Qkv:
    def stacked(which: str) -> Tensor:
        stem = "model.layers.{}.attention.{}"
        for layer, _ in chosen:
            if not bool(torch.isfinite(seen[stem.format(layer, which)]).all()):
                raise InputError(
                    f"a value is NaN or infinite: layer {layer}, attention.{which}",
                    hint="a weight of this or an earlier layer is damaged; `lingc parity SOUND "
                    "DAMAGED --bisect` finds it",
                )
        return torch.stack([seen[stem.format(layer, which)][:, h] for layer, h in chosen], dim=1)

    return stacked("q"), stacked("k"), stacked("v")


def _check(config: ModelConfig, tokens: int) -> None:
    if not config.linear_layers:
        raise UsageError("the model has no linear layer, so no state that could drift")
    if tokens < 2 * WINDOW:
        raise UsageError(
            f"drift over {tokens} tokens says nothing", hint=f"ask for at least {2 * WINDOW}"
        )


def _spread(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Heads from fast to slow of the first, middle and last linear layer."""
    layers, heads = config.linear_layers, config.num_attention_heads
    some = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    each = MOST_HEADS // len(some)
    step = max(1, -(-(heads - 1) // (each - 1)))
    few = sorted({*range(0, heads, step), heads - 1})
    return tuple((layer, head) for layer in some for head in few)


def _measure(
    config: ModelConfig,
    chosen: Sequence[tuple[int, int]],
    blocks: Iterator[Qkv],
    tokens: int,
    state_dtype: StateDtype,
    advance: Advance,
) -> Iterator[HeadDrift]:
    rates = torch.tensor(
        [float(config.decay(layer)[h]) for layer, h in chosen], dtype=torch.float64
    )
    ends = [1 << n for n in range(6, tokens.bit_length()) if 1 << n <= tokens]
    ends += [] if ends[-1] == tokens else [tokens]
    wanted = {t for end in ends for t in range(end - WINDOW, end)}
    shape = (len(chosen), config.head_dim, config.head_dim)
    exact = torch.zeros(shape, dtype=torch.float64)[None]
    narrow = {kind: torch.zeros(shape) for kind in dict.fromkeys((state_dtype, "f32"))}
    keep = torch.exp(-rates).float()[:, None, None]
    errors: dict[str, dict[int, Tensor]] = {kind: {} for kind in narrow}
    start = 0
    with torch.inference_mode():
        for q, k, v in blocks:
            a, b, c = (x.double()[None] for x in (q, k, v))
            right, exact = lightning_chunk(a, b, c, rates, exact, chunk=64)
            scaled = q * config.head_dim**-0.5
            for t in range(len(q)):
                outer = k[t][:, :, None] * v[t][:, None, :]
                for kind, state in narrow.items():
                    narrow[kind] = _rounded(keep * state + outer, kind)
                    if start + t in wanted:
                        o = (scaled[t][:, None, :] @ narrow[kind])[:, 0].double()
                        sizes = ((o - right[0, t]).norm(dim=-1), right[0, t].norm(dim=-1))
                        errors[kind][start + t] = torch.stack(sizes)
            start += len(q)
            advance(len(q))
    for place, (layer, head) in enumerate(chosen):
        yield HeadDrift(
            layer=layer, head=head, rate=float(rates[place]),
            points=_points(errors[state_dtype], ends, place),
            exact=_points(errors["f32"], ends, place),
        )  # fmt: skip


def _rounded(state: Tensor, kind: str) -> Tensor:
    return state if kind == "f32" else state.to(TORCH_DTYPE.get(kind, torch.float16)).float()


def _points(errors: Mapping[int, Tensor], ends: Sequence[int], place: int) -> tuple[Point, ...]:
    found = []
    for end in ends:
        error, size = torch.stack([errors[t][:, place] for t in range(end - WINDOW, end)]).T
        whole = float(error.norm() / size.norm())
        found.append(Point(position=end, mean=whole, max=float((error / size).max())))
    return tuple(found)
