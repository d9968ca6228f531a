"""The pages in a browser: no error, no network, nothing wider than a phone, and pages on paper."""

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lingc.calibrate import mix_page, page
from lingc.calibrate.coverage import coverage
from lingc.calibrate.mix import bytes_per_token, mix
from lingc.checkpoint import Checkpoint
from lingc.checkpoint.calibrated import read_document
from lingc.quantize.recipes import load_recipe
from tests.calibrate.conftest import read
from tests.parity.test_browser import BROWSER, PAPER, PHONE, browse

FRAME = """<!doctype html><body><iframe id="f" width="%d" height="800"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, broken = [];
  for (const cell of page.querySelectorAll("th, td:not(.digest)")) {
    const texts = page.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) for (const word of texts.currentNode.data.matchAll(/[^\\s-]+/g)) {
      const range = page.createRange();
      range.setStart(texts.currentNode, word.index);
      range.setEnd(texts.currentNode, word.index + word[0].length);
      if (range.getClientRects().length > 1) broken.push(word[0]);
    }
  }
  const boxes = [...page.querySelectorAll("table")].map(table => table.getBoundingClientRect());
  document.title = `too wide by ${root.scrollWidth - root.clientWidth}, broken: ${broken}, ` +
    `tables beyond the page: ${boxes.filter(box => box.right > root.clientWidth).length}`;
};
frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob("%s"), c => c.charCodeAt(0)));
</script></body>"""
"""Measures a page in a frame of some width: words of cells that stand on two lines are broken."""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def pages(small: Checkpoint, rows: Path, finished: Callable[[str], Path]) -> dict[str, str]:
    document = read_document(finished("fp8-static"))
    budget = bytes_per_token(small.config, load_recipe("fp8"))
    return {
        "calibration": page.render(document, coverage(document["coverage"], floor=1000)),
        "mixed": mix_page.render(mix(small, read(rows, count=2), budget)),
    }


def test_pages_open_without_network_and_print(pages: dict[str, str], tmp_path: Path) -> None:
    for name, text in pages.items():
        path, paper = (tmp_path / f"{name}{end}" for end in (".html", ".pdf"))
        path.write_text(text, encoding="utf-8")

        dom, log = browse(tmp_path, "--dump-dom", path.as_uri())
        browse(tmp_path, f"--print-to-pdf={paper}", path.as_uri())

        assert ":CONSOLE" not in log
        assert "What to do" in dom
        assert paper.read_bytes().startswith(b"%PDF-")


def test_tables_fit_paper_scroll_on_a_phone_and_break_no_word(
    pages: dict[str, str], tmp_path: Path
) -> None:
    for name, text in pages.items():
        for width in (PHONE, PAPER):
            # As it is printed, but measurable.
            shown = text.replace("@media print", "@media screen") if width == PAPER else text
            frame = tmp_path / f"{name}-{width}.html"
            encoded = base64.b64encode(shown.encode()).decode()
            frame.write_text(FRAME % (width, encoded), encoding="utf-8")

            dom, _ = browse(tmp_path, "--dump-dom", frame.as_uri())

            (title,) = re.findall("<title>(.*)</title>", dom)
            assert title.startswith("too wide by 0, broken: , "), (name, width)
            if width == PAPER:
                assert title.endswith("tables beyond the page: 0"), name


def test_a_page_says_that_it_fails_and_which_experts_are_silent(pages: dict[str, str]) -> None:
    assert "Fails: 24 experts saw fewer than 1000 tokens" in pages["calibration"]
    assert "Inputs of FP8 matrices" in pages["calibration"]
