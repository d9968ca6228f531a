"""What lies where in a package, what a path may look like, and how much a reader takes.

`docs/format.md` prints the limits and the roles; a test compares the two.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

FORMAT = 1
"""The format that this version writes, and the newest that it reads."""

MANIFEST = "manifest.json"
PLAN = "plan.json"
CONFIG = "model/config.json"
VARIANT_INFO = "variant.json"

MIB = 1 << 20

LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "manifest bytes": 16 * MIB,
        "manifest nesting": 64,
        "files": 100_000,
        "path characters": 512,
        "plan bytes": 256 * MIB,
        "variant.json bytes": 16 * MIB,
        "text characters": 4096,
    }
)

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "plan": "plan.json",
        "model": "model/<name>",
        "weights": "weights/<sha256>.safetensors",
        "variant": "variants/<target>/<path>",
        "kernel": "kernels/<sha256>.xz",
        "test": "tests/<name>",
    }
)
"""role -> the paths that have it. A path that fits none has no place in a package."""

# A component starts with a letter, a digit or `_`: no hidden file, no `..`, nothing that reads as
# an option. Being ASCII, two listed paths can collide by case only, never by normalisation.
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*"
_PATH = re.compile(rf"{_NAME}(?:/{_NAME})*")
_ROLE_PATTERNS = {
    "plan": re.compile(r"plan\.json"),
    "model": re.compile(rf"model/{_NAME}"),
    "weights": re.compile(r"weights/[0-9a-f]{64}\.safetensors"),
    "variant": re.compile(rf"variants/{_NAME}/{_NAME}(?:/{_NAME})*"),
    "kernel": re.compile(r"kernels/[0-9a-f]{64}\.xz"),
    "test": re.compile(rf"tests/{_NAME}"),
}
assert _ROLE_PATTERNS.keys() == ROLES.keys()

TOP_NAMES = frozenset({MANIFEST, *(pattern.partition("/")[0] for pattern in ROLES.values())})
"""The names that a package may have at its top."""


def is_path(text: str) -> bool:
    """Whether `text` can name a file of a package.

    >>> is_path("variants/cpu/decode.onnx"), is_path("../plan.json"), is_path("/plan.json")
    (True, False, False)
    """
    return len(text) <= LIMITS["path characters"] and _PATH.fullmatch(text) is not None


def role_of(path: str) -> str | None:
    """The role that a path has by its place, or None where no file may lie.

    >>> role_of("model/config.json"), role_of("notes.txt")
    ('model', None)
    """
    for role, pattern in _ROLE_PATTERNS.items():
        if pattern.fullmatch(path):
            return role
    return None
