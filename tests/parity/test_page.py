"""The page loads nothing, believes nothing that it quotes, and shows what was found."""

import html.parser
import json
import re
from pathlib import Path

import numpy as np
import pytest

from lingc.errors import ResourceError
from lingc.parity import page, plots
from lingc.parity.budget import judge, load_budget
from lingc.parity.report import document, verdict
from lingc.parity.run import ModeResult, Result, SideFacts, WorstToken, compare
from tests.parity.hand import EXPERTS, ROUTING, VOCAB, HandSide, experts, rows

VOID = {"meta", "br"}


class Outline(html.parser.HTMLParser):
    """Which tags there are, and whether each is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [(k, v) for k, v in attrs if k in {"src", "href", "srcset", "data"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def result(*, bump: float = 0.0, context: str = "def f():") -> Result:
    lines = rows(5, 40)
    right = experts(lines[1].ids)[2].ids[30].tolist()
    new = next(e for e in range(EXPERTS) if e not in right)
    made = np.zeros(VOCAB, np.float32)
    made[3] = bump
    other = HandSide(
        "other", lines, bumps={(2, 33): made}, swaps={(2, 30, 2): [right[0], new]} if bump else {}
    )
    modes = ["prefill", "decode"]
    found = compare(HandSide("right", lines), other, lines, ["prefill", "decode"], ROUTING, 4)
    budget = load_budget("engine-vs-eager")
    token = WorstToken(
        line=2, position=33, kl=1.0, max_abs=2.0, margin=3.0, context=context, reference="a",
        other="b",
    )  # fmt: skip
    return Result(
        reference=SideFacts(name="eager", facts={}, checkpoint=None),
        other=SideFacts(
            name="engine <b>", facts={"bundle_id": "f" * 64}, checkpoint="0" * 64,
            word="tiny.ling",
        ),
        data="rows.jsonl", weights="engine", budget=budget, lines=(1, 2),
        modes=tuple(
            ModeResult(
                summary=(summary := comparison.summary(1e-3)), checks=judge(summary, budget),
                tokens=comparison.tokens, worst=(token,),
            )
            for _, (_, comparison) in zip(modes, found, strict=True)
        ),
    )  # fmt: skip


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = page.render(result(bump=9.0))

    found = outline(text)

    assert found.links == []
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert re.findall(r"https?:|//|@import|url\(", text) == []
    assert "default-src 'none'" in text
    assert {"svg", "table"} <= found.tags


def test_what_is_quoted_is_text_and_not_markup() -> None:
    found = outline(page.render(result(context="<script>alert(1)</script>&amp;")))

    assert "script" not in found.tags
    assert "<script>alert(1)</script>&amp;" in found.text
    assert "engine <b>" in found.text


def test_the_page_says_what_is_over_and_where() -> None:
    found = outline(page.render(result(bump=9.0)))

    assert "Fails: over budget 'engine-vs-eager'; prefill: mean_kl is" in found.text
    assert "Tokens with other experts" in found.text
    assert "line 2, position 33" in found.text


def test_equal_sides_have_a_page_too() -> None:
    text = page.render(result())

    assert "within budget 'engine-vs-eager'" in outline(text).text


def test_the_document_is_json_with_every_flip_and_no_nan() -> None:
    broken = result(bump=float("nan"))

    value = json.loads(json.dumps(document(broken), allow_nan=False))

    assert value["ok"] is False
    assert [mode["mode"] for mode in value["modes"]] == ["prefill", "decode"]
    (flip,) = value["modes"][0]["flips"]
    assert (flip["line"], flip["position"], flip["layer"]) == (2, 30, 2)
    assert value["modes"][0]["not_finite"] == 1
    assert value["modes"][0]["max_kl"] is None


def test_the_verdict_names_what_broke() -> None:
    assert verdict(result()).startswith("within budget 'engine-vs-eager': mean_kl at most 1e-06")
    assert "prefill: top1_disagreements_above_margin is 1 of 45 tokens" in verdict(result(bump=30))


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page.write(result(), path)
    before = path.read_text(encoding="utf-8")

    with pytest.raises(ResourceError, match=r"cannot be written: No such file"):
        page.write(result(), tmp_path / "none" / "report.html")

    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert before.startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("values", "filled"),
    [([0.0], 1), ([1e-20, 5.0], 2), ([np.nan, 1.0], 2), ([np.inf], 1), ([2.0] * 500, 1)],
)
def test_plots_stand_within_their_frame(values: list[float], filled: int) -> None:
    given = np.array(values)

    lines = plots.by_position(np.arange(len(given)), given, label="KL")
    bars = plots.histogram(given, label="KL")

    points = [tuple(map(float, p.split(","))) for p in re.findall(r"[\d.]+,[\d.]+", lines)]
    points += [(float(x), float(y)) for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', lines)]
    assert points
    assert all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in points)
    assert "nan" not in lines + bars
    assert "inf" not in lines + bars
    assert bars.count("<rect") == filled
