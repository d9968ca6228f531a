"""What TensorRT makes of the networks, fused layer by fused layer, and how it is shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingc.cli import layers
from lingc.engine import canonical
from lingc.errors import LingcError
from tests.tensorrt.engines import SAMPLE, STATIC, has_rtx, networks

GOLDEN = Path(__file__).parents[1] / "golden" / "tensorrt"


@has_rtx
@pytest.mark.parametrize(("target", "precision"), [*SAMPLE, STATIC])
def test_layers_are_those_that_were_agreed_on(
    target: str, precision: str, golden: Callable[[str, str], None]
) -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    made, found = networks(target, precision)
    lines: list[str] = []
    for phase, network in found.items():
        begin = len(made.backend.log.messages)
        made.engine(network)
        messages = [text for _, text in made.backend.log.messages[begin:]]
        parsed = report.to_value(report.parse(messages, network))
        value: Any = json.loads(canonical.encode(parsed))
        lines.append(f"{phase}: {len(value['layers'])} layers")
        lines += sorted(
            f"{count:4} {kind:14} {made_of} ({inputs}) [{constants}]"
            for count, kind, made_of, inputs, constants in layers.folded(value)
        )
    golden(f"tensorrt/{target}-{precision}.txt", "\n".join(lines) + "\n")


def phase_rows(name: str) -> dict[str, list[str]]:
    """A golden report by phase."""
    found: dict[str, list[str]] = {}
    rows: list[str] = []
    for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines():
        if line.endswith(" layers"):
            rows = found[line.partition(":")[0]] = []
        else:
            rows.append(line)
    return found


def test_what_a_recipe_stores_in_int4_is_multiplied_in_int4() -> None:
    """What is left to products of BF16 are the low-rank projections of the latent layers."""
    for phase, rows in phase_rows("spark-int4-all.txt").items():
        plain = sum(int(row.split()[0]) for row in rows if row.split()[1] == "gemm")
        fused = sum(int(row.split()[0]) for row in rows if "[BFloat16, Int4]" in row)

        assert plain == (2 if phase == "draft" else 4), phase
        assert fused >= 3, phase


def test_what_a_recipe_stores_in_fp8_blocks_goes_to_plugins() -> None:
    for phase, rows in phase_rows("rtx-89-fp8.txt").items():
        plugins = {row.split()[2] for row in rows if row.split()[1] == "plugin"}
        plain = sum(int(row.split()[0]) for row in rows if row.split()[1] == "gemm")

        assert {"fp8_linear", "fp8_experts"} <= plugins, phase
        assert plain <= 4, phase


def test_what_a_recipe_stores_with_one_scale_is_multiplied_in_fp8() -> None:
    """Codes are made in what stands in front, once for all that read them."""
    counts = {"prefill": 44, "decode": 44, "verify": 44, "draft": 5}
    for phase, rows in phase_rows("rtx-89-fp8-static.txt").items():
        products = [row for row in rows if row.split()[1] == "gemm" and "fp8_static" in row]
        plain = sum(int(row.split()[0]) for row in rows if row.split()[1] == "gemm")
        made = [row for row in rows if row.split()[1] == "kgen" and "/codes" in row]
        norms = [row for row in made if "rms_norm" in row]

        assert sum(int(row.split()[0]) for row in products) == counts[phase]
        assert all("(FP8)" in row for row in products)
        assert plain - counts[phase] == (2 if phase == "draft" else 4), phase
        assert norms
        assert not [row for row in rows if "fp8_linear" in row], phase


@pytest.mark.parametrize(
    ("phases", "told"),
    [({}, "TensorRT's log could not be read when it was built"), ({"draft": {}}, "of: draft")],
)
def test_layers_that_no_log_listed_are_named(
    phases: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out: Any = None
    monkeypatch.setattr(layers, "read", lambda *_: phases)
    with pytest.raises(LingcError, match="has no layers of a 'decode' engine") as caught:
        layers.show(out, tmp_path / "h20.ling", "decode")
    assert told in str(caught.value.hint)


def test_what_is_no_tensorrt_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LingcError):
        layers.read(tmp_path / "none.ling")
