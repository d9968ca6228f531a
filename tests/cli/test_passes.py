"""`lingc passes`: the table of what must fire and did, also where something did not."""

import json
from pathlib import Path

import pytest

from lingc.cli import main

TINY = Path(__file__).parents[2] / "artifacts/checkpoints/ling-tiny"


def test_tells_how_many_steps_a_layer_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["passes", str(TINY), "--precision", "fp8", "--target", "h20", "--json", "-q"])

    steps = json.loads(capsys.readouterr().out)["steps"]
    assert code == 0
    assert steps["decode"] == {"-1": 4, "0": 5} | {
        str(layer): 7 if layer in (3, 7) else 6 for layer in range(1, 8)
    }


def test_a_missed_fusion_is_shown_with_its_reason_beside_those_that_fired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latent's second matrix is cut for absorption, so no pass takes it quantized."""
    rules = [{"modules": ["model.layers.*.attention.kv_b_proj"], "format": "fp8_block"}]
    recipe = {"name": "kvb", "summary": "kv_b", "activations": "plain", "rules": rules}
    file = tmp_path / "kvb.json"
    file.write_text(json.dumps(recipe))

    code = main(["passes", str(TINY), "--precision", str(file), "--json", "-q"])

    document = json.loads(capsys.readouterr().out)
    found = {line["name"]: line for line in document["passes"] if line["phase"] == "prefill"}
    assert code == 8
    assert found["fuse_router"]["found"] == found["fuse_router"]["expected"] == 7
    assert found["fuse_mla_attention"]["missed"]
    assert "kv_b_proj as fp8_block" in found["fuse_mla_attention"]["refused"][0]["reason"]
