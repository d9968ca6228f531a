"""The same contents give the same bytes, wherever, whenever and by whomever they are written."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lingc.engine import Contents, write_package

ROOT = Path(__file__).parents[2]

# Writes a package like the one at argv[1] to argv[2], with an umask of argv[3].
COPY = """
import json, os, shutil, sys
from pathlib import Path
from lingc.engine import Contents, read_manifest, write_package

source, target = map(Path, sys.argv[1:3])
os.umask(int(sys.argv[3], 8))
value = read_manifest(source).value
read = lambda path: (source / path).read_bytes()
names = lambda room: {p.name: p.read_bytes() for p in (source / room).iterdir() if p.is_file()}
shards = []
target.parent.mkdir(parents=True)
for path in (source / "weights").iterdir():
    shards.append(target.parent / path.name)
    shutil.copyfile(path, shards[-1])
variant = names("variants/cpu")
info = json.loads(variant.pop("variant.json"))
variant["kernels/a.bin"] = read("variants/cpu/kernels/a.bin")
checkpoint = value["model"]["checkpoint"]
write_package(target, Contents(
    plan=read("plan.json").decode(), model_files=names("model"), tests=names("tests"),
    variants={"cpu": variant}, variant_info={"cpu": info}, weights=shards,
    architecture=value["model"]["architecture"],
    checkpoint=(checkpoint["layout"], checkpoint["identity"]),
    request=value["request"], passes=value["graph"]["passes"], quant=value["quant"],
    producer=value["producer"],
))
"""


def listing(package: Path) -> dict[str, tuple[str, bytes]]:
    """Path -> mode and bytes."""
    return {
        path.relative_to(package).as_posix(): (
            oct(path.stat().st_mode),
            path.read_bytes() if path.is_file() else b"",
        )
        for path in package.rglob("*")
    }


def test_place_user_time_zone_locale_and_umask_do_not_show(package: Path, tmp_path: Path) -> None:
    surroundings = [
        ("022", "a", {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1", "USER": "me"}),
        ("077", "b/deep er/ü", {"TZ": "Asia/Shanghai", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"}),
    ]
    for umask, place, environment in surroundings:
        directory = tmp_path / place
        home = tmp_path / f"home-{umask}"
        home.mkdir()
        command = (sys.executable, "-c", COPY, package, directory / "y.ling", umask)
        variables = {"PYTHONPATH": str(ROOT), "HOME": str(home), **environment}
        subprocess.run(command, check=True, cwd=home, env=variables)

    one, other = (listing(tmp_path / place / "y.ling") for _, place, _ in surroundings)
    assert one == other == listing(package)


def test_the_order_in_which_contents_are_given_does_not_show(
    embed: Callable[[], Contents], tmp_path: Path
) -> None:
    contents = embed()
    assert contents.weights is not None
    turned = replace(
        contents,
        model_files=dict(list(contents.model_files.items())[::-1]),
        request=dict(list(contents.request.items())[::-1]),
        weights=list(reversed(contents.weights)),
    )
    write_package(tmp_path / "a", turned)

    write_package(tmp_path / "b", embed())

    assert listing(tmp_path / "a") == listing(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, model_files={**c.model_files, "more": b"1"}),
        lambda c: replace(c, request={**c.request, "more": 1}),
        lambda c: replace(c, producer={**c.producer, "more": "1"}),
        lambda c: replace(c, checkpoint=None),
    ],
)
def test_other_contents_have_another_id(
    contents: Contents, tmp_path: Path, change: Callable[[Contents], Contents]
) -> None:
    one = write_package(tmp_path / "a", contents)

    other = write_package(tmp_path / "b", change(contents))

    assert other.bundle_id != one.bundle_id


def test_reading_packages_loads_no_compiler() -> None:
    heavy = "{'torch', 'triton', 'onnx', 'onnxruntime', 'onnxscript'}"
    program = f"import sys, lingc.engine, lingc.engine.bind; print({heavy} & set(sys.modules))"
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}

    found = subprocess.run(
        (sys.executable, "-c", program), check=True, capture_output=True, text=True, env=variables
    )

    assert found.stdout == "set()\n"
