"""`lingc recipes`: the precisions, and what each does to a model."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lingc.cli import output
from lingc.cli.output import Output, bytes_text

if TYPE_CHECKING:
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import Recipe


@click.command()
@click.argument("recipe", required=False, metavar="[NAME|FILE]")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A model, of which the config is enough: say what the recipe does to it.",
)
@output.options
def command(out: Output, *, recipe: str | None, checkpoint: Path | None) -> None:
    """List the built-in recipes, or describe one.

    A recipe says which matrix is stored how. It is a JSON file; a built-in one is a good start for
    another. A pattern that matches nothing in the model is an error.

    \b
    Examples:
      lingc recipes
      lingc recipes int4-fp8
      lingc recipes int4-fp8 --checkpoint artifacts/checkpoints/ling-2.6-flash
      lingc recipes mine.json --checkpoint DIR
      lingc recipes fp8 --json > mine.json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import built_in, load_recipe

    config = None if checkpoint is None else ModelConfig.from_file(checkpoint)
    if recipe is not None:
        _describe(out, load_recipe(recipe), config)
        return
    found = [load_recipe(name) for name in built_in()]
    if out.as_json:
        out.emit([one.document() for one in found])
        return
    columns: tuple[str, ...] = ("recipe", "activations", "what it stores how")
    rows: list[tuple[object, ...]] = [(one.name, one.activations, one.summary) for one in found]
    if config is not None:
        columns = (*columns, "weights")
        rows = [
            (*row, bytes_text(_bytes(one, config))) for row, one in zip(rows, found, strict=True)
        ]
    out.table(columns, rows)


def _describe(out: Output, recipe: "Recipe", config: "ModelConfig | None") -> None:
    from lingc.checkpoint import matrix_modules

    if config is not None:
        recipe.check_matches(matrix_modules(config))
    if out.as_json:
        document: dict[str, Any] = recipe.document()
        if config is not None:
            document = {"recipe": document, "modules": _modules(recipe, config)}
        out.emit(document)
        return
    out.line(f"{recipe.name}: {recipe.summary}")
    out.line(f"activations of FP8 matrices: {recipe.activations}")
    out.table(
        ("format", "modules", ""),
        [
            (rule.format, pattern, "optional" if rule.optional else "")
            for rule in recipe.rules
            for pattern in rule.modules
        ],
    )
    out.line("the first rule that matches decides; what none matches stays plain")
    if config is not None:
        rows = [
            (one["modules"], one["format"], one["matrices"], bytes_text(one["bytes"]))
            for one in _modules(recipe, config)
        ]
        out.table(("modules", "format", "matrices", "size"), rows, title="In this model")
        out.line(f"weights: {bytes_text(_bytes(recipe, config))}")


def _modules(recipe: "Recipe", config: "ModelConfig") -> list[dict[str, Any]]:
    """Matrices of one kind and format, folded over layers and experts."""
    from lingc.checkpoint.expected import expected_tensors
    from lingc.checkpoint.items import stored_bytes
    from lingc.checkpoint.outcomes import family_name

    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2:
            module = name.removesuffix(".weight")
            chosen = recipe.format_of(module)
            found[family_name(module), str(chosen)].append(stored_bytes(name, shape, chosen))
    return [
        {"modules": name, "format": kind, "matrices": len(sizes), "bytes": sum(sizes)}
        for (name, kind), sizes in found.items()
    ]


def _bytes(recipe: "Recipe", config: "ModelConfig") -> int:
    from lingc.checkpoint.expected import expected_tensors
    from lingc.checkpoint.items import stored_bytes
    from lingc.quantize.recipes import PLAIN

    return sum(
        stored_bytes(
            name,
            shape,
            recipe.format_of(name.removesuffix(".weight")) if len(shape) == 2 else PLAIN,
        )
        for name, shape in expected_tensors(config).items()
    )
