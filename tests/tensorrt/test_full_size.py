"""One group of the full-size model for DGX Spark: 8 layers, all 256 experts, `int4-all`."""

import resource
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingc import targets
from lingc.compile import Request, compile_plan
from lingc.model.config import ModelConfig
from lingc.plan import Plan
from lingc.quantize.recipes import load_recipe
from lingc.targets.cuda.binaries import compile_all
from lingc.targets.tensorrt import lower
from tests.tensorrt.engines import has_rtx, stand_ins

pytestmark = [pytest.mark.long, has_rtx]

FULL = Path(__file__).parents[2] / "artifacts" / "checkpoints" / "ling-2.6-flash"
TARGET = "spark"


class Drawn(Mapping[str, Any]):
    """Weights of a plan, drawn at random when they are asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        kind = self._plan.weights[name].type
        random = np.random.default_rng(zlib.crc32(name.encode()))
        if kind.dtype == "i32":
            return random.integers(-(1 << 31), 1 << 31, kind.bind({}), dtype=np.int32)
        if kind.dtype == "f32":
            assert kind.shape == (1,), f"{name} is {kind}: of FP8 only two scales become constants"
            return random.uniform(0.001, 0.1, 1).astype(np.float32)
        assert kind.dtype == "bf16", f"{name} is {kind}: nothing else becomes a constant"
        return np.full(kind.bind({}), 0x3C00, np.uint16)  # 2^-7

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.weights)

    def __len__(self) -> int:
        return len(self._plan.weights)


def group(target: str, precision: str) -> Plan:
    """The plan of the first 8 layers."""
    whole = ModelConfig.from_file(FULL)
    raw = {**whole.raw, "num_hidden_layers": whole.layer_group_size, "num_nextn_predict_layers": 0}
    config = ModelConfig.from_dict(raw)
    request = Request(precision=precision, target=target, engine="tensorrt")
    return compile_plan(
        config, load_recipe(precision), targets.get(target), has_mtp=False, request=request
    ).plan


def test_a_full_size_group_builds_in_minutes_and_holds_no_routed_experts(tmp_path: Path) -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415
    from lingc.targets.tensorrt.backend import backend  # noqa: PLC0415

    began = time.monotonic()
    plan, target = group(TARGET, "int4-all"), targets.get(TARGET)
    weights = Drawn(plan)
    plugins = lower.tabled(
        plan, target, lambda wanted: compile_all(wanted, target.arch, tmp_path), embeds=True
    )
    made = lower.Lowering(backend(target), plan, target, plugins, weights=weights)
    sizes = {}
    for phase in plan.programs:
        network, begin = made.network(phase), len(made.backend.log.messages)
        sizes[phase] = len(made.engine(network))
        messages = [text for _, text in made.backend.log.messages[begin:]]
        found = report.parse(messages, network)
        assert report.faults(found, network) == []
        print(phase, sizes[phase], found.activation_bytes, found.scratch_bytes, len(found.layers))  # noqa: T201
    seconds = time.monotonic() - began
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{seconds:.0f} s, {peak_bytes / 1e9:.2f} GB")  # noqa: T201
    experts = [name for name in plan.weights if ".experts." in name and "shared" not in name]
    constants = sum(plan.weights[name].type.bytes() for name in weights.asked)

    assert len(experts) == 4 * 7
    assert not weights.asked & {*experts}
    assert all(size < 1.1 * constants + (64 << 20) for size in sizes.values())
    assert seconds < 180
    assert peak_bytes < 8e9


@pytest.mark.parametrize("name", ["spark", "rtx-120", "rtx-89"])
def test_static_scales_are_fused_at_full_size(name: str) -> None:
    from lingc.targets.tensorrt import report  # noqa: PLC0415
    from lingc.targets.tensorrt.backend import backend  # noqa: PLC0415

    plan, target = group(name, "fp8-static"), targets.get(name)
    weights = Drawn(plan)
    plugins = lower.tabled(plan, target, stand_ins, embeds=True)
    made = lower.Lowering(backend(target), plan, target, plugins, weights=weights)
    for phase in plan.programs:
        network, begin = made.network(phase), len(made.backend.log.messages)
        engine = made.engine(network)
        messages = [text for _, text in made.backend.log.messages[begin:]]
        found = report.parse(messages, network)
        assert report.faults(found, network) == []
        assert list(network.roles.values()).count("fp8") == 3 * 7 + 1 + 3 * 8
        assert found.weight_bytes < 1 << 20, "codes are bound, not inside"
        print(phase, len(engine), len(found.layers))  # noqa: T201
