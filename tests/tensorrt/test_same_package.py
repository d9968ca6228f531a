"""A package with TensorRT engines that is built again: what differs, and that nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest

from lingc.build import build
from lingc.capture import Capturer, Sizes
from lingc.compile import Request
from lingc.engine import open_package
from lingc.runtime.tensorrt_package import read_code
from tests.tensorrt.engines import LING_TINY, config, has_rtx

pytestmark = [pytest.mark.long, has_rtx]

PHASES = ("prefill", "decode", "verify", "draft")
ENGINES = {f"variants/spark/{phase}.engine" for phase in PHASES}
FACTS = "variants/spark/variant.json"


def files(package: Path) -> dict[str, bytes]:
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in package.rglob("*")
        if path.is_file()
    }


def without_digests(manifest: bytes) -> Any:
    """A manifest without what depends on the bytes of engines."""
    value = json.loads(manifest)
    del value["bundle_id"]
    for one in value["files"]:
        if one["path"] in ENGINES | {FACTS}:
            del one["sha256"]
    return value


def test_only_the_engines_differ_and_what_says_their_digests(tmp_path: Path) -> None:
    request = Request(precision="int4-all", target="spark", engine="tensorrt")
    capturer = Capturer(config(), Sizes())
    packages = [tmp_path / f"{number}.ling" for number in range(2)]
    for package in packages:
        build(LING_TINY, package, request, capturer=capturer, cache_dir=tmp_path / "cache")
    one, two = map(files, packages)

    assert one.keys() == two.keys()
    differ = {name for name in one if one[name] != two[name]}
    assert differ <= ENGINES | {FACTS, "manifest.json"}
    assert {name: len(one[name]) for name in ENGINES} == {name: len(two[name]) for name in ENGINES}
    assert without_digests(one["manifest.json"]) == without_digests(two["manifest.json"])
    told = [json.loads(said[FACTS]) for said in (one, two)]
    cut = [facts.pop("constants") for facts in told]
    assert told[0] == told[1]
    held = [{p: sorted(w for _, w, _ in said[p]["holes"]) for p in PHASES} for said in cut]
    assert held[0] == held[1]
    for package in packages:
        code = read_code(open_package(package, level="integrity"))
        assert all(engine() for engine in code.engines.values())
