"""Writes the pages that the code says itself: passes, ops, targets, command line.

    python docs/generate.py            write docs/{passes,ops,targets,cli}.md
    python docs/generate.py --check    name the pages that are not current; exit 1 if there is one

What they say is written in docstrings, tables and help texts, and changed there.
"""
# ruff: noqa: INP001 (a script, not a package)

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from lingc import pipeline, targets
from lingc.cli import VERBS, lingc, module_of
from lingc.context import Context
from lingc.model.config import ModelConfig
from lingc.op import Op
from lingc.plan import PHASES
from lingc.plugins import table as ops
from lingc.quantize.recipes import load_recipe
from lingc.rewrite import Rewrite
from lingc.targets import cpu, nvidia
from lingc.targets.spec import KIB, MIB, Target

DOCS = Path(__file__).parent
RECORDS = DOCS.parent / "artifacts" / "bench"
FULL = DOCS.parent / "artifacts" / "checkpoints" / "ling-2.6-flash"
WIDTH = 92

ELSEWHERE = "rtx-120"
"""A target whose engine launches other kernels than ours."""

MARK = "<!-- Made by docs/generate.py from the code. Change it there. -->"


def main(arguments: Sequence[str]) -> int:
    if list(arguments) not in ([], ["--check"]):
        click.echo("usage: python docs/generate.py [--check]", err=True)
        return 2
    made = pages()
    stale = [name for name, text in made.items() if not is_current(name, text)]
    for name in stale:
        if arguments:
            click.echo(f"docs/{name} is not current: run `python docs/generate.py`", err=True)
        else:
            (DOCS / name).write_text(made[name], encoding="utf-8")
            click.echo(f"wrote docs/{name}")
    return 1 if stale and arguments else 0


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    made = {
        "passes.md": _passes(),
        "ops.md": _ops(),
        "kernels.md": _kernels(),
        "targets.md": _targets(),
        "cli.md": _cli(),
    }
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


def is_current(name: str, text: str) -> bool:
    """Whether the file says what it would be written with."""
    path = DOCS / name
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _page(title: str, module: ModuleType | None = None) -> list[str]:
    return [MARK, "", f"# {title}", "", *([_doc(module), ""] if module else [])]


def _doc(module: ModuleType) -> str:
    """The docstring; what is indented in it stands apart, so that it is shown as it is."""
    found = inspect.getdoc(module)
    assert found, f"{module.__name__} has no docstring"
    lines: list[str] = []
    for line in found.splitlines():
        if line.startswith("    ") and lines and lines[-1] and not lines[-1].startswith("    "):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _row(cells: Iterable[object]) -> str:
    shown = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(shown)} |"


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [_row(columns), _row("---" for _ in columns), *map(_row, rows), ""]


def _room(module: ModuleType) -> str:
    """`passes/fuse_router.py` of `lingc.passes.fuse_router`."""
    return module.__name__.removeprefix("lingc.").replace(".", "/") + ".py"


# ----------------------------------------------------------------------------------------- kernels


def _kernels() -> list[str]:
    """From the records under artifacts/bench: only what was measured is told."""
    lines = [
        *_page("Kernels"),
        (
            "How fast the kernels of ops are, by the records in"
            " [`artifacts/bench`](../artifacts/bench)."
        ),
        (
            "`lingc bench-ops` makes them: binaries compiled ahead of time, held to the references"
            " in FP64 first, then timed as nodes of one graph over cold data."
        ),
        "A time holds the hand-off to the next call.",
        (
            "One with a star is of a shape whose own reference did not fit then: smaller ones had"
            " gone through the gate. On an H100 it has since found no shape wrong, large ones at"
            " some rows, and as far as their references fit in its 80 GB."
        ),
        "Read and copy are what kernels with nothing to compute reached in the same process.",
        "A commit with a plus is one that the files measured had gone on from.",
        "What the kernels are, and why, is in [decision 5](decisions/0005-kernels.md).",
        "",
    ]
    for path in sorted(RECORDS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] == "bench-ops":
            lines += _measured_ops(path.name, record)
        elif record["kind"] == "bench-step":
            lines += _measured_steps(path.name, record)
    if not any(RECORDS.glob("*.json")):
        lines += ["There is no record yet."]
    return lines


def _measured_ops(name: str, record: Mapping[str, Any]) -> list[str]:
    device, ceilings = record["device"], record["ceilings"]
    fastest: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for row in record["timings"]:
        key = (row["op"], row["benchmark"], row["tokens"])
        if key not in fastest or row["microseconds"][1] < fastest[key]["microseconds"][1]:
            fastest[key] = row
    rows = [
        (
            f"`{op}`",
            benchmark,
            tokens,
            f"`{row['tactic']}`",
            f"{row['microseconds'][1]:.2f}" + ("" if row["gated"] else " *"),
            f"{row['bytes_per_s'] / 1e9:.0f}",
            f"{100 * row['share_of_read']:.0f} %",
            f"{row['flops_per_s'] / 1e12:.0f}",
        )
        for (op, benchmark, tokens), row in sorted(fastest.items())
    ]
    speeds = ", ".join(f"{key} {value / 1e12:.2f} TB/s" for key, value in ceilings.items())
    columns = ("op", "shape", "tokens", "tactic", "µs", "GB/s", "of read", "TFLOP/s")
    return [
        f"## {device['name']}, {record['date']}",
        "",
        f"[`{name}`](../artifacts/bench/{name}), commit {record['commit']}: {speeds}.",
        (
            f"The gate passed {record['gate']['runs'] - len(record['gate']['faults'])} of "
            f"{record['gate']['runs']} runs."
        ),
        "The fastest tactic of each shape:",
        "",
        *_table(columns, rows),
        *_measured_peers(record["peers"], fastest),
    ]


def _measured_peers(
    peers: Sequence[Mapping[str, Any]], ours: Mapping[tuple[str, str, int], Mapping[str, Any]]
) -> list[str]:
    """Kernels of other projects in the same run, those that ran."""
    rows = []
    for one in peers:
        own = ours.get((one["op"], one["benchmark"], one["tokens"]))
        if one["microseconds"] is None or own is None:
            continue
        theirs, mine = one["microseconds"][1], own["microseconds"][1]
        name = f"{one['peer']} {one['version']}".strip()
        times = (f"{theirs:.2f}", f"{mine:.2f}", f"{theirs / mine:.2f}")
        row = (f"`{one['op']}`", one["benchmark"], one["tokens"], name, *times, one["difference"])
        rows.append(row)
    if not rows:
        return []
    columns = ("op", "shape", "tokens", "kernel", "µs", "ours", "ratio", "what differs")
    return [
        "Kernels of other projects, in the same run, on the same data:",
        "",
        *_table(columns, rows),
    ]


def _measured_steps(name: str, record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"## A whole decode step, {record['precision']}, {record['date']}",
        "",
        (
            f"[`{name}`](../artifacts/bench/{name}), commit {record['commit']}: the full-size"
            " model's decode program as one graph, weights drawn at random."
        ),
        "",
    ]
    for step in record["steps"]:
        milliseconds, moved = step["microseconds"] / 1e3, step["moved_bytes"]
        lines += [
            (f"{step['sequences']} sequences after {step['context']} tokens:"
            f" **{milliseconds:.3f} ms**, {step['launches']} launches, {moved / 1e9:.2f} GB,"
            f" {moved / milliseconds / 1e9:.2f} TB/s,"
            f" {step['experts_hit']:.1f} experts hit a layer."),
            "",
            *_table(
                ("op", "tactic", "calls", "µs a call, alone"),
                [
                    (f"`{one['op']}`", f"`{one['tactic']}`", one["calls"],
                     f"{one['microseconds']:.2f}")
                    for one in step["ops"]
                ],
            ),
        ]  # fmt: skip
    return lines


# ------------------------------------------------------------------------------------------ passes


def _passes() -> list[str]:
    context = Context(
        config=ModelConfig.from_file(FULL),
        phase=PHASES[0],
        target=targets.get("h20"),
        recipe=load_recipe("fp8"),
    )
    homes: dict[str, ModuleType] = {}
    rows: list[Sequence[object]] = []
    for stage in pipeline.PIPELINE:
        for rule in stage.rules:
            module = _home(rule)
            homes.setdefault(_room(module), module)
            others = replace(context, phase="decode", target=targets.get(ELSEWHERE))
            each = (*(replace(context, phase=phase) for phase in PHASES), others)
            counts = (rule.expected(one) for one in each)
            shown = ("any" if count is None else count for count in counts)
            link = f"[`{rule.name}`](#{_room(module).partition('/')[2].removesuffix('.py')})"
            rows.append((stage.name, link, *shown))
    lines = [
        *_page("Passes"),
        "The passes run in this order over each phase.",
        "A number is how often it must fire for the full-size config in `fp8` for `h20`,",
        f"and in the last column for `{ELSEWHERE}`, whose engine launches other kernels than ours.",
        "A build fails where one is missed.",
        "`lingc passes` shows the same for any config, with what was found and why not more.",
        "",
        *_table(("stage", "pass", *PHASES, f"decode, `{ELSEWHERE}`"), rows),
    ]
    for path, module in homes.items():
        name = path.partition("/")[2].removesuffix(".py")
        lines += [f"## {name}", "", f"In [`{path}`](../{path}).", "", _doc(module), ""]
    return lines


def _home(rule: Rewrite) -> ModuleType:
    """The file that a rule stands in: that of its patterns."""
    return importlib.import_module(rule.patterns[0].__module__)


# --------------------------------------------------------------------------------------------- ops


def _ops() -> list[str]:
    found = {
        module: [value for value in vars(module).values() if isinstance(value, Op)]
        for module in ops.MODULES
    }
    names = {op.name for each in found.values() for op in each}
    assert names == ops.OPS.keys(), "every op has a file in the table"
    rows = [
        (f"[`{op.name}`](#{_name(module)})", _doc(module).partition("\n")[0])
        for module, each in found.items()
        for op in each
    ]
    lines = [*_page("Ops", ops), *_table(("op", "what it is"), rows)]
    for module, each in found.items():
        path = _room(module)
        lines += [f"## {_name(module)}", "", f"In [`{path}`](../{path}).", ""]
        lines += ["```text", *(op.schema for op in each), "```", "", _doc(module), ""]
    return lines


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


# ----------------------------------------------------------------------------------------- targets


def _targets() -> list[str]:
    def scaled(value: float | None, unit: float) -> str | None:
        return None if value is None else f"{value / unit:g}"

    facts: Mapping[str, Callable[[Target], object]] = {
        "target": lambda t: f"`{t.name}`",
        "device": lambda t: t.title,
        "engine kinds": lambda t: ", ".join(t.engines),
        "arch": lambda t: t.arch,
        "activations": lambda t: t.activations,
        "FP8 activations": lambda t: "yes" if t.fp8_activations else "no",
        "SMs": lambda t: t.sms,
        "memory, GB": lambda t: scaled(t.memory_bytes, 1e9),
        "bandwidth, TB/s": lambda t: scaled(t.hbm_bytes_per_s, 1e12),
        "L2, MiB": lambda t: scaled(t.l2_bytes, MIB),
        "shared memory a block, KiB": lambda t: scaled(t.smem_per_block_bytes, KIB),
        "dense TFLOP/s": lambda t: ", ".join(
            f"{dtype} {rate / 1e12:g}" for dtype, rate in t.dense_flops_per_s.items()
        ),
    }
    rows = [tuple(fact(target) for fact in facts.values()) for target in targets.ALL.values()]
    lines = [
        *_page("Targets"),
        "The devices that can be compiled for, as facts; nothing is probed while compiling.",
        "The first engine kind is what `--engine auto` means.",
        "`lingc targets` says which of them this version builds.",
        "An empty cell is a fact that a class of devices does not share, or that has no source.",
        "",
        *_table(tuple(facts), rows),
    ]
    for module in (cpu, nvidia):
        doc = _doc(module)
        lines += [f"## {doc.partition(chr(10))[0].removesuffix('.')}", ""]
        lines += [f"In [`{_room(module)}`](../{_room(module)}).", "", doc.partition("\n\n")[2], ""]
    return lines


# ------------------------------------------------------------------------------------ command line


def _cli() -> list[str]:
    lines = [*_page("Command line"), *_help("lingc", lingc)]
    for verb in VERBS:
        command = importlib.import_module(module_of(verb)).command
        lines += [f"## lingc {verb}", "", *_help(f"lingc {verb}", command)]
    return lines


def _help(name: str, command: click.Command) -> list[str]:
    settings = {"help_option_names": ["-h", "--help"], "terminal_width": WIDTH}
    context = click.Context(command, info_name=name, **settings)  # type: ignore[arg-type]
    said = (line.rstrip() for line in command.get_help(context).splitlines())
    return ["```text", *said, "```", ""]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
