"""The specification and the code say the same; formats to come are told apart from damage."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lingc import plan as plans
from lingc.engine import canonical, open_package, read_manifest, verify
from lingc.engine.checks import CHECKS
from lingc.engine.layout import FORMAT, LIMITS, ROLES
from lingc.engine.machine import Machine, satisfies
from lingc.engine.manifest import SCHEMA, bundle_id
from lingc.engine.schema import fields
from lingc.errors import IncompatibleError, InputError, IntegrityError

SPECIFICATION = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def table(heading: str) -> Iterator[list[str]]:
    """Rows of the first table under a heading, without marks."""
    section = SPECIFICATION.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    for row in rows[2:]:
        yield [cell.strip().strip("`") for cell in row.split("|")]


def rewrite(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = package / "manifest.json"
    value = json.loads(path.read_bytes())
    change(value)
    value["bundle_id"] = bundle_id(value)
    path.write_bytes(canonical.encode(value))


def test_the_specification_lists_every_field_and_its_kind() -> None:
    assert [(name, kind) for name, kind, _ in table("Manifest")] == list(fields(SCHEMA))


def test_the_specification_lists_every_limit() -> None:
    assert {name: int(value) for name, value in table("Limits")} == LIMITS


def test_the_specification_lists_every_check_in_order() -> None:
    listed = [(name, (int(code), meaning)) for name, code, meaning in table("Checks")]
    assert listed == list(CHECKS.items())


def test_the_specification_lists_every_role() -> None:
    assert dict(table("Layout")) == ROLES


def test_the_specification_is_of_this_format() -> None:
    assert f"This page is its specification, format {FORMAT}." in SPECIFICATION


def test_the_limits_are_those_promised() -> None:
    promised = {
        "manifest bytes": 16 << 20,
        "manifest nesting": 64,
        "files": 100_000,
        "path characters": 512,
    }
    assert {name: LIMITS[name] for name in promised} == promised


def test_a_newer_format_is_named_with_what_to_do(package: Path, machine: Machine) -> None:
    rewrite(package, lambda value: value.update(format=7, format_min_reader=5, news=1))

    message = r"(?s)format 7, for readers from format 5.*hint: update lingc"
    with pytest.raises(IncompatibleError, match=message):
        read_manifest(package)
    with pytest.raises(IncompatibleError, match=message):
        open_package(package, machine=machine)
    assert verify(package, machine=machine).exit_code == 4


@pytest.mark.parametrize("change", [{"format": 2}, {"format": 99, "format_min_reader": 99}])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_format_raised_by_hand_is_a_newer_format(
    package: Path, machine: Machine, change: dict[str, int], indent: int | None
) -> None:
    path = package / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change, indent=indent))

    assert verify(package, machine=machine).exit_code == 4


def test_a_format_for_newer_readers_than_itself_is_damage(package: Path, machine: Machine) -> None:
    path = package / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"format_min_reader":1', b'"format_min_reader":3'))

    assert verify(package, machine=machine).exit_code == 6


def test_a_newer_format_that_we_may_read_is_read(package: Path, machine: Machine) -> None:
    rewrite(package, lambda value: value.update(format=2, news={"of": 2}))

    assert verify(package, machine=machine).exit_code == 0
    assert read_manifest(package).format == 2


def test_a_newer_plan_is_incompatible(package: Path, machine: Machine) -> None:
    path = package / "plan.json"
    text = path.read_text().replace('"format":1', f'"format":{plans.FORMAT + 1}')
    path.write_text(text)

    def relist(value: dict[str, Any]) -> None:
        entry = next(e for e in value["files"] if e["path"] == "plan.json")
        entry["sha256"] = hashlib.sha256(text.encode()).hexdigest()

    rewrite(package, relist)

    report = verify(package, machine=machine)
    assert [check.id for check in report.failed] == ["plan-format"]
    assert report.exit_code == 4


def test_an_unknown_requirement_is_not_met(package: Path, machine: Machine) -> None:
    rewrite(package, lambda value: value["variants"][0]["runs_on"].update(tensor_cores=4))

    report = verify(package, machine=machine)
    assert "requirement" in {check.id for check in report.failed}


@pytest.mark.parametrize(
    ("have", "check", "found"),
    [
        ({}, "library", "it is not installed"),
        ({"onnxruntime": "1.20.1"}, "library-version", "1.20.1"),
        ({"onnxruntime": "2.0"}, "library-version", "2.0"),
        ({"onnxruntime": ""}, "library-version", "no version"),
    ],
)
def test_a_library_that_does_not_do_is_named_with_the_extra(
    package: Path, have: dict[str, str], check: str, found: str
) -> None:
    report = verify(package, machine=Machine(os="linux", arch="x86_64", version_of=have.get))

    assert [(c.id, c.subject, c.found) for c in report.failed] == [(check, "onnxruntime", found)]
    assert report.failed[0].fix == "pip install 'lingc[onnx]'"
    assert report.exit_code == 4


def test_a_package_for_elsewhere_can_be_opened_on_purpose(package: Path) -> None:
    nowhere = Machine(os="plan9", arch="vax", version_of=lambda _: None)

    with pytest.raises(IncompatibleError, match="os: cpu expected linux, found plan9"):
        open_package(package, machine=nowhere)
    assert open_package(package, level="integrity", machine=nowhere).plan.target == "cpu"


@pytest.mark.parametrize(
    ("version", "versions", "fits"),
    [
        ("1.31.1", ">=1.31", True),
        ("1.31", ">=1.31.0", True),
        ("1.9", ">=1.31", False),
        ("1.31.1+cu130", "==1.31.1", True),
        ("2", "!=2.0", False),
        ("3.0", "<=3, >2", True),
        ("1", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, versions: str, *, fits: bool) -> None:
    assert satisfies(version, versions) is fits


@pytest.mark.parametrize("versions", ["1.2", "~=1", ">=x", ">=" + "9" * 5000])
def test_versions_that_cannot_be_read_are_refused(versions: str) -> None:
    with pytest.raises(ValueError, match="is not a comparison with a version"):
        satisfies("1", versions)


def test_structure_reads_no_content(package: Path, machine: Machine) -> None:
    data = (package / "plan.json").read_bytes()
    (package / "plan.json").write_bytes(b"x" * len(data))

    assert verify(package, level="structure", machine=machine).exit_code == 0
    assert verify(package, level="integrity", machine=machine).exit_code == 6


def test_a_path_that_is_no_package_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_bytes(b"{}")

    for name, what in {
        "none": "it does not exist",
        "file": "it is a file",
        "checkpoint": "it looks like a checkpoint",
        ".": r"it has no manifest\.json",
    }.items():
        with pytest.raises(InputError, match=f"is not a package: {what}"):
            verify(tmp_path / name)


def test_the_manifest_tells_what_the_package_is(package: Path) -> None:
    manifest = read_manifest(package)

    assert (manifest.target, manifest.precision, manifest.has_weights) == ("cpu", "fp8", True)
    assert manifest.checkpoint_identity == "a" * 64
    assert manifest.value["weights"]["bytes"] == 8 * 4 + 16 * 8 + 2 * 4
    assert manifest.value["variants"][0]["weights_in_use_bytes"] == 16 * 8 * 2
    assert manifest.value["graph"]["states"] == [
        {"name": "linear_state.{l}", "type": "f32[S, 2, 4, 4]", "count": 2}
    ]
    assert manifest.value["graph"]["programs"] == [
        {"phase": "decode", "steps": 1, "ops": {"lingc.linear": 1}}
    ]


def test_an_opened_package_gives_what_was_put_in(package: Path, machine: Machine) -> None:
    opened = open_package(package, machine=machine)

    assert opened.model_file("config.json") == b'{"hidden_size": 8}\n'
    assert opened.model_file("chat_template.jinja") is None
    assert opened.code().files["kernels/a.bin"].read_bytes() == bytes(range(256))
    assert opened.code().info["initializers"][0]["name"] == "w"
    assert opened.names("test") == ("tests/cases.json",)
    assert [shard.name for shard in opened.shards()] == [
        f"{opened.manifest.files[path].sha256}.safetensors" for path in opened.names("weights")
    ]
    with pytest.raises(InputError, match=r"has no file 'model/\.\./plan\.json'"):
        opened.read("model/../plan.json")
    (package / "plan.json").unlink()
    with pytest.raises(IntegrityError, match="was changed after"):
        opened.file("plan.json")
