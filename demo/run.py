"""Build the shipped checkpoint three ways, let each engine speak, and hold each against eager.

Run by `make demo`. Engines and reports go to `artifacts/`, which git ignores.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from lingc.build import Built, build
from lingc.capture import Capturer
from lingc.cli.failure import cache_dir
from lingc.compile import Request
from lingc.errors import LingcError
from lingc.model.config import ModelConfig
from lingc.parity import page
from lingc.parity.run import Result, Settings
from lingc.parity.run import run as compare
from lingc.parity.side import MODES
from lingc.runtime.generate import Generator
from lingc.runtime.load import load
from lingc.runtime.sequence import Completion
from lingc.runtime.sequence import Request as Ask

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "artifacts/checkpoints/ling-tiny"
PRECISIONS = ("bf16", "fp8", "int4")
PROMPT = "def read_lines(path):\n"
"""The checkpoint knows Python and technical prose, and no facts."""

TOKENS = 48
ROWS = 8
ROW_TOKENS = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the summary."""

    precision: str
    built: Built
    build_s: float
    spoken: Completion
    same: Result
    loss: Result
    report: Path


def main() -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(f"checkpoint {CHECKPOINT.relative_to(ROOT)}, target cpu\n")
    capturer = Capturer(ModelConfig.from_file(CHECKPOINT))
    lines = [_one(precision, capturer, console) for precision in PRECISIONS]
    console.print(_table(lines))
    console.print(
        "KL: nats a token, engine against eager on the engine's own weights, the worst of all"
        " phases.\ntop-1 off: tokens with another winner where eager's margin exceeds 1e-3.\n"
        "The last two columns show what the precision costs."
    )
    for line in lines:
        console.print(f"report {line.report.relative_to(ROOT)}")
    failed = [line.precision for line in lines if not line.same.ok]
    if failed:
        console.print(f"over budget: {', '.join(failed)}")
    return 5 if failed else 0


def _one(precision: str, capturer: Capturer, console: Console) -> Line:
    package = ROOT / f"artifacts/ling-tiny-{precision}-cpu.ling"
    name = package.relative_to(ROOT)
    console.rule(precision, align="left")
    click.echo(f"$ lingc build {CHECKPOINT.relative_to(ROOT)} --precision {precision}")
    started = time.perf_counter()
    built = build(
        CHECKPOINT, package, Request(precision=precision), overwrite=True, capturer=capturer
    )
    build_s = time.perf_counter() - started
    click.echo(f"$ lingc run {name} --prompt {PROMPT!r} --mtp 1 --max-tokens {TOKENS}")
    spoken = _speak(package)
    click.echo(f"$ lingc parity {CHECKPOINT.relative_to(ROOT)} {name} --mode all")
    report = ROOT / f"artifacts/reports/{precision}.html"
    report.parent.mkdir(parents=True, exist_ok=True)
    same, loss = _parity(package, "engine"), _parity(package, "checkpoint")
    page.write(same, report)
    click.echo()
    return Line(
        precision=precision,
        built=built,
        build_s=build_s,
        spoken=spoken,
        same=same,
        loss=loss,
        report=report,
    )


def _speak(package: Path) -> Completion:
    """Stream a completion, with the draft layer where the engine has one."""
    with load(package, tokens=512) as engine:
        assert engine.tokenizer is not None
        drafts = 1 if "draft" in engine.plan.programs else 0
        ids = engine.tokenizer.encode(PROMPT)
        ask = Ask(tokens=tuple(ids), max_tokens=TOKENS, stop_ids=engine.stop_ids)
        generator = Generator(engine.backend, engine.tokenizer, drafts=drafts)
        click.echo(PROMPT, nl=False)
        (spoken,) = generator.generate(
            [ask], on_token=lambda event: click.echo(event.text, nl=False)
        )
    click.echo()
    return spoken


def _parity(package: Path, weights: str) -> Result:
    return compare(
        Settings(
            a=str(CHECKPOINT),
            b=str(package),
            cache_dir=cache_dir(),
            weights="engine" if weights == "engine" else "checkpoint",
            modes=MODES if weights == "engine" else ("prefill",),
            samples=ROWS,
            max_tokens=ROW_TOKENS,
        )
    )


def _table(lines: list[Line]) -> Table:
    table = Table(title="summary", title_justify="left")
    for column in (
        "precision", "package", "build", "tokens/round", "KL", "top-1 off", "verdict",
        "KL to BF16", "top-1 as BF16",
    ):  # fmt: skip
        table.add_column(column)
    for line in lines:
        size = sum(file.size for file in line.built.manifest.files.values())
        kl = max(mode.summary.mean_kl for mode in line.same.modes)
        differing = sum(mode.summary.top1_above_margin for mode in line.same.modes)
        loss = line.loss.modes[0].summary
        acceptance = line.spoken.acceptance
        table.add_row(
            line.precision,
            f"{size / 1e6:.1f} MB",
            f"{line.build_s:.1f} s",
            f"{1 + acceptance.mean_accepted:.2f}" if acceptance.rounds else "-",
            f"{kl:.1e}",
            str(differing),
            "within budget" if line.same.ok else "OVER BUDGET",
            f"{loss.mean_kl:.4f}",
            f"{loss.top1_agreement:.1%}",
        )
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LingcError as error:
        click.echo(f"demo: {error}", err=True)
        sys.exit(error.exit_code)
