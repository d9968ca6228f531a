"""Which weight is stored how: recipes are data, read from `recipes/*.json` or a user's file.

    {
      "name": "int4",
      "summary": "one line",
      "activations": "plain" | "fp8" | "fp8_static",
      "rules": [
        {"modules": ["model.layers.*.mlp.experts.*"], "format": "int4_group", "group": 32,
         "optional": true}
      ]
    }

The first rule with a pattern that matches a module's name decides; a module that no rule matches is
`plain`. Patterns are shell patterns (`*` also matches dots) over the names of the checkpoint's
tensors without `.weight`. A pattern that matches nothing is an error, unless its rule is marked
optional: what the architecture may lack by config (experts, linear layers, the MTP layer).

Activations are those that FP8 weights are multiplied with: quantized on the fly, per token and 128
channels, in `fp8`; by one calibrated scale a module in `fp8_static`.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lingc.errors import RecipeError, UnknownPrecisionError
from lingc.quantize.formats import NIBBLES

KINDS = ("plain", "fp8_block", "fp8_tensor", "int4_group")
ACTIVATIONS = ("plain", "fp8", "fp8_static")

MAX_GROUP = 1 << 20
"""Wider than any matrix; a group that spans a whole row may name any larger number."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_FOLDER = Path(__file__).parent / "recipes"
_KEYS = {"name", "summary", "activations", "rules"}
_RULE_KEYS = {"modules", "format", "group", "optional"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How a weight is stored.

    Attributes:
        kind: One of `KINDS`.
        group: Columns that share a scale in `int4_group`, else 0.
    """

    kind: str = "plain"
    group: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.group})" if self.group else self.kind


PLAIN = Format()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a recipe.

    Attributes:
        modules: Patterns; a module that one of them matches has the format.
        optional: Whether a pattern may match nothing.
    """

    modules: tuple[str, ...]
    format: Format
    optional: bool = False

    def matches(self, module: str) -> bool:
        """Whether the rule speaks of a module."""
        return any(fnmatchcase(module, pattern) for pattern in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A precision: formats by module.

    Attributes:
        activations: `fp8` where inputs of FP8 weights are quantized on the fly, per token and 128
            channels, on targets that can; `fp8_static` where they have one calibrated scale a
            module; else `plain`.
    """

    name: str
    summary: str
    activations: str
    rules: tuple[Rule, ...]

    def format_of(self, module: str) -> Format:
        """The format of a module's weight.

        Args:
            module: `model.layers.3.attention.dense`.
        """
        rule = next((rule for rule in self.rules if rule.matches(module)), None)
        return PLAIN if rule is None else rule.format

    def in_engines(self, *, static: bool = False) -> "Recipe":
        """As an engine holds weights and computes.

        One that multiplies by static scales holds this recipe as it is, where it asks for them. Any
        other has FP8 in blocks, of which those of one matrix may share a scale, and quantizes
        inputs on the fly, which is never less exact than a scale for all of them.

        Args:
            static: Whether the engine multiplies by static scales.
        """
        if self.activations != "fp8_static" and all(
            rule.format.kind != "fp8_tensor" for rule in self.rules
        ):
            return self
        if static and self.activations == "fp8_static":
            return self
        return replace(
            self,
            activations="fp8" if self.activations == "fp8_static" else self.activations,
            rules=tuple(
                replace(rule, format=Format(kind="fp8_block"))
                if rule.format.kind == "fp8_tensor"
                else rule
                for rule in self.rules
            ),
        )

    def document(self) -> dict[str, Any]:
        """The recipe as a recipe file has it; `parse_recipe` gives it back."""
        return {
            "name": self.name,
            "summary": self.summary,
            "activations": self.activations,
            "rules": [
                {
                    "modules": list(rule.modules),
                    "format": rule.format.kind,
                    **({"group": rule.format.group} if rule.format.group else {}),
                    **({"optional": True} if rule.optional else {}),
                }
                for rule in self.rules
            ],
        }

    def digest(self) -> str:
        """SHA-256 of what the recipe does; name and summary do not count."""
        said = self.document()
        text = json.dumps([said["activations"], said["rules"]], sort_keys=True)
        return hashlib.sha256(f"lingc recipe 1\n{text}".encode()).hexdigest()

    def check_matches(self, modules: Iterable[str]) -> None:
        """Refuse patterns that say nothing about a model.

        Args:
            modules: Names of all modules with a weight.

        Raises:
            RecipeError: Patterns match nothing, or only what an earlier rule takes; all are listed.
        """
        names = tuple(modules)
        problems = [
            problem
            for i, rule in enumerate(self.rules)
            if not rule.optional
            for pattern in rule.modules
            if (problem := _unused(pattern, self.rules[:i], names))
        ]
        if problems:
            raise RecipeError(
                f"recipe {self.name!r} does not fit the model:" + _listed(problems),
                hint='correct the pattern, or mark its rule with "optional": true',
            )


def built_in() -> tuple[str, ...]:
    """Names of the recipes that come with lingc."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a built-in recipe by name, or a recipe file by path.

    Raises:
        UnknownPrecisionError: No built-in recipe has that name, and it is not a path.
        RecipeError: The file cannot be read, or has problems; all are listed.
    """
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or "/" in text or text.endswith(".json")
    if is_path or (text not in built_in() and os.path.lexists(text)):
        return _read(Path(name_or_path))
    if text not in built_in():
        near = difflib.get_close_matches(text.lower(), built_in(), n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownPrecisionError(
            f"no precision is called {text!r}",
            hint=f"{meant}there are {', '.join(built_in())}; a file is given by its path",
        )
    return _read(_FOLDER / f"{text}.json")


def _read(path: Path) -> Recipe:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read: {error.strerror or error}",
            hint=f"give a file, or one of {', '.join(built_in())}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"recipe {str(path)!r} is not JSON: {error}",
            hint="`lingc recipes fp8 --json` prints one to start from",
        ) from error
    return parse_recipe(value, source=str(path))


def parse_recipe(value: object, *, source: str) -> Recipe:
    """Build a recipe from parsed JSON.

    Args:
        value: The file's content.
        source: What the message calls it.

    Raises:
        RecipeError: Every problem, in one message.
    """
    problems = list(_problems(value))
    if problems or not isinstance(value, dict):
        raise RecipeError(
            f"recipe {source!r} has {_count(problems)}:" + _listed(problems),
            hint=f"compare with {str(_FOLDER / 'fp8.json')!r}",
        )
    return Recipe(
        name=value["name"],
        summary=value.get("summary", ""),
        activations=value.get("activations", "plain"),
        rules=tuple(
            Rule(
                modules=tuple(rule["modules"]),
                format=Format(kind=rule["format"], group=rule.get("group", 0)),
                optional=rule.get("optional", False),
            )
            for rule in value["rules"]
        ),
    )


def _problems(value: object) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"it is a {type(value).__name__}, not an object"
        return
    for key in sorted(value.keys() - _KEYS):
        yield f"the key {key!r} is unknown; there are {', '.join(sorted(_KEYS))}"
    name = value.get("name")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        yield f"name is {name!r}, not a text of letters, digits, '.', '_' and '-'"
    if not isinstance(value.get("summary", ""), str):
        yield f"summary is {value['summary']!r}, not a text"
    if value.get("activations", "plain") not in ACTIVATIONS:
        yield f"activations is {value['activations']!r}, not one of {', '.join(ACTIVATIONS)}"
    rules = value.get("rules")
    if not isinstance(rules, list):
        yield f"rules is {rules!r}, not a list"
        return
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, dict):
            yield from (f"rule {number}: {problem}" for problem in _rule_problems(rule))
        else:
            yield f"rule {number} is {rule!r}, not an object"


def _rule_problems(rule: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(rule.keys() - _RULE_KEYS):
        yield f"the key {key!r} is unknown; there are {', '.join(sorted(_RULE_KEYS))}"
    modules = rule.get("modules")
    if not (isinstance(modules, list) and modules and all(_is_pattern(m) for m in modules)):
        yield f"modules is {modules!r}, not a list of names or patterns without '.weight'"
    kind, group = rule.get("format"), rule.get("group", 0)
    if kind not in KINDS:
        yield f"format is {kind!r}, not one of {', '.join(KINDS)}"
    elif kind == "int4_group":
        if isinstance(group, bool) or not isinstance(group, int) or group < 1 or group % NIBBLES:
            yield f"group is {group!r}, not a positive multiple of {NIBBLES} (values in an int32)"
        elif group > MAX_GROUP:
            yield f"group is {group}, more than {MAX_GROUP}"
    elif group != 0:
        yield f"group is {group!r}, but {kind} has no groups"
    if not isinstance(rule.get("optional", False), bool):
        yield f"optional is {rule['optional']!r}, neither true nor false"


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) and bool(value) and not value.endswith(".weight")


def _unused(pattern: str, earlier: tuple[Rule, ...], modules: tuple[str, ...]) -> str | None:
    matched = [module for module in modules if fnmatchcase(module, pattern)]
    if not matched:
        near = difflib.get_close_matches(pattern, modules, n=1, cutoff=0.5)
        return f"{pattern!r} matches no module" + (f"; the nearest is {near[0]!r}" if near else "")
    if all(any(rule.matches(module) for rule in earlier) for module in matched):
        return f"{pattern!r} matches only modules that an earlier rule takes"
    return None


def _count(problems: list[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _listed(problems: Iterable[str]) -> str:
    return "".join(f"\n  - {problem}" for problem in problems)
