"""The docs are current: pages, links, paths, commands and code."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import click
import pytest

from lingc.cli import VERBS, lingc

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), *ROOT.glob("README.md")]
MADE = ("passes.md", "ops.md", "kernels.md", "targets.md", "cli.md")
ROOMS = ("artifacts", "demo", "docs", "lingc", "passes", "plugins", "targets", "tests")

ABSENT = re.compile(r"artifacts/(reports|build|[^/]+\.ling)\b|.*/x\.py")
"""What a command writes, and so is there after it alone; and any file, called x."""


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    pages: dict[str, str] = generator().pages()
    return pages


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Info string and content of every block of code."""
    for found in re.finditer(r"^```(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1].strip(), found[2]


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub spells it."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------- generated


@pytest.mark.parametrize("name", MADE)
def test_generated_pages_are_current(name: str, made: dict[str, str]) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")

    assert text == made[name], "the code says something else now: run `python docs/generate.py`"


def test_every_page_that_is_generated_is_looked_at(made: dict[str, str]) -> None:
    assert set(made) == set(MADE)


def test_a_page_that_is_not_current_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = generator()
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(module, "pages", lambda: {"ops.md": "new\n"})
    (tmp_path / "ops.md").write_text("old\n", encoding="utf-8")

    assert module.main(["--check"]) == 1
    assert "docs/ops.md is not current" in capsys.readouterr().err
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0
    assert module.main(["--chekc"]) == 2


def test_docs_are_no_package() -> None:
    assert not (DOCS / "__init__.py").exists()


# ----------------------------------------------------------------------------------- links, paths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (
            anchor and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`([^`\n]+)`", prose(page.read_text(encoding="utf-8")))
    missing = []
    for name in named:
        if re.fullmatch(r"[\w.-]+/[\w./-]*", name) and name.partition("/")[0] in ROOMS:
            if not (ROOT / name).exists() and not ABSENT.match(name):
                missing.append(name)
        elif re.fullmatch(r"lingc(\.\w+)+", name) and not is_known(name):
            missing.append(name)

    assert missing == []


def is_known(name: str) -> bool:
    """Whether `lingc.a.b` is a module, or a name in the text of the module `lingc.a`."""
    parent, _, leaf = name.rpartition(".")
    if has_module(name):
        return True
    if not has_module(parent):
        return False
    spec = find_spec(parent)
    assert spec is not None
    assert spec.origin is not None
    return bool(re.search(rf"\b{leaf}\b", Path(spec.origin).read_text(encoding="utf-8")))


def has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ------------------------------------------------------------------------------- commands and code


def commands(text: str) -> Iterator[list[str]]:
    """Every `lingc ...` in a text: lines of blocks and of examples, and `lingc VERB --option`."""
    lines = [line for info, block in blocks(text) if "python" not in info for line in joined(block)]
    lines += re.findall(r"`(lingc [^`\n]+)`", prose(text))
    lines += [line for line in prose(text).splitlines() if line.startswith("    lingc ")]
    for line in lines:
        found = re.match(r"\s*(?:[$#] )?(?:\S+ \| )?(lingc [a-z]+\b[^|>;#]*)", line)
        if found is not None and found[1].split()[1] in VERBS:
            yield shlex.split(re.sub(r"\s{2,}.*|->.*", "", found[1]))[1:]


def joined(block: str) -> list[str]:
    """Lines, those that a backslash continues put together."""
    return re.sub(r"\\\n\s*", " ", block).splitlines()


def unknown_options(words: list[str]) -> list[str]:
    command = lingc.get_command(click.Context(lingc), words[0])
    assert command is not None
    known = {"-h", "--help"}
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    given = (word.partition("=")[0].strip("[]") for word in words[1:])
    return [word for word in given if re.match(r"--?[a-z]", word) and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_shown_commands_exist(page: Path) -> None:
    shown = [*commands(page.read_text(encoding="utf-8"))]

    assert [(words, wrong) for words in shown if (wrong := unknown_options(words))] == []


def test_examples_are_found_in_help() -> None:
    verbs = {words[0] for words in commands((DOCS / "cli.md").read_text(encoding="utf-8"))}

    assert {"build", "plan", "passes", "run"} <= verbs


def runnable() -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        for info, block in blocks(page.read_text(encoding="utf-8"))
        if info == "python run"
    ]


@pytest.mark.parametrize(("page", "code"), runnable(), ids=[page for page, _ in runnable()])
def test_code_that_is_marked_to_run_runs(page: str, code: str) -> None:
    done = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=False, cwd=ROOT
    )

    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_something_is_marked_to_run() -> None:
    assert runnable()


# Tables, code and generated pages are as they are; a sentence does not go on on the next line.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in MADE], ids=lambda page: page.name
)
def test_a_line_is_a_sentence_or_more(page: Path) -> None:
    lines = prose(page.read_text(encoding="utf-8")).splitlines()
    wrapped = [
        line
        for line, after in pairwise(lines)
        if re.match(r"[A-Za-z`*\[]", line)
        and re.match(r"[a-z]", after)
        and not re.search(r"[.:?!;,]$", line)
    ]

    assert wrapped == []
