"""Launches of the kernels that stand between a library's own layers (`triton_step`).

These run on every architecture from sm_89 on. Where our own launches are all there is, the ops of
the `launch` stage are faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lingc.kernel import Kernel, Launch, Operand, Rate, Tactic, Tensor, Workspace
from lingc.kernels import mla, rows
from lingc.kernels.rows import power
from lingc.op import Cost
from lingc.plan import TensorType

MODULE = "lingc.kernels.triton_step"

Argument = tuple[str, str, Operand]
"""Name, type and value of an argument."""


def launch(  # noqa: PLR0913 (a launch is what it is)
    function: str,
    grid: tuple[int, int, int],
    arguments: Sequence[Argument],
    constants: Mapping[str, int | float],
    *,
    module: str = MODULE,
    warps: int = 4,
    stages: int = 3,
    moved_bytes: float = 0.0,
    flops: float = 0.0,
    rate: Rate = "f32",
    features: tuple[str, ...] = (),
) -> Launch:
    """One launch of a function of a module of Triton kernels."""
    return Launch(
        kernel=Kernel(
            language="triton",
            source=f"{module}:{function}",
            entry=function,
            arguments=tuple((name, kind) for name, kind, _ in arguments),
            constants=tuple(constants.items()),
            warps=warps,
            stages=stages,
            features=features,
        ),
        grid=grid,
        operands=tuple(value for _, _, value in arguments),
        moved_bytes=moved_bytes,
        flops=flops,
        rate=rate,
        blocks_per_sm=max(1, 16 // warps),
    )


def pointers(**given: tuple[str, str | None]) -> list[Argument]:
    """Pointer arguments: name -> type and the tensor, None for a null pointer."""
    return [
        (name, kind, None if tensor is None else Tensor(tensor))
        for name, (kind, tensor) in given.items()
    ]


# --------------------------------------------------------------------------------- linear attention


def mixer_refusal(qkvg: TensorType, state: TensorType, norm_weight: TensorType) -> str | None:
    """Why the kernels do not take a linear-attention layer's step, or None."""
    wrong = rows.dtype_refusal(qkvg=qkvg, norm_weight=norm_weight)
    if wrong or state.dtype != "f32":
        return wrong or f"the state is {state.dtype}, not f32"
    return None


def mixer_tactics(  # noqa: PLR0913 (as many as the ops have)
    qkvg: TensorType, q_weight: TensorType, cos: TensorType, pending: TensorType,
    slots: TensorType, heads: int,
    *, groups: int, eps: float, verify: bool, needs: Cost,
) -> list[Tactic]:  # fmt: skip
    """`decode_mixer` and `verify_mixer`: norm and rope, the recurrence, group norm and gate."""
    (tokens, _), (sequences,), (width,) = (one.bind({}) for one in (qkvg, slots, q_weight))
    each, most = tokens // sequences, pending.bind({})[1]
    (first,) = rows.rope_heads(qkvg, q_weight, cos, heads, needs, eps, source="qkvg")[0].launches
    column, block = min(32, power(width)), power(width)
    whole = heads * width
    group = whole // groups
    moved = tokens * whole * 8.0 + 8.0 * sequences * heads * width * width
    named = {name: ("*bf16", name) for name in ("q", "k", "qkvg")}
    kept = {name: ("*bf16", name) for name in ("pending_k", "pending_v")}
    steps = launch(
        "step_states",
        (-(-width // column), heads, sequences),
        [
            *pointers(**named, decay=("*f32", "decay"), state=("*f32", "state"), **kept),
            *pointers(slots=("*i32", "slots"), accepted=("*i32", "accepted")),
            *pointers(positions=("*i32", "positions"), o=("*bf16", "o")),
            ("scale", "f32", width**-0.5),
            ("each", "i32", each),
        ],
        {
            "HEADS": heads, "K": width, "BK": block, "BV": column, "PENDING": most,
            "VERIFY": int(verify),
        },
        moved_bytes=moved,
        flops=4.0 * tokens * whole * width,
    )  # fmt: skip
    launches = [first, steps]
    if verify:
        launches.append(
            launch(
                "store_pending",
                (heads, sequences, 1),
                [
                    *pointers(k=("*bf16", "k"), qkvg=("*bf16", "qkvg"), **kept),
                    *pointers(slots=("*i32", "slots")),
                    ("each", "i32", each),
                ],
                {"HEADS": heads, "K": width, "BLOCK": block, "PENDING": most},
                warps=1,
                moved_bytes=8.0 * tokens * whole,
            )
        )
    launches.append(
        launch(
            "gate_columns",
            (tokens, groups, 1),
            [
                *pointers(o=("*bf16", "o"), qkvg=("*bf16", "qkvg")),
                *pointers(weight=("*bf16", "norm_weight"), y=("*bf16", "y")),
                ("tokens", "i32", tokens),
                ("eps", "f32", eps),
            ],
            {"GROUPS": groups, "WIDTH": group, "BLOCK": power(group), "ROWS": 1},
            moved_bytes=6.0 * tokens * whole,
        )
    )  # fmt: skip
    spaces = tuple(Workspace(name=name, bytes=2 * tokens * whole) for name in ("q", "k", "o"))
    return [Tactic(name=f"steps.cols{column}", launches=tuple(launches), workspaces=spaces)]


# ---------------------------------------------------------------------------------------------- MLA


def latent_tactics(
    a: TensorType, q_weight: TensorType, kv_weight: TensorType, cos: TensorType, eps: float
) -> list[Tactic]:
    """`mla_latent`: the norm of the first columns, and rows of the cache from the last ones."""
    (tokens, pitch), (rank,), (latent,) = (one.bind({}) for one in (a, q_weight, kv_weight))
    given = mla.Rows(
        tokens=tokens, pitch=pitch, latent=latent, pairs=cos.bind({})[1], eps=eps
    )  # fmt: skip
    norm = launch(
        "norm_columns",
        (tokens, 1, 1),
        [
            *pointers(x=("*bf16", "a"), weight=("*bf16", "q_weight"), y=("*bf16", "cq")),
            ("tokens", "i32", tokens),
            ("eps", "f32", eps),
        ],
        {"PITCH": pitch, "WIDTH": rank, "BLOCK": power(rank), "ROWS": 1},
        moved_bytes=4.0 * tokens * rank,
    )
    return [
        Tactic(name=one.name, launches=(norm, *one.launches)) for one in mla.latent_tactics(given)
    ]


def absorbed_tactics(sizes: mla.Sizes, splits: int) -> list[Tactic]:
    """`mla_absorbed_attention`: queries that are turned already, attention on latents."""
    none = mla.Rows(tokens=sizes.tokens, pitch=1, latent=sizes.latent, pairs=1, eps=0.0)
    tokens, block = 16, min(sizes.latent, 128)
    runs = -(-sizes.tokens // tokens)
    weights = sizes.heads * sizes.nope * sizes.latent
    absorb = launch(
        "absorb_turned",
        (sizes.heads, sizes.latent // block, runs),
        [
            *pointers(q=("*bf16", "q"), w_k=("*bf16", "w_k"), queries=("*bf16", "queries")),
            ("tokens", "i32", sizes.tokens),
        ],
        {
            "SCALE": sizes.scale * mla.LOG2_E, "HEADS": sizes.heads, "NOPE": sizes.nope,
            "ROPE": sizes.rope, "LATENT": sizes.latent, "TOKENS": tokens, "BLOCK": block,
            "WIDE": 0,
        },
        moved_bytes=2.0 * weights,
        flops=2.0 * weights * runs * tokens,
        rate="bf16",
    )  # fmt: skip
    return [
        Tactic(
            name=one.name,
            # Rows are in the cache and queries are turned: what stands behind these two is alike.
            launches=(absorb, one.launches[2], _to_out(one.launches[3])),
            workspaces=one.workspaces,
            config=one.config,
        )
        for one in mla.absorbed_tactics(sizes, none, splits)
    ]


def _to_out(one: Launch) -> Launch:
    """The launch with its result `y` as the one that has no name of its own."""
    operands = tuple(Tensor("out") if value == Tensor("y") else value for value in one.operands)
    return replace(one, operands=operands)
