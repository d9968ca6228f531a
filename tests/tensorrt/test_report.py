"""What TensorRT makes of the networks, fused layer by fused layer, and how it is shown."""

import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lingc.cli import layers, main
from lingc.engine import Contents, canonical, write_package
from lingc.errors import LingcError
from lingc.plan import Plan, dumps
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


LAYERS = {"layers": [], "activation_bytes": 1, "weight_bytes": 2, "scratch_bytes": 3}
UNREAD = "the build of 'decode' listed its layers 0 times, not once"


def written(folder: Path, phases: Any, faults: Any) -> Path:
    """A package whose build said that of its layers; it has nothing else."""
    plan = Plan(
        config={}, precision="bf16", target="h20", activation="bf16", page_size=16, max_draft=0,
        states={}, weights={}, programs={},
    )  # fmt: skip
    report = lzma.compress(canonical.encode({"format": 1, "phases": phases}))
    needs = {"os": ["linux"], "arch": ["x86_64"], "libraries": {}}
    info = {"engine": "tensorrt", "runs_on": needs, "report": "report.json.xz", "faults": faults}
    request = {"precision": "bf16", "target": "h20", "engine": "tensorrt", "page_size": 16}
    contents = Contents(
        plan=dumps(plan), model_files={"config.json": b"{}\n"},
        variants={"h20": {"report.json.xz": report}}, variant_info={"h20": info}, weights=None,
        architecture="BailingMoeV2_5ForCausalLM", checkpoint=None,
        request={**request, "max_draft": 0}, passes=(), quant={}, producer={},
    )  # fmt: skip
    write_package(folder, contents)
    return folder


def test_what_was_fused_otherwise_is_counted_by_inspect_and_listed_by_phase(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = {"decode": ["a: the INT4 matrix is dequantized apart", "b: not one call"]}
    made = written(tmp_path / "h20.ling", {"decode": LAYERS, "draft": LAYERS}, faults)

    assert main(["inspect", str(made)]) == 0
    assert re.search(r"faults of the build +2: `--layers` lists them", capsys.readouterr().out)
    assert main(["inspect", str(made), "--layers"]) == 0
    shown = capsys.readouterr().out
    assert all(one in shown for one in ("made otherwise than was meant", *faults["decode"]))
    assert main(["inspect", str(made), "--layers", "--phase", "draft"]) == 0
    assert "otherwise" not in capsys.readouterr().out
    assert main(["inspect", str(made), "--layers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == faults
    assert main(["verify", str(made)]) == 0


def test_nothing_is_said_of_faults_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(tmp_path / "h20.ling", {"decode": LAYERS}, {})

    assert main(["inspect", str(made)]) == 0
    assert "faults of the build" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("phases", "faults", "told"),
    [
        ({}, {"decode": [UNREAD]}, UNREAD),
        ({"draft": LAYERS}, {"decode": [UNREAD]}, UNREAD),
        ({"draft": LAYERS}, {}, "it has those of: draft"),
        ({}, {}, "it has those of: none"),
    ],
)
def test_layers_that_no_log_listed_are_named(
    phases: Any, faults: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(tmp_path / "h20.ling", phases, faults)

    assert main(["inspect", str(made), "--layers"]) == 2
    said = capsys.readouterr().err
    assert "has no layers of a 'decode' engine" in said
    assert told in said


@pytest.mark.parametrize("faults", [["decode"], {"decode": 3}, "decode"])
def test_faults_that_are_none_are_refused(
    faults: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = written(tmp_path / "h20.ling", {"decode": LAYERS}, faults)

    assert main(["inspect", str(made), "--layers"]) == 6
    assert "cannot be read" in capsys.readouterr().err


ROW = (
    "Name: one, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,256], Strides: [256,1], "
    "Datatype: BFloat16, Format: (Linear) }, { Name: s, Dimensions: [], Datatype: Float } ], "
    "Constants: [], Outputs: [ { Name: y, Dimensions: [-1], Datatype: Int32 }], TacticName: , "
    "StreamId: 0, Metadata: values.y lingc.linear"
)
"""A layer as TensorRT for RTX 1.7 lists it."""


def test_a_layer_is_read_whole() -> None:
    (layer,) = parsed(ROW).layers

    assert [(one.dtype, one.shape) for one in layer.inputs] == [
        ("BFloat16", (-1, 256)),
        ("Float", ()),
    ]
    assert layer.constants == ()
    assert [(one.dtype, one.shape) for one in layer.outputs] == [("Int32", (-1,))]
    assert layer.origins == ("values.y",)


@pytest.mark.parametrize(
    ("known", "other"),
    [
        ("[-1,256]", "[-1-256]"),
        ("[-1,256]", "[--]"),
        ("[-1,256]", "[-1,,256]"),
        ("[-1,256]", "[T,256]"),
        ("[-1,256]", "[-1, 256]"),
        ("[-1,256]", f"[{'9' * 5000}]"),
        ("Dimensions: [-1,256], ", ""),
        ("Datatype: Int32", "Type: Int32"),
        ("Constants: []", "Constants: [w:int4[8]]"),
        ("Constants: []", "Constants: "),
    ],
)
def test_a_tensor_of_another_form_makes_the_log_unreadable(known: str, other: str) -> None:
    """It is neither left out nor a traceback."""
    assert known in ROW
    with pytest.raises(LingcError, match="a layer of the build log cannot be read: 'Name: one"):
        parsed(ROW.replace(known, other))


def parsed(row: str) -> Any:
    from lingc.targets.tensorrt import report  # noqa: PLC0415

    network: Any = SimpleNamespace(phase="decode", roles={})
    return report.parse([f"Layers:\n{row}"], network)


def test_what_is_no_tensorrt_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LingcError):
        layers.read(tmp_path / "none.ling")
