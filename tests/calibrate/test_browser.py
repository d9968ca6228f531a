"""The pages in a browser: no error, no network, nothing wider than a phone, and pages on paper."""

import base64
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
from tests.parity.test_browser import BROWSER, FRAME, browse

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture
def pages(small: Checkpoint, rows: Path, finished: Callable[[str], Path]) -> dict[str, str]:
    document = read_document(finished("fp8-static"))
    budget = bytes_per_token(small.config, load_recipe("fp8"))
    return {
        "calibration": page.render(document, coverage(document["coverage"], floor=1000)),
        "mixed": mix_page.render(mix(small, read(rows, count=2), budget)),
    }


def test_pages_open_without_network_fit_a_phone_and_print(
    pages: dict[str, str], tmp_path: Path
) -> None:
    for name, text in pages.items():
        path, frame, paper = (tmp_path / f"{name}{end}" for end in (".html", "-f.html", ".pdf"))
        path.write_text(text, encoding="utf-8")
        frame.write_text(FRAME % (500, base64.b64encode(text.encode()).decode()), encoding="utf-8")

        dom, log = browse(tmp_path, "--dump-dom", path.as_uri())
        framed, _ = browse(tmp_path, "--dump-dom", frame.as_uri())
        browse(tmp_path, f"--print-to-pdf={paper}", path.as_uri())

        assert ":CONSOLE" not in log
        assert "What to do" in dom
        assert "<title>too wide by 0</title>" in framed
        assert paper.read_bytes().startswith(b"%PDF-")


def test_a_page_says_that_it_fails_and_which_experts_are_silent(pages: dict[str, str]) -> None:
    assert "Fails: 24 experts saw fewer than 1000 tokens" in pages["calibration"]
    assert "Inputs of FP8 matrices" in pages["calibration"]
