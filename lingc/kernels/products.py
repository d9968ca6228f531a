"""Launches of products with matrices as checkpoints store them (`triton_products`)."""

from dataclasses import dataclass

from lingc.kernel import Launch, Tactic, Workspace
from lingc.kernels.portable import MODULE as STEP
from lingc.kernels.portable import launch, pointers
from lingc.kernels.rows import power

MODULE = "lingc.kernels.triton_products"

BF16, FP8, INT4 = range(3)
FORMATS = {"bf16": BF16, "fp8": FP8, "int4": INT4}
PLAIN, CODED, QUANTIZED = range(3)

BLOCK = 128
SPAN = 1024
"""Pairs that a block looks at together."""

_WEIGHT = {"bf16": "*bf16", "fp8": "*f8e4m3", "int4": "*i32"}
_SCALE = {"bf16": "*f32", "fp8": "*f32", "int4": "*bf16"}
_BITS = {"bf16": 16, "fp8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a matrix and the rows that it is multiplied with are stored.

    Attributes:
        stored: `bf16`, `fp8` or `int4`.
        act: PLAIN, CODED or QUANTIZED.
        group: Of INT4 along K.
    """

    stored: str
    act: int = PLAIN
    group: int = 0

    @property
    def step(self) -> int:
        """Channels multiplied together: no more than share a scale."""
        return {"bf16": 64, "fp8": BLOCK}.get(self.stored) or min(self.group, BLOCK)

    @property
    def features(self) -> tuple[str, ...]:
        return ("fp8",) if self.stored == "fp8" else ()

    def constants(self, depth: int, rows: int, cols: int) -> dict[str, int]:
        return {
            "DEPTH": depth, "FORMAT": FORMATS[self.stored], "ACT": self.act,
            "GROUP": self.group or BLOCK, "STEP": self.step, "ROWS": rows, "COLS": cols, "WIDE": 0,
        }  # fmt: skip

    def refusal(self, act: str) -> str | None:
        """Why the kernels do not take it, or None; `act` is the dtype of activations."""
        if act != "bf16":
            return f"activations are {act}; the kernels take bf16"
        if self.stored == "int4" and (self.group < 16 or self.group != power(self.group)):
            return f"groups of {self.group} are not a power of two from 16 on"
        return None


def _tiles(tokens: float) -> tuple[tuple[int, int, int], ...]:
    """Rows, columns and warps worth choosing between."""
    return ((16, 32, 4), (16, 64, 4)) if tokens <= 16 else ((64, 64, 4), (128, 64, 8))


def dense(  # noqa: PLR0913 (a product is what it is)
    form: Form, tokens: int, out: int, depth: int, *, x: str, scales: str | None, weight: str,
    scale: str | None, y: str, wide: bool,
) -> list[tuple[str, Launch]]:  # fmt: skip
    """Y [T, out] of x [T, depth], f32 where `wide`: name and launch of each way."""
    found = []
    for rows, cols, warps in _tiles(tokens):
        bits = _BITS[form.stored]
        one = launch(
            "dense_products",
            (-(-out // cols), -(-tokens // rows), 1),
            [
                *pointers(x=("*f8e4m3" if form.act == CODED else "*bf16", x)),
                *pointers(scales=("*f32", scales), weight=(_WEIGHT[form.stored], weight)),
                *pointers(scale=(_SCALE[form.stored], scale), y=("*f32" if wide else "*bf16", y)),
                ("tokens", "i32", tokens),
            ],
            {"OUT": out, **form.constants(depth, rows, cols)},
            module=MODULE,
            warps=warps,
            moved_bytes=out * depth * bits / 8 + 2.0 * tokens * (out + depth),
            flops=2.0 * out * depth * -(-tokens // rows) * rows,
            rate="bf16",
            features=form.features,
        )
        found.append((f"rows{rows}.cols{cols}.w{warps}", one))
    return found


def linear_tactics(  # noqa: PLR0913
    form: Form, tokens: int, out: int, depth: int, *, x: str, scales: str | None, scale: str | None,
    weight: str, wide: bool,
) -> list[Tactic]:  # fmt: skip
    """One launch each."""
    made = dense(
        form, tokens, out, depth, x=x, scales=scales, weight=weight, scale=scale, y="out", wide=wide
    )
    return [Tactic(name=name, launches=(one,)) for name, one in made]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Sizes of a layer's routed experts.

    Attributes:
        adds: Whether the sum begins with `base`.
        x: Name of the rows.
        scales: Name of their scales, for codes.
    """

    tokens: int
    top_k: int
    experts: int
    inner: int
    width: int
    form: Form
    adds: bool
    x: str = "x"
    scales: str | None = None


def expert_tactics(sizes: Experts) -> list[Tactic]:
    """Lists of each expert's pairs, both products over them, and a token's sum."""
    pairs = sizes.tokens * sizes.top_k
    stored, form = sizes.form.stored, sizes.form
    again = Form(
        stored=stored, act=PLAIN if form.act == PLAIN else QUANTIZED, group=form.group
    )  # fmt: skip
    scale = (None, None) if stored == "bf16" else ("gate_up_scale", "down_scale")
    count = power(sizes.experts)
    lists = {"EXPERTS": sizes.experts, "COUNT": count}
    hit = min(pairs, sizes.experts)
    moved = hit * sizes.inner * sizes.width * _BITS[stored] / 8
    before = _lists(pairs, sizes.experts, count)
    after = _sum(sizes)
    found = []
    for rows, cols, warps in _tiles(pairs / sizes.experts):
        tiles = min(pairs, sizes.experts) + pairs // rows
        gates = launch(
            "expert_gates",
            (-(-sizes.inner // cols), tiles, 1),
            [
                *pointers(x=("*f8e4m3" if form.act == CODED else "*bf16", sizes.x)),
                *pointers(scales=("*f32", sizes.scales), gate_up=(_WEIGHT[stored], "gate_up")),
                *pointers(scale=(_SCALE[stored], scale[0]), listed=("*i32", "listed")),
                *pointers(starts=("*i32", "starts"), a=("*bf16", "inner")),
            ],
            {
                "INNER": sizes.inner, **lists, "SLOTS": sizes.top_k,
                **form.constants(sizes.width, rows, cols),
            },
            module=MODULE, warps=warps, moved_bytes=2 * moved, rate="bf16",
            flops=4.0 * sizes.inner * sizes.width * tiles * rows, features=form.features,
        )  # fmt: skip
        outs = launch(
            "expert_rows",
            (-(-sizes.width // cols), tiles, 1),
            [
                *pointers(a=("*bf16", "inner"), down=(_WEIGHT[stored], "down")),
                *pointers(scale=(_SCALE[stored], scale[1]), listed=("*i32", "listed")),
                *pointers(starts=("*i32", "starts"), parts=("*f32", "parts")),
            ],
            {"OUT": sizes.width, **lists, **again.constants(sizes.inner, rows, cols)},
            module=MODULE, warps=warps, moved_bytes=moved, rate="bf16",
            flops=2.0 * sizes.inner * sizes.width * tiles * rows, features=form.features,
        )  # fmt: skip
        spaces = (
            Workspace(name="counts", bytes=4 * sizes.experts),
            Workspace(name="listed", bytes=4 * pairs),
            Workspace(name="starts", bytes=4 * (sizes.experts + 1)),
            Workspace(name="inner", bytes=2 * pairs * sizes.inner),
            Workspace(name="parts", bytes=4 * pairs * sizes.width),
        )
        found.append(
            Tactic(
                name=f"pairs.rows{rows}.cols{cols}.w{warps}",
                launches=(*before, gates, outs, after),
                workspaces=spaces,
                config={"rows": rows, "cols": cols, "warps": warps},
            )
        )
    return found


def _lists(pairs: int, experts: int, count: int) -> tuple[Launch, ...]:
    """Pairs by expert."""
    return (
        launch(
            "count_pairs",
            (experts, 1, 1),
            [*pointers(ids=("*i32", "ids"), counts=("*i32", "counts")), ("pairs", "i32", pairs)],
            {"SPAN": SPAN},
            module=MODULE,
            moved_bytes=4.0 * pairs,
        ),
        launch(
            "list_pairs",
            (experts, 1, 1),
            [
                *pointers(ids=("*i32", "ids"), counts=("*i32", "counts")),
                *pointers(listed=("*i32", "listed"), starts=("*i32", "starts")),
                ("pairs", "i32", pairs),
            ],
            {"EXPERTS": experts, "COUNT": count, "SPAN": SPAN},
            module=MODULE,
            moved_bytes=8.0 * pairs,
        ),
    )


def _sum(sizes: Experts) -> Launch:
    cols = min(1024, power(sizes.width))
    return launch(
        "add_pairs",
        (sizes.tokens, -(-sizes.width // cols), 1),
        [
            *pointers(parts=("*f32", "parts"), ids=("*i32", "ids"), weights=("*f32", "weights")),
            *pointers(base=("*bf16", "base" if sizes.adds else None), y=("*bf16", "out")),
        ],
        {"OUT": sizes.width, "SLOTS": sizes.top_k, "COLS": cols, "ADD": int(sizes.adds)},
        module=MODULE,
        moved_bytes=sizes.tokens * sizes.width * (4.0 * sizes.top_k + 4),
    )


def router_tactics(
    tokens: int, width: int, experts: int, groups: int, kept: int, top: int, scale: float,
    *, normalize: bool,
) -> list[Tactic]:  # fmt: skip
    """Logits, then the choice of each token."""
    choose = launch(
        "choose_experts",
        (tokens, 1, 1),
        [
            *pointers(logits=("*f32", "logits"), bias=("*f32", "bias"), ids=("*i32", "ids")),
            *pointers(weights=("*f32", "weights")),
            ("scale", "f32", scale),
        ],
        {
            "EXPERTS": experts, "COUNT": power(experts), "GROUPS": groups, "BANDS": power(groups),
            "KEPT": kept, "TOP": top, "SLOTS": power(top), "NORMALIZE": int(normalize),
        },
        module=STEP,
        warps=1,
        moved_bytes=4.0 * tokens * experts,
    )  # fmt: skip
    made = dense(
        Form(stored="bf16"), tokens, experts, width, x="x", scales=None, weight="weight",
        scale=None, y="logits", wide=True,
    )  # fmt: skip
    space = Workspace(name="logits", bytes=4 * tokens * experts)
    return [Tactic(name=name, launches=(one, choose), workspaces=(space,)) for name, one in made]
