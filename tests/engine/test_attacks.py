"""A package from a stranger cannot reach out of its directory, nor exhaust its reader."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lingc.engine import canonical, open_package, read_manifest, verify
from lingc.engine.layout import LIMITS, is_path
from lingc.engine.machine import Machine
from lingc.engine.manifest import bundle_id
from lingc.errors import IntegrityError

Change = Callable[[dict[str, Any]], object]


def rewrite(package: Path, change: Change) -> None:
    """Change a manifest as an attacker would, who knows how its id is taken."""
    path = package / "manifest.json"
    value = json.loads(path.read_bytes())
    change(value)
    value["bundle_id"] = bundle_id(value)
    path.write_bytes(canonical.encode(value))


def failed(package: Path, machine: Machine) -> set[str]:
    report = verify(package, machine=machine)
    assert report.exit_code == 6
    return {check.id for check in report.failed}


def test_a_symbolic_link_in_place_of_a_file(package: Path, machine: Machine) -> None:
    plan = package / "plan.json"
    plan.rename(package.parent / "plan.json")
    plan.symlink_to(package.parent / "plan.json")

    assert failed(package, machine) >= {"node", "digest"}


def test_a_symbolic_link_in_place_of_a_directory(package: Path, machine: Machine) -> None:
    (package / "model").rename(package.parent / "model")
    (package / "model").symlink_to(package.parent / "model")

    assert "node" in failed(package, machine)


def test_a_symbolic_link_in_place_of_the_manifest(package: Path, machine: Machine) -> None:
    (package / "manifest.json").rename(package.parent / "m.json")
    (package / "manifest.json").symlink_to(package.parent / "m.json")

    assert failed(package, machine) == {"manifest"}


def test_a_link_to_the_whole_package_is_followed(package: Path, machine: Machine) -> None:
    link = package.parent / "latest.ling"
    link.symlink_to(package)

    assert verify(link, machine=machine).exit_code == 0


def test_a_file_with_a_second_name_outside(package: Path, machine: Machine) -> None:
    os.link(package / "plan.json", package.parent / "plan.json")

    assert failed(package, machine) == {
        "node",
        "digest",
    }


def test_a_fifo_does_not_hang_the_reader(package: Path, machine: Machine) -> None:
    (package / "plan.json").unlink()
    os.mkfifo(package / "plan.json")
    (package / "manifest.json").rename(package.parent / "m.json")
    os.mkfifo(package / "manifest.json")

    assert failed(package, machine) == {"manifest"}
    (package / "manifest.json").unlink()
    (package.parent / "m.json").rename(package / "manifest.json")
    assert failed(package, machine) >= {"node", "digest"}


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../plan.json",
        "model/../../plan.json",
        "model//config.json",
        "model/./config.json",
        "model/",
        "model\\config.json",
        ".hidden",
        "model/.hidden",
        "model/con\u0000fig",
        "model/caf\u00e9.json",
        "model/\ud800",
        "-rf",
        "C:/x",
        "",
        "a/" * 256 + "b",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(package: Path, machine: Machine, path: str) -> None:
    def add(value: dict[str, Any]) -> None:
        entry = {"path": path, "role": "model", "size": 0, "sha256": "0" * 64}
        value["files"] = sorted([*value["files"], entry], key=lambda e: str(e["path"]))

    rewrite(package, add)

    assert not is_path(path)
    assert failed(package, machine) == {"path"}


@pytest.mark.parametrize("path", ["README.md", "model/a/b.json", "weights/x.safetensors", "model"])
def test_a_path_without_a_place_is_refused(package: Path, machine: Machine, path: str) -> None:
    def add(value: dict[str, Any]) -> None:
        entry = {"path": path, "role": "model", "size": 0, "sha256": "0" * 64}
        value["files"] = sorted([*value["files"], entry], key=lambda e: str(e["path"]))

    rewrite(package, add)

    assert failed(package, machine) == {"layout"}


def test_names_that_differ_by_case_alone(package: Path, machine: Machine) -> None:
    (package / "model" / "CONFIG.json").write_bytes(b"{}")

    assert failed(package, machine) == {"collision", "extra"}


def test_names_that_differ_by_unicode_form_alone(package: Path, machine: Machine) -> None:
    # U+FB01 is one letter that normalises to two.
    (package / "model" / "con\ufb01g.json").write_bytes(b"{}")

    assert failed(package, machine) == {"collision", "extra"}


def test_a_name_that_is_no_text_is_shown_safely(package: Path, machine: Machine) -> None:
    (package / os.fsdecode(b"\xff\x1b[31m")).write_bytes(b"")

    report = verify(package, machine=machine)

    assert [c.subject for c in report.failed] == [r"'\udcff\x1b[31m'"]


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[]\n",
    "spaces": b'{"format": 1}\n',
    "a key twice": b'{"format":1,"format":1}\n',
    "not UTF-8": b'{"format":"\xff"}\n',
    "not finite": b'{"format":NaN}\n',
    "too large a number": b'{"format":1e999}\n',
    "a number of 10,000 digits": b'{"format":' + b"9" * 10_000 + b"}\n",
    "nested deep": b'{"a":' + b"[" * 65 + b"]" * 65 + b"}\n",
    "nested to the stack's end": b"[" * 1_000_000,
    "an empty object": b"{}\n",
    "a text for a number": b'{"format":"1","format_min_reader":null}\n',
    "true for a number": b'{"format":true,"format_min_reader":true}\n',
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_manifest_is_refused_in_words(
    package: Path, machine: Machine, name: str
) -> None:
    (package / "manifest.json").write_bytes(MALFORMED[name])

    assert "manifest" in failed(package, machine)
    with pytest.raises(IntegrityError, match=r"manifest"):
        read_manifest(package)


def test_a_manifest_beyond_the_limit_is_not_read(package: Path, machine: Machine) -> None:
    with (package / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()

    found = failed(package, machine)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == {"manifest"}
    assert peak < 3 * LIMITS["manifest bytes"]


def test_more_files_than_a_package_may_have(
    package: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingc.engine.examine.LIMITS", {**LIMITS, "files": 10})
    for number in range(30):
        (package / "tests" / f"{number}").write_bytes(b"")

    assert "extra" in failed(package, machine)


def test_more_files_listed_than_a_package_may_have(
    package: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lingc.engine.manifest.LIMITS", {**LIMITS, "files": 5})

    assert failed(package, machine) == {"layout"}


def test_a_tree_deeper_than_a_path_is_not_followed(package: Path, machine: Machine) -> None:
    deep = package
    for _ in range(300):
        deep /= "aa"
    deep.mkdir(parents=True)

    assert failed(package, machine) == {"extra"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variants", []),
        ("files", []),
        ("request", {}),
        ("weights", None),
        ("quant", "none"),
        ("producer", {"lingc": 1}),
        ("model", {"architecture": "x" * 5000, "config_sha256": "A" * 64, "checkpoint": 1}),
    ],
)
def test_a_field_of_another_shape_is_named(
    package: Path, machine: Machine, field: str, value: object
) -> None:
    rewrite(package, lambda manifest: manifest.update({field: value}))

    report = verify(package, machine=machine)

    assert report.exit_code == 6
    assert any(check.subject.startswith(field) for check in report.failed)


def test_a_field_that_the_format_lacks_is_refused(package: Path, machine: Machine) -> None:
    rewrite(package, lambda manifest: manifest.update({"\x1b[2J": 1}))

    assert failed(package, machine) == {"manifest"}


def test_weights_listed_and_external_contradict(package: Path, machine: Machine) -> None:
    rewrite(package, lambda manifest: manifest["weights"].update({"kind": "external"}))

    assert failed(package, machine) == {"layout"}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("request", "precision", "bf16"), ("request", "page_size", 1), ("weights", "bytes", 1)],
)
def test_a_manifest_of_another_plan_is_caught(
    package: Path, machine: Machine, section: str, field: str, value: object
) -> None:
    rewrite(package, lambda manifest: manifest[section].update({field: value}))

    assert failed(package, machine) == {"agreement"}


def test_a_variant_that_says_otherwise_is_caught(package: Path, machine: Machine) -> None:
    rewrite(package, lambda value: value["variants"][0]["runs_on"].update({"arch": ["x86_64"]}))

    assert failed(package, machine) == {"agreement"}


def test_nothing_is_parsed_before_its_digest_is_known(
    package: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tripwire(*_: object) -> None:
        pytest.fail("a file was parsed that is not what was written")

    for name in ("judge_plan", "judge_agreement", "judge_variant", "judge_weights"):
        monkeypatch.setattr(f"lingc.engine.examine.{name}", tripwire)
    for path in ("plan.json",):
        data = (package / path).read_bytes()
        (package / path).write_bytes(data[:-1] + b" ")

    with pytest.raises(IntegrityError, match=r"digest: plan\.json"):
        open_package(package, machine=machine)


def test_a_file_swapped_after_the_check_is_not_handed_out(package: Path, machine: Machine) -> None:
    opened = open_package(package, machine=machine)
    path = package / "variants" / "cpu" / "decode.onnx"
    time.sleep(0.01)
    path.write_bytes(b"an ingine")

    with pytest.raises(IntegrityError, match="was changed after the package was checked"):
        opened.read("variants/cpu/decode.onnx")
    with pytest.raises(IntegrityError, match="was changed after the package was checked"):
        opened.code()
