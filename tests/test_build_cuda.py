"""Building CUDA engines, on any machine: kernels compiled once, packages the same every time."""

import json
import lzma
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lingc import launch_table, recording
from lingc.build import build
from lingc.cli import main
from lingc.compile import Request
from lingc.device import Binary
from lingc.engine import Package, open_package, read_manifest, verify
from lingc.engine.machine import Gpu, Machine
from lingc.errors import IncompatibleError, LingcError, UsageError
from lingc.interpret import InterpreterBackend
from lingc.plan import Plan
from lingc.runtime import vectors
from lingc.runtime.backend import Limits
from lingc.runtime.cuda_code import read_code
from lingc.targets.cuda import buckets as all_buckets
from lingc.targets.cuda.buckets import Sizes
from lingc.weights import open_weights
from tests import full_size_builds

CHECKPOINTS = Path(__file__).parents[1] / "artifacts" / "checkpoints"
TINY, FULL = CHECKPOINTS / "ling-tiny", CHECKPOINTS / "ling-2.6-flash"

FEW = (
    Sizes(phase="decode", axes={"B": 1, "B+1": 2, "P": 8}),
    Sizes(phase="verify", axes={"T": 2, "B": 1, "B+1": 2, "P": 8}),
)
"""Two buckets that share most kernels: a build compiles for seconds, not for a minute."""

H200 = Gpu(name="a GPU", capability="9.0", driver="13.0", memory_bytes=141 * 10**9)


@pytest.fixture(scope="module", autouse=True)
def _few_buckets() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_buckets, "buckets", lambda _plan, **_: FEW)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make(cache: Path) -> Callable[..., Path]:
    def made(path: Path, source: Path = TINY, **changes: Any) -> Path:
        also = changes.pop("also", ())
        asked = {"precision": "fp8", "target": "h200-sxm", "weights": "external", **changes}
        build(source, path, Request(**asked), also=also, cache_dir=cache)
        return path

    return made


@pytest.fixture(scope="module")
def package(make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Package:
    return open_package(make(tmp_path_factory.mktemp("p") / "x.ling"), machine=machine(H200))


def machine(gpu: Gpu | str, *, bindings: str = "13.0.1") -> Machine:
    return Machine(os="linux", arch="x86_64", version_of=lambda _name: bindings, gpu=lambda: gpu)


def table_of(package: Package) -> launch_table.LaunchTable:
    code = package.code()
    data = package.read(f"variants/{code.target}/{code.info['table']}")
    return launch_table.from_value(json.loads(lzma.decompress(data)))


# --------------------------------------------------------------------------------- what is there


def test_a_package_has_a_table_and_the_kernels_that_it_launches(package: Package) -> None:
    table = table_of(package)

    binaries = [
        Binary.from_bytes(lzma.decompress(package.read(f"kernels/{name}.xz")))
        for name in table.kernels
    ]
    assert package.code().engine == "cuda"
    assert table.arch == "sm_90a"
    assert {one.arch for one in binaries} == {"sm_90a"}
    assert len(package.names("kernel")) == len(table.kernels)
    assert [(one.phase, one.sizes["P"]) for one in table.buckets] == [("decode", 8), ("verify", 8)]
    for tactic in table.tactics:
        for launch in tactic.launches:
            assert len(launch.operands) == len(binaries[launch.kernel].arguments)


def test_it_says_what_made_it_and_what_it_needs(package: Package) -> None:
    manifest = package.manifest

    assert manifest.value["request"]["engine"] == "cuda"
    assert "widen" not in manifest.value["request"]
    assert {"nvidia-cuda-nvrtc", "triton", "torch", "numpy", "lingc"} == {
        *manifest.value["producer"]
    }
    needs = manifest.variants["h200-sxm"].runs_on
    weights = sum(spec.type.bytes() for spec in package.plan.weights.values())
    assert needs["libraries"] == {"cuda.bindings": ">=13"}
    assert (needs["gpu"]["capability"], needs["gpu"]["driver"]) == ("9.0", ">=13.0")
    assert weights < needs["gpu"]["memory_bytes"] < weights + (64 << 20)


# ------------------------------------------------------------------------------------ same bytes


def test_a_kept_plan_gives_the_same_package_without_capturing(
    package: Package,
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lingc.build.compile_plan", None)

    again = open_package(make(tmp_path / "kept.ling"), level="integrity")

    assert again.manifest.bundle_id == package.manifest.bundle_id


def test_the_same_build_elsewhere_gives_the_same_package_and_no_damaged_plan_is_used(
    package: Package,
    make: Callable[..., Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for kept in (cache / "plans").iterdir():
        kept.write_text(kept.read_text().replace("bf16", "f32", 1))

    again = open_package(make(tmp_path / "again.ling"), level="integrity")

    assert again.manifest.bundle_id == package.manifest.bundle_id


# ------------------------------------------------------------------------------- several targets


def test_a_package_for_several_targets_has_the_code_of_each_and_shares_kernels(
    package: Package, make: Callable[..., Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "both.ling", also=("h20",))

    both = open_package(path, machine=machine(replace(H200, sms=132)))
    small = open_package(path, machine=machine(replace(H200, sms=78)))

    assert [*both.manifest.variants] == ["h20", "h200-sxm"]
    assert (both.code().target, small.code().target) == ("h200-sxm", "h20")
    assert table_of(both) == table_of(package)
    alone = open_package(make(tmp_path / "h20.ling", target="h20"), level="integrity")
    assert table_of(small) == table_of(alone)
    own, others = {*package.names("kernel")}, {*alone.names("kernel")}
    assert {*both.names("kernel")} == own | others
    assert len(own & others) > len(own) / 2
    assert both.manifest.weights_sha256 == alone.manifest.weights_sha256


def test_targets_are_named_side_by_side(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINGC_CACHE", str(cache))
    words = ["build", str(TINY), "--precision", "fp8", "--weights", "external", "--json"]

    code = main([*words, "--target", "h20, h200-sxm", "--progress", "none"])

    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (told["package"], told["target"]) == ("ling-tiny-fp8.ling", "h20")
    assert told["targets"] == ["h20", "h200-sxm"]
    assert read_manifest(tmp_path / told["package"]).target == "h20"
    shown = {}
    for name in ("h20", "h200-sxm"):
        asked = ["inspect", told["package"], "--schedule", "--context", "512", "--target", name]
        assert main([*asked, "--json"]) == 0
        shown[name] = json.loads(capsys.readouterr().out)
        assert shown[name]["target"] == name
    assert shown["h20"]["bucket"]["steps"] != shown["h200-sxm"]["bucket"]["steps"]
    assert main(["verify", told["package"], "--target", "h100-sxm"]) == 2
    assert "no code for 'h100-sxm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("also", "said"),
    [
        (("h200-sxm",), "a target is named twice: h200-sxm, h200-sxm"),
        (("cpu",), "engines of several kinds: h200-sxm cuda, cpu onnx"),
        (("h201",), "no target is called 'h201'"),
    ],
)
def test_targets_that_do_not_go_together_are_refused(
    also: tuple[str, ...], said: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(LingcError, match=said):
        make(tmp_path / "x.ling", also=also)

    assert not [*tmp_path.iterdir()]


# -------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("gpu", "check", "found"),
    [
        ("no NVIDIA driver is installed", "gpu", "no NVIDIA driver"),
        (Gpu(name="A", capability="8.0", driver="13.0", memory_bytes=1 << 40), "gpu", r"A, 8\.0"),
        (Gpu(name="B", capability="10.0", driver="13.1", memory_bytes=1 << 40), "gpu", r"10\.0"),
        (
            Gpu(name="C", capability="9.0", driver="12.8", memory_bytes=1 << 40),
            "gpu-driver",
            "expected CUDA >=13.0, found CUDA 12.8",
        ),
        (
            Gpu(name="D", capability="9.0", driver="13.0", memory_bytes=10_000_000),
            "gpu-memory",
            "found 0.0 GB",
        ),
    ],
)
def test_a_machine_without_its_gpu_is_refused_before_anything_is_loaded(
    gpu: Gpu | str, check: str, found: str, package: Package
) -> None:
    with pytest.raises(IncompatibleError, match=rf"{check}: .*{found}"):
        open_package(package.root, machine=machine(gpu))

    assert verify(package.root, level="integrity").exit_code == 0


def test_an_older_cuda_bindings_is_refused(package: Package) -> None:
    with pytest.raises(IncompatibleError, match=r"library-version: cuda.bindings expected >=13"):
        open_package(package.root, machine=machine(H200, bindings="12.9"))


def test_widening_is_not_for_a_gpu(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--widen load is for CPU engines"):
        make(tmp_path / "x.ling", widen="load")

    assert list(tmp_path.iterdir()) == []


def test_an_engine_says_whether_its_bits_depend_on_the_batch(
    package: Package, make: Callable[..., Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "x.ling", batch_invariant=True)
    other = open_package(path, machine=machine(H200))

    assert [one.manifest.value["request"]["batch_invariant"] for one in (package, other)] == [
        False,
        True,
    ]
    assert [read_code(one).batch_invariant for one in (package, other)] == [False, True]
    tactics = {one.tactic for one in table_of(other).tactics}
    assert any(name.startswith("even.") for name in tactics)
    assert not any(
        name.startswith("even.") for name in (x.tactic for x in table_of(package).tactics)
    )


def test_a_batch_is_nothing_to_a_cpu(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--batch-invariant is for engines of the kind 'cuda'"):
        make(tmp_path / "x.ling", target="cpu", batch_invariant=True)

    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- vectors


@pytest.mark.long
def test_the_references_in_narrow_types_pass_the_vectors_and_a_wrong_weight_does_not(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    made = open_package(make(tmp_path / "x.ling", weights="embed"), machine=machine(H200))
    cases = vectors.decode(
        {name: made.read(f"tests/{name}") for name in (vectors.CASES, vectors.VECTORS)}
    )
    weights = dict(open_weights(made.shards()))

    def results(plan: Plan) -> list[vectors.VectorResult]:
        limits = Limits.from_tokens(slots=1, tokens_per_sequence=80, page_size=plan.page_size)
        backend = InterpreterBackend(plan, weights, limits)
        return [vectors.check(backend, case) for case in cases]

    right = results(made.plan)
    weights["layers.1.attention.g_norm.weight"] = np.zeros_like(
        weights["layers.1.attention.g_norm.weight"]
    )
    wrong = results(made.plan)

    assert all(one.is_right for one in right)
    assert sum(one.compared for one in right) >= 4
    assert not any(one.is_right for one in wrong)
    assert max(one.logit_error for one in right) > recording.F32_TOLERANCE


# --------------------------------------------------------------------------------------- inspect


def inspect(
    capsys: pytest.CaptureFixture[str], package: Package, *words: str | Path
) -> tuple[int, str, str]:
    code = main(["inspect", str(package.root), *map(str, words), "--progress", "none"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_schedule_tells_steps_of_alike_layers_once(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = inspect(capsys, package, "--schedule", "--context", "512")

    table = table_of(package)
    assert code == 0
    assert f"{table.launches(table.buckets[0])} launches" in out
    assert re.search(r"norm_router\.ids +1-\d+ +norm_router ", out)
    assert re.search(r"a slot +\d", out)


def test_the_schedule_as_json_adds_up_and_lies_in_the_arena(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = inspect(capsys, package, "--schedule", "--context", "512", "--json")

    bucket = json.loads(out)["bucket"]
    for field in ("launches", "microseconds", "moved_bytes", "flops"):
        assert bucket[field] == pytest.approx(sum(step[field] for step in bucket["steps"]))
    assert {step["origin"] for step in bucket["steps"]}
    for row in bucket["memory"]:
        assert row["offset"] + row["bytes"] <= bucket["arena_bytes"]
        assert 0 <= row["first"] <= row["last"] < len(bucket["steps"])


def test_the_page_needs_nothing_but_itself(
    package: Package, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = inspect(capsys, package, "--context", "512", "--html", tmp_path / "x.html")

    page = (tmp_path / "x.html").read_text()
    assert (code, err) == (0, f"wrote {tmp_path / 'x.html'}\n")
    assert page.count("<svg") == 2
    assert not re.search(r"<script|https?:|\bsrc=|@import", page)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--phase", "draft"], 2, r"no phase 'draft'.*it has: decode, verify"),
        (["--batch", "2", "--context", "512"], 2, r"no bucket of decode has room for 2 sequences"),
        (["--context", "4096"], 2, r"a context of 4096.*P up to 8 \(64 tokens a page\)"),
    ],
)
def test_a_step_that_there_is_no_bucket_for_is_refused(
    words: list[str], code: int, said: str, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = inspect(capsys, package, "--schedule", *words)

    assert found == code
    assert re.search(said, err, re.DOTALL)


def test_a_changed_table_is_not_shown(
    package: Package, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copied = tmp_path / "x.ling"
    shutil.copytree(package.root, copied)
    table = copied / "variants" / "h200-sxm" / "table.json.xz"
    table.write_bytes(table.read_bytes()[::-1])

    code = main(["inspect", str(copied), "--schedule"])

    assert code == 6
    assert "the launch table of" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the full model


@pytest.mark.long
@pytest.mark.parametrize("precision", full_size_builds.PRECISIONS)
@pytest.mark.parametrize("target", full_size_builds.TARGETS)
def test_the_full_size_engine_is_small_and_soon_made_again(
    target: str, precision: str, tmp_path: Path
) -> None:
    """Processes of their own in folders of their own; two cores have 180 s and 15 s."""
    cold, warm = full_size_builds.pair(target, precision, tmp_path)

    assert cold.bundle_id == warm.bundle_id
    assert cold.bytes < 5_000_000
    assert cold.busy < 2 * 180
    assert warm.busy < 2 * 15
    assert max(cold.peak_bytes, warm.peak_bytes) < 6e9
