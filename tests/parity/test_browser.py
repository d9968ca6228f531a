"""Reports in a browser: no error, no network, nothing wider than a phone, and pages on paper."""

import base64
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lingc.parity import drift_page, page
from lingc.parity.bisect.finding import Finding, WrongWeight
from lingc.parity.bisect.judge import Element
from lingc.parity.bisect.search import Bisection, Walked
from lingc.parity.drift import Drift, HeadDrift, Point
from tests.parity.test_page import result

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

PHONE, PAPER = 390, 718
"""Pixels of a narrow phone, and of A4 between margins of a centimetre."""

QUESTIONS = (
    "Does it pass?",
    "Where is the error largest?",
    "Which experts are silent?",
    "What was not quantized?",
    "What to do next?",
)

FRAME = """<!doctype html><body><iframe id="f" width="%d" height="800"></iframe><script>
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


def drift() -> str:
    points = tuple(Point(position=1 << n, mean=1e-3 * n, max=2e-3 * n) for n in range(6, 12))
    head = HeadDrift(layer=3, head=1, rate=0.002, points=points, exact=points)
    made = Drift(name="a-name", source="drawn", tokens=2048, state_dtype="bf16", heads=(head,) * 5)
    return drift_page.render(made, 1e-4)


def bisection() -> str:
    wrong = WrongWeight(
        name="layers.3.mlp.all_experts.gate_up_codes", sources=("model.a.weight",), elements=9,
        wrong=4, experts=(1, 2), at=(0, 1), got=1.0, want=2.0,
    )  # fmt: skip
    found = Finding(
        compared="plan against eager", tensor="layers.3.mlp.expert_up", op="lingc.expert_up",
        layer=3, source="moe.py:94", phase="prefill", call=1, error=0.5, limit=1e-4, rows=64,
        bad_rows=3, elements=(Element(at=(3, 1), got=-0.12345678901234567, want=2.0),) * 5,
        weights=(wrong,), after=("layers.3.slice (aten.slice.Tensor, moe.py:90)",),
        others=(("layers.4.mla_latent_attention.cache", "lingc.mla_latent_attention", 0.25),) * 3,
    )  # fmt: skip
    walk = Walked(
        compared="plan against eager", calls=2, judged=99, skipped={},
        largest={"lingc.lightning_prefill_qkv": 0.01},
    )  # fmt: skip
    return Bisection(
        reference="eager ling-tiny", other="engine tiny.ling (cuda, fp8, h200-sxm)", data="rows",
        modes=("prefill",), walked=(walk,), finding=found, reproducer=None,
    ).page(Path("parity-fault.safetensors"))  # fmt: skip


@pytest.mark.parametrize("make", [lambda: page.render(result(bump=9.0)), drift, bisection])
@pytest.mark.parametrize("width", [PHONE, PAPER])
def test_no_page_is_wider_than_what_it_is_read_on(
    tmp_path: Path, make: Callable[[], str], width: int
) -> None:
    text = make()
    if width == PAPER:  # as it is printed, but measurable
        text = text.replace("@media print", "@media screen")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (width, base64.b64encode(text.encode()).decode()), encoding="utf-8")

    dom, log = browse(tmp_path, "--dump-dom", frame.as_uri())

    assert "<title>too wide by 0</title>" in dom
    assert ":CONSOLE" not in log


def test_a_report_prints(tmp_path: Path) -> None:
    path, paper = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write(result(bump=9.0), path)

    browse(tmp_path, f"--print-to-pdf={paper}", path.as_uri())

    assert paper.read_bytes().startswith(b"%PDF-")
