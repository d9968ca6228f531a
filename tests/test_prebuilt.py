"""The engines under artifacts/engines are what this tree builds: `make engines` makes them anew."""

import json
import lzma
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lingc import launch_table, targets
from lingc.build import build
from lingc.cli import main
from lingc.compile import Request
from lingc.device import Binary
from lingc.engine import Package, open_package
from lingc.targets.cuda.binaries import Compilers, digest
from lingc.targets.cuda.lower import schedule_all

ROOT = Path(__file__).parents[1]
FULL = ROOT / "artifacts" / "checkpoints" / "ling-2.6-flash"
ENGINES = {
    "fp8": ("h20", "h20-3e", "h200-sxm"),
    "int4-fp8": ("h20", "h100-sxm"),
}
"""Precision -> targets; the plan is made for the first."""

STALE = "the tree would build another engine: `make engines`, and commit what it wrote"


@cache
def package(precision: str) -> Package:
    return open_package(path_of(precision), level="integrity")


def path_of(precision: str) -> Path:
    return ROOT / "artifacts" / "engines" / f"ling-2.6-flash-{precision}.ling"


def table_of(precision: str, target: str) -> launch_table.LaunchTable:
    found = package(precision)
    name = found.code(target).info["table"]
    data = lzma.decompress(found.read(f"variants/{target}/{name}"))
    return launch_table.from_value(json.loads(data))


def test_nothing_else_is_there_and_one_command_makes_it() -> None:
    folder = ROOT / "artifacts" / "engines"
    commands = [line for line in (ROOT / "Makefile").read_text().splitlines()
                if line.startswith("\t$(ENGINE) ")]  # fmt: skip

    assert {path.name for path in folder.glob("*.ling")} == {
        path_of(precision).name for precision in ENGINES
    }
    for precision, names in ENGINES.items():
        made = f"--precision {precision} --target {','.join(names)} -o {path_of(precision)}"
        assert made.replace(f"{ROOT}/", "") in "\n".join(commands)


@pytest.mark.parametrize("precision", ENGINES)
def test_an_engine_is_whole_has_its_variants_and_takes_any_weights_of_the_model(
    precision: str,
) -> None:
    found = package(precision)

    assert {*found.manifest.variants} == {*ENGINES[precision]}
    assert found.manifest.target == ENGINES[precision][0]
    assert found.manifest.precision == precision
    assert not found.manifest.has_weights
    assert found.manifest.checkpoint_identity is None
    assert found.plan.config == json.loads((FULL / "config.json").read_text())
    used = {name for target in ENGINES[precision] for name in table_of(precision, target).kernels}
    assert {f"kernels/{name}.xz" for name in used} == {*found.names("kernel")}
    assert sum(entry.size for entry in found.manifest.files.values()) < 5_000_000


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("fp8", "h200-sxm"),
        ("int4-fp8", "h20"),
        *(
            pytest.param(precision, target, marks=pytest.mark.long)
            for precision, names in ENGINES.items()
            for target in names
            if (precision, target) not in {("fp8", "h200-sxm"), ("int4-fp8", "h20")}
        ),
    ],
)
def test_its_schedule_and_its_kernels_are_those_that_the_tree_would_choose(
    precision: str, target: str
) -> None:
    """A kernel's name is a digest of its source, options and compiler: nothing is compiled."""
    found = package(precision)
    table = table_of(precision, target)
    made_by = found.manifest.value["producer"]
    compilers = Compilers(nvrtc=made_by["nvidia-cuda-nvrtc"], triton=made_by["triton"])

    wanted = schedule_all(replace(found.plan, target=target), targets.get(target))

    names = [name_of(found, one) for one in table.kernels]
    same = names == [digest(kernel, table.arch, compilers) for kernel in wanted.wanted]
    assert same, STALE  # told without what differs: that is megabytes
    same = replace(table, kernels=()) == wanted.table
    assert same, STALE


def name_of(found: Package, kernel: str) -> str:
    return Binary.from_bytes(lzma.decompress(found.read(f"kernels/{kernel}.xz"))).name


@pytest.mark.parametrize("precision", ENGINES)
def test_its_compilers_are_those_that_are_pinned(precision: str) -> None:
    made_by = package(precision).manifest.value["producer"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )

    assert pinned["triton"] == made_by["triton"]
    assert pinned["nvidia-cuda-nvrtc"].startswith(made_by["nvidia-cuda-nvrtc"])


@pytest.mark.long
@pytest.mark.parametrize("precision", ENGINES)
def test_it_is_byte_for_byte_what_a_build_makes(precision: str, tmp_path: Path) -> None:
    first, *also = ENGINES[precision]
    asked = Request(precision=precision, target=first, weights="external")

    made = build(FULL, tmp_path / "x.ling", asked, also=also, cache_dir=tmp_path / "cache")

    assert made.manifest.bundle_id == package(precision).manifest.bundle_id, STALE
    assert dict(made.manifest.files) == dict(package(precision).manifest.files)


def test_weights_of_another_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ROOT / "artifacts" / "checkpoints" / "ling-tiny"

    words = ["bind", str(path_of("fp8")), "--checkpoint", str(tiny)]
    code = main([*words, "--cache-dir", str(tmp_path), "--progress", "none"])

    said = capsys.readouterr().err
    assert code == 3
    assert "config" in said
    assert not [*tmp_path.rglob("*.safetensors")]
