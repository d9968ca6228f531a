"""`lingc plan`: what a model needs and what fits, without building it."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import output
from lingc.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from lingc.model.config import ModelConfig
    from lingc.sizing import Sizing

UNITS: Mapping[str, int] = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
VERDICTS: Mapping[str | None, str] = {
    "fits": "fits", "tight": "tight", "no": "does not fit", None: "not known",
}  # fmt: skip


class Counts(click.ParamType[tuple[int, ...]]):
    """Positive numbers with commas between: `1,16`."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(re.fullmatch(r"[1-9][0-9]{0,8}", word) for word in words):
            self.fail(f"{value!r} is not a list of positive numbers like 1,16", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


class Size(click.ParamType[int]):
    """Bytes with their unit: `64GB`, `80GiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([MG]i?B)", str(value))
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is not a size like 64GB or 80GiB", param, ctx)
        return int(float(found[1]) * UNITS[found[2]])


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    metavar="NAME|FILE",
    help="A recipe: bf16, fp8, fp8-max, int4, int4-fp8, int4-all, or a file (default: the"
    " checkpoint's own layout).",
)
@click.option("--target", default="cpu", show_default=True, help="See `lingc targets`.")
@click.option(
    "--batch", type=Counts(), metavar="N,...", default="1,16", show_default=True,
    help="Sequences at once.",
)  # fmt: skip
@click.option(
    "--context", type=Counts(), metavar="N,...", default="4096,65536", show_default=True,
    help="Tokens of each sequence, prompt and completion.",
)  # fmt: skip
@click.option(
    "--tp", type=Counts(), metavar="N,...", default="1", show_default=True,
    help="GPUs that share one model by tensor parallelism.",
)  # fmt: skip
@click.option(
    "--mtp/--no-mtp", default=None, help="With the MTP layer or without (default: if it is there)."
)
@click.option(
    "--max-draft", type=click.IntRange(0, 15), default=3, show_default=True,
    help="As for `build`.",
)  # fmt: skip
@click.option(
    "--page-size", type=click.IntRange(2, 1024), default=64, show_default=True,
    help="As for `build`.",
)  # fmt: skip
@click.option(
    "--widen",
    type=click.Choice(("auto", "load", "step")),
    default="auto",
    show_default=True,
    help="As for `build`; CPU only.",
)
@click.option(
    "--memory", type=Size(), metavar="SIZE",
    help="Judge by this much memory, like 64GB, in place of the target's.",
)  # fmt: skip
@output.options
def command(
    out: Output,
    checkpoint: Path,
    precision: str | None,
    target: str,
    batch: tuple[int, ...],
    context: tuple[int, ...],
    tp: tuple[int, ...],
    mtp: bool | None,  # noqa: FBT001 click's calling convention
    max_draft: int,
    page_size: int,
    widen: str,
    memory: int | None,
) -> None:
    """Tell how much memory a model needs on each device, what fits, and how fast it can be at best.

    CHECKPOINT is a checkpoint directory or a config.json; no weights are read and nothing is
    built. Weights, state and cache are exact bytes. Workspace is an estimate from the shapes of
    the plan. What fits leaves 5 % of the memory free for what is not counted: driver, code,
    fragmentation; `tight` leaves less. Tokens a second are a bound, from the bytes that a step must
    move and the datasheet's bandwidth; experts are counted under uniform routing. The exit status
    is 0 whatever the verdict.

    \b
    Examples:
      lingc plan artifacts/checkpoints/ling-2.6-flash --precision fp8 --target h20-3e
      lingc plan artifacts/checkpoints/ling-2.6-flash --precision bf16 --target h20 --tp 1,2,4
      lingc plan artifacts/checkpoints/ling-tiny --memory 8GB --batch 1 --context 4096 --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc import targets
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import load_recipe
    from lingc.sizing import Sizing, own_precision

    device = targets.get(target)
    config = ModelConfig.from_file(checkpoint)
    recipe = load_recipe(precision or own_precision(config))
    has_mtp = _has_mtp(checkpoint, config) if mtp is None else mtp
    sizings = [
        Sizing(
            config=config,
            recipe=recipe,
            target=device,
            has_mtp=has_mtp,
            max_draft=max_draft,
            page_size=page_size,
            ranks=ranks,
            widen=widen,
            memory_bytes=memory,
        )
        for ranks in tp
    ]
    if out.as_json:
        out.emit(_document(checkpoint, sizings, batch, context))
    else:
        _tell(out, sizings, batch, context)


def _has_mtp(path: Path, config: "ModelConfig") -> bool:
    """Whether the MTP layer is there: its weights, where there are any weights to look at."""
    from lingc.checkpoint import open_checkpoint

    if not config.has_mtp or path.is_file() or not any(path.glob("*.safetensors*")):
        return config.has_mtp
    return open_checkpoint(path).has_mtp


# -------------------------------------------------------------------------------------------- JSON


def _document(
    path: Path, sizings: list["Sizing"], batches: tuple[int, ...], contexts: tuple[int, ...]
) -> dict[str, Any]:
    from lingc.sizing import MARGIN, PREFILL_TOKENS

    first = sizings[0]
    return {
        "config": path,
        "precision": first.recipe.name,
        "target": first.target.name,
        "memory_bytes": first.budget,
        "bandwidth_bytes_per_s": first.target.hbm_bytes_per_s,
        "mtp": first.has_mtp,
        "max_draft": first.max_draft,
        "page_size": first.page_size,
        "prefill_tokens": PREFILL_TOKENS,
        "margin": MARGIN,
        "widen": first.widening,
        "stored_weight_bytes": first.stored_bytes,
        "max_position_embeddings": first.config.max_position_embeddings,
        "tp": [
            {
                "ranks": sizing.ranks,
                "shares_are_equal": not sizing.is_uneven,
                "norm_groups_are_whole": not sizing.splits_groups,
                "parts": {
                    part: {"held_bytes": held, "read_bytes": round(read)}
                    for part, (held, read) in sizing.part_bytes().items()
                },
                "rows": [_row(sizing, b, c) for b in batches for c in contexts],
                "largest_batch": {c: sizing.largest_batch(c) for c in contexts},
                "largest_context": {b: sizing.largest_context(b) for b in batches},
            }
            for sizing in sizings
        ],
    }


def _row(sizing: "Sizing", batch: int, context: int) -> dict[str, Any]:
    needed = sizing.memory(batch, context)
    moved = sizing.traffic(batch, context)
    row: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "memory_bytes": {**asdict(needed), "total": needed.total},
        "verdict": sizing.verdict(needed),
        "headroom_bytes": None if sizing.budget is None else sizing.budget - needed.total,
        "step_bytes": {
            name: round(value)
            for name, value in {**asdict(moved), "total": moved.total}.items()
            if name != "experts"
        },
        "distinct_experts": moved.experts,
        "tokens_per_s_bound": sizing.tokens_per_s(batch, context),
    }
    if sizing.has_mtp and sizing.max_draft:
        round_bytes = sizing.round_bytes(batch, context, sizing.max_draft)
        row["draft_bytes"] = round(sizing.draft_bytes(batch, context))
        row["round_bytes"] = round(round_bytes)
        row["break_even_tokens_a_round"] = round_bytes / moved.total
    return row


# ------------------------------------------------------------------------------------------ tables


def _tell(
    out: Output, sizings: list["Sizing"], batches: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    first = sizings[0]
    drafts = f"up to {first.max_draft} drafts a round" if first.has_mtp else "no MTP layer"
    known = "of unknown size" if first.budget is None else bytes_text(first.budget)
    out.line(f"{first.recipe.name} for {first.target.name}: {first.target.title}")
    out.line(f"memory {known}, weights {bytes_text(first.stored_bytes)} in files, {drafts}")
    _weights_table(out, sizings)
    _rows_table(out, sizings, batches, contexts)
    if first.budget is not None:
        _capacity_table(out, sizings, batches, contexts)
    _notes(out, sizings, contexts)


def _weights_table(out: Output, sizings: list["Sizing"]) -> None:
    found = {sizing.ranks: sizing.part_bytes() for sizing in sizings}
    several = len(found) > 1 or sizings[0].ranks > 1
    columns = [
        f"tp {ranks}: {what}" if several else what
        for ranks in found
        for what in ("in memory", "read a token")
    ]
    rows = [
        (name, *(bytes_text(size) for parts in found.values() for size in parts[name]))
        for name in next(iter(found.values()))
    ]
    sums = [sum(each[i] for each in parts.values()) for parts in found.values() for i in (0, 1)]
    rows.append(("all", *map(bytes_text, sums)))
    out.table(("weights", *columns), rows, title="weights, and what a token reads at batch 1")
    first = sizings[0]
    if first.widening is not None:
        mapped = sum(form.mapped for form in first.forms.values())
        when = "while loading" if first.widening == "load" else "in every step"
        out.line(
            f"widened to FP32 {when}: {bytes_text(mapped)} stay in the file, mapped;"
            f" {bytes_text(sums[0] - mapped)} are the process's own"
        )


def _rows_table(
    out: Output, sizings: list["Sizing"], batches: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    columns = ("tp", "batch", "context", "weights", "state", "cache", "workspace ~", "total",
               "verdict", "free", "experts", "GB a step", "tok/s <=")  # fmt: skip
    rows = []
    for sizing in sizings:
        for batch in batches:
            for context in contexts:
                needed, moved = sizing.memory(batch, context), sizing.traffic(batch, context)
                bound = sizing.tokens_per_s(batch, context)
                sizes = (needed.weights, needed.state, needed.cache, needed.workspace, needed.total)
                free = None if sizing.budget is None else sizing.budget - needed.total
                rows.append(
                    (
                        *(sizing.ranks, batch, context),
                        *map(bytes_text, sizes),
                        VERDICTS[sizing.verdict(needed)],
                        None if free is None or free < 0 else bytes_text(free),
                        f"{moved.experts:.3g}",
                        f"{moved.total / 1e9:.3g}",
                        None if bound is None else f"{bound:.0f}",
                    )
                )
    each = "each GPU" if any(sizing.ranks > 1 for sizing in sizings) else "the device"
    out.table(columns, rows, title=f"memory of {each}, and what one decode step moves")


def _capacity_table(
    out: Output, sizings: list["Sizing"], batches: tuple[int, ...], contexts: tuple[int, ...]
) -> None:
    rows: list[tuple[object, ...]] = []
    for sizing in sizings:
        limit = sizing.config.max_position_embeddings
        for context in contexts:
            most = sizing.largest_batch(context) or "none"
            rows.append((sizing.ranks, f"sequences of {context} tokens", most))
        for batch in batches:
            tokens = sizing.largest_context(batch) or "none"
            if isinstance(tokens, int) and tokens >= limit:
                tokens = f"{limit}, all that the model was made for"
            rows.append((sizing.ranks, f"tokens of {batch} sequence(s)", tokens))
    out.table(("tp", "most", "that fit"), rows)


def _notes(out: Output, sizings: list["Sizing"], contexts: tuple[int, ...]) -> None:
    first = sizings[0]
    limit = first.config.max_position_embeddings
    if max(contexts) > limit:
        out.note(f"the model was made for {limit} positions; longer contexts need its YaRN entries")
    for sizing in sizings:
        if sizing.splits_groups:
            out.note(
                f"tp {sizing.ranks} splits a group of the norm after linear attention"
                f" ({sizing.config.group_norm_size} groups): one more exchange a linear layer"
            )
        if sizing.is_uneven:
            out.note(f"tp {sizing.ranks} has unequal shares; the largest is shown")
    if any(sizing.ranks > 1 for sizing in sizings):
        out.note(
            "tp: shares by the axes that the plan names; this version builds no split engine."
            " The bound counts no all-reduce"
        )
    if first.has_mtp and first.max_draft:
        moved = first.traffic(1, contexts[0]).total
        even = first.round_bytes(1, contexts[0], first.max_draft) / moved
        out.note(
            f"{first.max_draft} drafts a round pay, where bandwidth is what limits, from"
            f" {even:.2f} tokens a round at batch 1"
        )
    if first.target.default_engine == "tensorrt" and any(
        rule.format.kind == "int4_group" and any(".mlp.experts." not in m for m in rule.modules)
        for rule in first.recipe.rules
    ):
        out.note(
            "a TensorRT engine of each phase holds its own INT4 constants of products other than"
            " experts: counted once here"
        )
    out.note("~ is an estimate; the rest is exact. See `lingc plan --help`")
