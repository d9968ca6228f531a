"""Reports in a browser: no error, no network, nothing wider than a phone, and pages on paper."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from lingc.parity import page
from tests.parity.test_page import result

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

QUESTIONS = (
    "Does it pass?",
    "Where is the error largest?",
    "Which experts are silent?",
    "What was not quantized?",
    "What to do next?",
)

FRAME = """<!doctype html><body><iframe id="f" width="390" height="800"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument.documentElement;
  document.title = "too wide by " + (page.scrollWidth - page.clientWidth);
};
frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob("%s"), c => c.charCodeAt(0)));
</script></body>"""


def browse(folder: Path, *words: str) -> tuple[str, str]:
    """What a headless browser says on stdout and stderr."""
    assert BROWSER is not None
    told = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=2000", *words,
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return told.stdout, told.stderr


@pytest.mark.parametrize("bump", [0.0, 9.0])
def test_a_report_answers_by_itself_in_a_browser_without_network(
    tmp_path: Path, bump: float
) -> None:
    path = tmp_path / "report.html"
    page.write(result(bump=bump), path)

    dom, log = browse(tmp_path, "--dump-dom", path.as_uri())

    assert ":CONSOLE" not in log
    for question in QUESTIONS:
        assert question in dom
    assert ("Fails" if bump else "Passes") in dom


def test_a_report_is_no_wider_than_a_phone(tmp_path: Path) -> None:
    text = base64.b64encode(page.render(result(bump=9.0)).encode()).decode()
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % text, encoding="utf-8")

    dom, _ = browse(tmp_path, "--dump-dom", frame.as_uri())

    assert "<title>too wide by 0</title>" in dom


def test_a_report_prints(tmp_path: Path) -> None:
    path, paper = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write(result(bump=9.0), path)

    browse(tmp_path, f"--print-to-pdf={paper}", path.as_uri())

    assert paper.read_bytes().startswith(b"%PDF-")
