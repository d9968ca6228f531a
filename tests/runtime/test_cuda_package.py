"""A CUDA engine as a package: written, opened, started."""

import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lingc import launch_table
from lingc.checkpoint import SyntheticCheckpoint
from lingc.engine import Contents, Package, canonical, open_package, write_package
from lingc.engine.machine import Gpu, Machine
from lingc.errors import IntegrityError
from lingc.model.config import ARCHITECTURE
from lingc.plan import dumps
from lingc.runtime import Generator
from lingc.runtime import cuda_backend as module
from lingc.runtime.cuda_code import TABLE, read_code
from lingc.runtime.load import OpenedEngine
from lingc.weights import write_weights
from tests.runtime.cuda_engine import (
    CONFIG,
    LIMITS,
    REQUESTS,
    TARGET,
    code,
    loaded,
    plan_and_weights,
)
from tests.runtime.host_device import HostDevice

MACHINE = Machine(
    os="linux",
    arch="x86_64",
    version_of=lambda _name: "13.0",
    gpu=lambda: Gpu(name="Host GPU", capability="9.0", driver="13.0", memory_bytes=1 << 40),
)


def write(path: Path, **changes: Any) -> Package:
    plan, _ = plan_and_weights()
    table = canonical.encode(launch_table.to_value(code().table))
    shards = write_weights(
        plan.weights.values(), SyntheticCheckpoint(CONFIG, 0), CONFIG, path.parent / "shards"
    )
    gpu = {"capability": "9.0", "driver": ">=13.0", "memory_bytes": 1}
    needs = {"os": ["linux"], "arch": ["x86_64"], "libraries": {}, "gpu": gpu}
    contents = Contents(
        plan=dumps(plan),
        model_files={"config.json": b"{}"},
        variants={TARGET: {TABLE: lzma.compress(table)}},
        variant_info={TARGET: {"engine": "cuda", "runs_on": needs, "table": TABLE}},
        weights=shards,
        architecture=ARCHITECTURE,
        checkpoint=None,
        request={
            "precision": plan.precision,
            "target": TARGET,
            "engine": "cuda",
            "page_size": plan.page_size,
            "max_draft": plan.max_draft,
        },
        kernels={digest: code().kernel(digest) for digest in code().table.kernels},
    )
    write_package(path, replace(contents, **changes))
    return open_package(path, machine=MACHINE)


def test_a_package_is_started_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HostDevice()
    monkeypatch.setattr(module, "Device", lambda: device)
    package = write(tmp_path / "e.ling")
    opened = OpenedEngine(package=package, tokenizer=None, stop_ids=frozenset())
    want = [one.tokens for one in Generator(loaded()).generate(REQUESTS)]

    backend = opened.start(LIMITS)
    got = [one.tokens for one in Generator(backend).generate(REQUESTS)]
    backend.close()

    assert got == want
    assert read_code(package).driver == ">=13.0"
    assert device.is_closed
    assert not device.blocks


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (lzma.compress(b"[]"), "is not an object"),
        (lzma.compress(b"{"), "is not JSON"),
        (b"no xz file at all", "cannot be unpacked"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    package = write(tmp_path / "e.ling", variants={TARGET: {TABLE: data}})

    with pytest.raises(IntegrityError, match=message):
        read_code(package)


def test_a_kernel_that_is_changed_behind_the_check_is_refused(tmp_path: Path) -> None:
    package = write(tmp_path / "e.ling")
    digest = code().table.kernels[0]
    (package.root / "kernels" / f"{digest}.xz").write_bytes(b"other")

    with pytest.raises(IntegrityError, match="was changed after the package was checked"):
        read_code(package).kernel(digest)
