"""A page with the timeline of a bucket and what its arena holds, in one file without scripts."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH = 1100
_ROW = 16
_LABEL = 70
_MEMORY_HEIGHT = 420

_COLORS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#ff9da6",
    "#9d755d", "#bab0ac", "#2f4b7c", "#a05195",
)  # fmt: skip

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #222 }
body { padding: 0 1em } .key { white-space: nowrap; display: inline-block }
table { border-collapse: collapse; margin: 1em 0 } th { text-align: left }
td, th { padding: .15em .7em; border-bottom: 1px solid #ddd; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums } h2 { margin-top: 2em }
svg { display: block; max-width: 100%; height: auto } table { display: block; overflow-x: auto }
text { font-size: 11px; fill: #444 } .key { margin-right: 1.2em }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .35em }
rect:hover { stroke: #000 }
"""


def html(document: Mapping[str, Any], folded: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page.

    Args:
        document: As `lingc inspect --schedule --json` prints it.
        folded: `lingc.launch_view.folded` of its bucket.
        title: Model and precision.
    """
    bucket = document["bucket"]
    steps = bucket["steps"]
    ops = dict.fromkeys(one["op"] for one in steps)
    color = {op: _COLORS[i % len(_COLORS)] for i, op in enumerate(ops)}
    sizes = ", ".join(f"{axis} {size}" for axis, size in bucket["sizes"].items())
    facts = [
        f"{bucket['launches']} launches",
        f"{bucket['microseconds'] / 1e3:.3f} ms predicted",
        f"{bucket['moved_bytes'] / 1e9:.3f} GB moved",
        f"{bucket['flops'] / 1e9:.1f} GFLOP",
        f"arena of {bucket['arena_bytes'] / 1e6:.1f} MB",
    ]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(bucket['phase'])} with {escape(sizes)}: {', '.join(facts)}.</p>",
        "<h2>Time</h2><p>A row a layer; widths are predicted or measured microseconds.</p>",
        _keys(color),
        _timeline(steps, color),
        "<h2>Steps</h2>",
        _table(folded),
        "<h2>Arena</h2><p>Across: steps. Down: addresses. Inputs and outputs stay to the end.</p>",
        _memory(bucket, steps, color),
        "<h2>Memory</h2>",
        _rows(("", "MB"), [(k, f"{v / 1e6:,.3f}") for k, v in document["memory"].items()]),
        "</html>\n",
    ]
    return "\n".join(parts)


def _keys(color: Mapping[str, str]) -> str:
    keys = (
        f'<span class=key><i style="background:{shade}"></i>{escape(op)}</span>'
        for op, shade in color.items()
    )
    return f"<p>{''.join(keys)}</p>"


def _timeline(steps: Sequence[Mapping[str, Any]], color: Mapping[str, str]) -> str:
    rows: list[tuple[str, list[Mapping[str, Any]]]] = []
    for one in steps:
        label = f"layer {one['layer']}" if one["layer"] >= 0 else "outside"
        if not rows or rows[-1][0] != label:
            rows.append((label, []))
        rows[-1][1].append(one)
    longest = max((sum(one["microseconds"] for one in row) for _, row in rows), default=1.0)
    scale = (_WIDTH - _LABEL) / max(longest, 1e-9)
    drawn = []
    for number, (label, row) in enumerate(rows):
        y, x = number * _ROW, float(_LABEL)
        drawn.append(f'<text x="0" y="{y + 12}">{escape(label)}</text>')
        for one in row:
            width = one["microseconds"] * scale
            told = (
                f"{one['step']}: {one['op']}, {one['tactic']}, {one['microseconds']:.2f} µs, "
                f"{one['moved_bytes'] / 1e6:.3f} MB, {one['launches']} launches ({one['origin']})"
            )
            drawn.append(_box(x, y + 1, max(width - 0.5, 0.3), _ROW - 2, color[one["op"]], told))
            x += width
    return _svg(_WIDTH, len(rows) * _ROW, drawn)


def _memory(
    bucket: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], color: Mapping[str, str]
) -> str:
    across = _WIDTH / max(len(steps), 1)
    down = _MEMORY_HEIGHT / max(bucket["arena_bytes"], 1)
    drawn = []
    for row in bucket["memory"]:
        when = f"steps {row['first']} to {row['last']}"
        told = f"{row['holds']}: {row['bytes']:,} bytes at {row['offset']:,}, {when}"
        shade = color[steps[row["first"]]["op"]]
        drawn.append(
            _box(
                row["first"] * across,
                row["offset"] * down,
                (row["last"] - row["first"] + 1) * across,
                max(row["bytes"] * down, 0.4),
                shade,
                told,
            )
        )
    return _svg(_WIDTH, _MEMORY_HEIGHT, drawn)


def _box(x: float, y: float, width: float, height: float, shade: str, told: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{shade}" fill-opacity=".8"><title>{escape(told)}</title></rect>'


def _svg(width: int, height: int, drawn: Iterable[str]) -> str:
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(drawn)}</svg>"
    )


def _table(folded: Sequence[Mapping[str, Any]]) -> str:
    columns = ("step", "layers", "op", "tactic", "launches", "µs", "MB", "all µs", "origin")
    return _rows(
        columns,
        [
            (
                one["step"], one["layers"], one["op"], one["tactic"], str(one["launches"]),
                f"{one['microseconds']:.2f}", f"{one['moved_bytes'] / 1e6:,.3f}",
                f"{one['microseconds'] * one['count']:,.1f}", one["origin"],
            )
            for one in folded
        ],
    )  # fmt: skip


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = ' class="n"' if text.replace(",", "").replace(".", "").isdigit() else ""
    return f"<td{kind}>{escape(text)}</td>"
