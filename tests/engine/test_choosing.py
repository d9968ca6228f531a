"""Which of a package's variants runs on a machine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingc.engine import Contents, open_package, verify, write_package
from lingc.engine.machine import Gpu, Machine
from lingc.errors import UsageError
from lingc.plan import Plan, dumps

GB = 10**9
H20 = Gpu(name="NVIDIA H20", capability="9.0", driver="13.0", memory_bytes=97 * GB, sms=78)
H20_3E = replace(H20, name="NVIDIA H20-3e", memory_bytes=143 * GB)
H100 = Gpu(name="NVIDIA H100", capability="9.0", driver="13.0", memory_bytes=80 * GB, sms=132)
H200 = replace(H100, name="NVIDIA H200", memory_bytes=144 * GB)
OTHER = Gpu(name="RTX", capability="8.9", driver="13.0", memory_bytes=24 * GB, sms=76)


def write(
    folder: Path, contents: Contents, plan: Plan, targets: Sequence[str], capability: str = "9.0"
) -> Path:
    """A package whose plan was made for the first of the targets."""
    needs: dict[str, Any] = {"os": ["linux"], "arch": ["x86_64"], "libraries": {}}
    gpu = {"capability": capability, "driver": ">=13.0", "memory_bytes": 1 << 30}
    whole = replace(
        contents,
        plan=dumps(replace(plan, target=targets[0])),
        variants={name: {"code": name.encode()} for name in targets},
        variant_info={
            name: {"engine": "cuda", "runs_on": {**needs, "gpu": gpu}} for name in targets
        },
        request={**contents.request, "target": targets[0], "engine": "cuda"},
    )
    write_package(folder / "x.ling", whole)
    return folder / "x.ling"


def with_gpu(gpu: Gpu | str) -> Machine:
    return Machine(os="linux", arch="x86_64", version_of=lambda _name: "1", gpu=lambda: gpu)


@pytest.mark.parametrize(
    ("targets", "gpu", "chosen"),
    [
        (("h20", "h20-3e", "h200-sxm"), H20, "h20"),
        (("h20", "h20-3e", "h200-sxm"), H20_3E, "h20-3e"),
        (("h20", "h20-3e", "h200-sxm"), H200, "h200-sxm"),
        (("h20", "h20-3e", "h200-sxm"), H100, "h200-sxm"),
        (("h100-sxm", "h20"), H20_3E, "h20"),
        (("h100-sxm", "h20"), H200, "h100-sxm"),
        (("h20", "h200-sxm"), replace(H20, sms=0), "h20"),
        (("h20-3e", "some-gpu"), H200, "h20-3e"),
    ],
)
def test_the_variant_is_that_of_the_nearest_gpu(
    targets: tuple[str, ...], gpu: Gpu, chosen: str, tmp_path: Path, contents: Contents, plan: Plan
) -> None:
    package = open_package(write(tmp_path, contents, plan, targets), machine=with_gpu(gpu))

    assert package.code().target == chosen
    assert package.code().files["code"].read_bytes() == chosen.encode()


def test_what_was_asked_for_is_taken(tmp_path: Path, contents: Contents, plan: Plan) -> None:
    path = write(tmp_path, contents, plan, ("h20", "h200-sxm"))

    package = open_package(path, machine=with_gpu(H200), target="h20")

    assert package.code().target == "h20"
    assert package.code("h200-sxm").target == "h200-sxm"


def test_a_target_without_code_is_refused(tmp_path: Path, contents: Contents, plan: Plan) -> None:
    path = write(tmp_path, contents, plan, ("h20", "h200-sxm"))

    with pytest.raises(UsageError, match=r"no code for 'h100-sxm'[^?]*h20, h200-sxm"):
        open_package(path, machine=with_gpu(H200), target="h100-sxm")


def test_no_gpu_is_told_of_the_packages_own_target(
    tmp_path: Path, contents: Contents, plan: Plan
) -> None:
    path = write(tmp_path, contents, plan, ("h200-sxm", "h20"))

    (check,) = verify(path, machine=with_gpu("no driver")).failed

    assert (check.id, check.subject, check.found) == ("gpu", "h200-sxm", "no driver")
    assert open_package(path, level="integrity").code().target == "h200-sxm"


def test_another_generation_is_refused_whatever_is_nearest(
    tmp_path: Path, contents: Contents, plan: Plan
) -> None:
    path = write(tmp_path, contents, plan, ("h20", "h200-sxm"))

    assert {one.id for one in verify(path, machine=with_gpu(OTHER)).failed} == {"gpu"}
