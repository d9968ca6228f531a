"""`lingc passes`: what each rewrite must do to a model, and what it did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from lingc.cli import output
from lingc.cli.interrupts import held
from lingc.cli.output import Output
from lingc.errors import StageError
from lingc.plan import PHASES


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--precision", metavar="NAME|FILE", help="A recipe (default: the checkpoint's own).")
@click.option("--target", default="cpu", show_default=True, help="See `lingc targets`.")
@click.option(
    "--dump-ir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the program after each stage here.",
)
@click.option("--all", "show_all", is_flag=True, help="Also passes with nothing to do.")
@output.options
def command(
    out: Output,
    checkpoint: Path,
    precision: str | None,
    target: str,
    dump_ir: Path | None,
    *,
    show_all: bool,
) -> None:
    """Show how often each pass must fire, how often it did, and why not.

    Needs a config and no weights. The numbers that must be reached follow from the config; a build
    fails where one is missed. Exit status 8 if one is missed here.

    \b
    Examples:
      lingc passes artifacts/checkpoints/ling-tiny
      lingc passes artifacts/checkpoints/ling-2.6-flash --precision fp8 --target h20
      lingc passes artifacts/checkpoints/ling-tiny --dump-ir ir/ --json
    """  # noqa: D301 click's mark for a block that is not rewrapped
    from dataclasses import asdict

    with held():
        from lingc import compile as compiler
        from lingc import pipeline, plan_text, targets
    from lingc.model.config import ModelConfig
    from lingc.quantize.recipes import load_recipe

    device = targets.get(target)
    config = ModelConfig.from_file(checkpoint)
    recipe = load_recipe(precision or compiler.default_precision(None, config))
    request = compiler.Request(
        precision=recipe.name, target=target, waive=pipeline.names(), dump_dir=dump_ir
    )
    report, failure, steps = pipeline.Report(), None, dict[str, dict[int, int]]()
    try:
        compiled = compiler.compile_plan(
            config,
            recipe,
            device,
            has_mtp=config.has_mtp,
            request=request,
            stage=out.stage,
            report=report,
        )
        steps = {phase: plan_text.step_counts(p) for phase, p in compiled.plan.programs.items()}
    except StageError as error:
        failure = error  # the table says where; what it cannot say is raised below
    lines = [line for line in report.lines if show_all or line.found or line.expected]
    missed = [line for line in report.lines if line.missed]
    if failure is not None and not missed:
        raise failure
    if out.as_json:
        out.emit(
            {
                "config": str(checkpoint),
                "precision": recipe.name,
                "target": target,
                "missed": len(missed),
                "passes": [{**asdict(line), "missed": line.missed} for line in lines],
                "steps": steps,
            }
        )
    else:
        order = [(stage.name, rule.name) for stage in pipeline.PIPELINE for rule in stage.rules]
        _table(out, sorted(lines, key=lambda line: order.index((line.stage, line.name))))
        for phase, each in steps.items():
            layers = sorted(count for layer, count in each.items() if layer >= 0)
            out.line(f"{phase}: {sum(each.values())} steps, {layers[0]} to {layers[-1]} in a layer")
        for line in missed:
            out.line(f"{line.phase}: {pipeline.sentence(line)}")
        if failure is not None:
            out.note(f"the phases behind were not run: {failure.problem.splitlines()[0]}")
    if missed:
        click.get_current_context().exit(8)


def _table(out: Output, lines: Sequence[Any]) -> None:
    """One row a pass, one column a phase: found/expected."""
    phases = [phase for phase in PHASES if any(line.phase == phase for line in lines)]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        wanted = "" if line.expected is None else f"/{line.expected}"
        refused = f" ({len(line.refused)} refused)" if line.refused else ""
        row = rows.setdefault((line.stage, line.name), {})
        row[line.phase] = f"{line.found}{wanted}{refused}" + (" MISSED" if line.missed else "")
    columns = ("stage", "pass", *phases)
    out.table(
        columns,
        [(stage, name, *(row.get(p) for p in phases)) for (stage, name), row in rows.items()],
        title="found / expected",
    )
