"""A package that is not what was written, or not for this version, is never used."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lingc.engine import canonical, open_package, verify
from lingc.engine.bind import bind

if TYPE_CHECKING:
    from tests.robustness.conftest import Lingc, Refuses


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(paths: Sequence[Path], *, flips: int, judge: Callable[[], int]) -> set[int]:
    """What `judge` says of every flipped byte, in each of the files in turn."""
    draw = random.Random(2606)  # noqa: S311 a seeded choice of bytes
    codes = set()
    for number in range(flips):
        path = paths[number % len(paths)]
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        flipped = whole[at] ^ draw.randrange(1, 256)
        path.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        codes.add(judge())
        path.write_bytes(whole)
    return codes


def assert_every_flip_is_caught(package: Path, *, flips: int) -> None:
    def judge() -> int:
        return verify(package, level="integrity").exit_code

    codes = flip(files(package), flips=flips, judge=judge)

    assert codes == {6}
    assert verify(package).exit_code == 0


def test_a_flipped_byte_in_any_file_is_caught(package: Path) -> None:
    assert_every_flip_is_caught(package, flips=150)


@pytest.mark.long
def test_a_thousand_flipped_bytes_are_caught(package: Path) -> None:
    assert_every_flip_is_caught(package, flips=1000)


def test_a_flipped_byte_in_bound_weights_is_caught(
    built_external: Path, small: Path, tmp_path: Path
) -> None:
    bound = bind(open_package(built_external), small, cache_dir=tmp_path)

    def judge() -> int:
        return verify(built_external, level="integrity", cache_dir=tmp_path).exit_code

    assert flip(files(bound.path), flips=20, judge=judge) == {6}
    assert judge() == 0


VERBS = (["verify"], ["verify", "--run"], ["run", "--ids", "1"])


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_no_verb_uses_a_package_with_a_flipped_byte(
    words: list[str], package: Path, lingc: "Lingc"
) -> None:
    plan = package / "plan.json"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)

    answer = lingc(words[0], package, *words[1:], "-q")

    assert answer.code == 6
    assert re.search(r"digest|plan\.json", answer.err)
    assert "Traceback" not in answer.err


def test_a_manifest_with_a_flipped_byte_is_not_shown(package: Path, refuses: "Refuses") -> None:
    manifest = package / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"page_size":64', b'"page_size":65'))

    assert re.search(r"not what was written.*id", refuses(6, "inspect", package), re.DOTALL)


def rewrite_manifest(package: Path, **changes: Any) -> None:
    """With a digest that fits: as another version would write it."""
    path = package / "manifest.json"
    value = {**json.loads(path.read_text()), **changes}
    del value["bundle_id"]
    value["bundle_id"] = canonical.sha256(value)
    path.write_bytes(canonical.encode(value))


@pytest.mark.parametrize("words", [*VERBS, ["inspect"]], ids=" ".join)
def test_a_newer_format_is_told_from_damage(
    words: list[str], package: Path, lingc: "Lingc"
) -> None:
    rewrite_manifest(package, format=2, format_min_reader=2)

    answer = lingc(words[0], package, *words[1:], "-q")

    assert answer.code == 4
    assert re.search(r"format.*\nhint: update lingc|1 of \d+ checks failed: format", answer.err)


def test_a_package_for_another_machine_says_what_it_needs(
    package: Path, refuses: "Refuses"
) -> None:
    path = package / "variants" / "cpu" / "variant.json"
    info = json.loads(path.read_text())
    value = json.loads((package / "manifest.json").read_text())
    for said in (info, value["variants"][0]):
        said["runs_on"]["arch"] = ["riscv64"]
    path.write_bytes(canonical.encode(info))
    (entry,) = (file for file in value["files"] if file["path"] == "variants/cpu/variant.json")
    entry["size"] = path.stat().st_size
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite_manifest(package, variants=value["variants"], files=value["files"])

    said = refuses(4, "run", package, "--ids", "1", "-q")

    assert re.search(r"arch: cpu expected riscv64, found \w+.*\nhint: run it on riscv64", said)


def test_a_missing_file_is_named(package: Path, refuses: "Refuses") -> None:
    (package / "variants" / "cpu" / "decode.onnx").unlink()

    said = refuses(6, "run", package, "--ids", "1", "-q")

    assert re.search(r"missing: variants/cpu/decode\.onnx", said)


# --------------------------------------------------------------------------------- other weights


def test_weights_of_another_checkpoint_are_refused(
    built_external: Path, other: Path, refuses: "Refuses"
) -> None:
    told = r"the package was made for checkpoint [0-9a-f]{64}, this is checkpoint [0-9a-f]{64}"

    bound = refuses(6, "bind", built_external, "--checkpoint", other, "-q")
    ran = refuses(6, "run", built_external, "--checkpoint", other, "--ids", "1", "-q")

    assert re.search(told, bound)
    assert re.search(told, ran)


def test_a_checkpoint_of_another_config_is_refused(
    built_for_config: Path, wider: Path, refuses: "Refuses"
) -> None:
    said = refuses(3, "bind", built_for_config, "--checkpoint", wider, "-q")

    assert re.search(r"of another model.*'intermediate_size' is 96 in the pack", said, re.DOTALL)


def test_weights_for_a_package_that_has_its_own_are_refused(
    built: Path, small: Path, refuses: "Refuses"
) -> None:
    bound = refuses(2, "bind", built, "--checkpoint", small, "-q")
    ran = refuses(2, "run", built, "--checkpoint", small, "--ids", "1", "-q")

    assert re.search(r"holds its weights and takes no others", bound)
    assert re.search(r"holds its weights and takes no others", ran)


def test_a_package_without_weights_says_how_to_get_them(
    built_external: Path, refuses: "Refuses"
) -> None:
    said = refuses(3, "run", built_external, "--ids", "1", "-q")

    assert re.search(r"holds no weights.*\nhint: .*lingc bind \S+external\.ling --checkpoint", said)


@pytest.mark.parametrize("verb", ["verify", "run", "bind"])
def test_what_is_no_package_is_told_so(
    verb: str, small: Path, refuses: "Refuses", tmp_path: Path
) -> None:
    options: dict[str, list[object]] = {"run": ["--ids", "1"], "bind": ["--checkpoint", small]}
    words = options.get(verb, [])

    nothing = refuses(3, verb, tmp_path / "nowhere.ling", *words, "-q")
    checkpoint = refuses(3, verb, small, *words, "-q")

    assert re.search(r"nowhere\.ling' is not a package: it does not exist", nothing)
    assert re.search(r"is not a package: it looks like a checkpoint", checkpoint)
