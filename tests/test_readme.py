"""What README and docs promise is there: commands, keys, defaults, files, links, names."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest
import typer
from pydantic import BaseModel

from cluster.cli import app
from cluster.config import ProctorConfig
from producers import keys
from workers.results import SCHEMA

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ["producers", "models", "workers", "cluster"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
KEY = re.compile(r"\[([a-z_.A-Z]+)\] ([a-z_]+|NAME)")
DEFAULT = re.compile(r"^\| `(?:\[([a-z_.A-Z]+)\] ([a-z_]+|NAME)|home)` \| (`[^`]*`|unset) \|", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
USAGE_ERROR = typer.BadParameter.__mro__[1]  # typer carries its own click


def fenced(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return CODE.findall(prose(page))


# --- commands


def command_lines(text: str) -> list[list[str]]:
    """Every `proctor ...` of a shell line as its words, without what is piped to or from it."""
    words = shlex.split(text, comments=True)
    lines: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";", "&", ">"):
            lines.append([])
        else:
            lines[-1].append(word)
    return [line[1:] for line in lines if line and line[0] == "proctor"]


def parse(words: list[str]) -> None:
    """Parse a command line as the command line itself would, without running it.

    Raises:
        USAGE_ERROR: no such command or option, or a value that is refused.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("proctor", list(words))
    while hasattr(command, "commands"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def in_blocks() -> list[tuple[str, list[str]]]:
    return [
        (f"{page.name}: {line}", words)
        for page in PAGES
        for block in fenced(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        for words in command_lines(line)
    ]


def in_prose() -> list[tuple[str, list[str]]]:
    return [
        (f"{page.name}: {code}", words)
        for page in PAGES
        for code in inline_code(page)
        if re.match(r"proctor [a-z-]", code)
        for words in command_lines(code)
    ]


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in in_blocks()])
def test_a_command_line_of_a_block_can_be_typed(words):
    parse(words)


@pytest.mark.parametrize("words", [pytest.param(words, id=name) for name, words in in_prose()])
def test_a_command_named_in_a_sentence_exists(words):
    try:
        parse(words)
    except typer.Exit:
        return  # a group by itself shows its help
    except USAGE_ERROR as error:
        # a sentence may name a command, or an option, without all that it needs
        if type(error).__name__ not in ("MissingParameter", "BadOptionUsage", "NoArgsIsHelpError"):
            raise


@pytest.mark.parametrize("words", [["pusch"], ["push", "x", "-p", "p", "-c", "c", "--fsp", "3"], ["models", "drop"]])
def test_a_wrong_command_line_would_be_noticed(words):
    with pytest.raises(USAGE_ERROR):
        parse(words)


def test_the_walk_through_uses_the_commands_of_a_shift():
    used = {words[0] for name, words in in_blocks() if name.startswith(README.name)}
    assert {"up", "train", "push", "status", "results", "approve", "down"} <= used


# --- configuration


def table_of(section: str) -> type[BaseModel]:
    """The settings class behind a table of `proctor.toml`; NAME stands for any product."""
    model: Any = ProctorConfig
    for part in section.split("."):
        if isinstance(model, type) and issubclass(model, BaseModel):
            assert part in model.model_fields, f"no table [{section}]"
            model = model.model_fields[part].annotation
        else:
            model = get_args(model)[1]
    return model


def check_key(section: str, key: str) -> None:
    model = table_of(section)
    if key == "NAME":
        assert get_args(model)[0] is str, f"[{section}] is not a table of names"
    else:
        assert key in model.model_fields, f"no key {key} in [{section}]"


def all_keys(model: type[BaseModel] = ProctorConfig, section: str = "") -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for name, field in model.model_fields.items():
        below = f"{section}.{name}".lstrip(".")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= all_keys(field.annotation, below)
        elif name == "products":
            found |= all_keys(get_args(field.annotation)[1], "products.NAME")
        else:
            found.add(("teachers", "NAME") if name == "teachers" else (section, name))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_and_table_exists(page):
    for code in inline_code(page):
        if named := KEY.fullmatch(code):
            check_key(named[1], named[2])
        elif table := re.fullmatch(r"\[([a-z_.]+)\]", code):
            table_of(table[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_default_is_the_real_one(page):
    for section, key, shown in DEFAULT.findall(prose(page)):
        written = None if shown == "unset" else tomllib.loads(f"x = {shown.strip('`')}")["x"]
        if key == "NAME":
            assert written is None
            continue
        model, name = (table_of(section), key) if section else (ProctorConfig, "home")
        fields = model.model_fields
        others = {other: field.default for other, field in fields.items() if field.default_factory is None}
        default = fields[name].get_default(call_default_factory=True, validated_data=others)
        assert (str(default) if isinstance(default, Path) else default) == written, f"[{section}] {name}"


def test_the_page_on_tuning_lists_every_key():
    listed = {(section, key or "home") for section, key, _ in DEFAULT.findall(prose(ROOT / "docs" / "tune.md"))}
    assert listed == all_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_shown_is_valid(page):
    for block in fenced(page, "toml"):
        ProctorConfig.model_validate(tomllib.loads(block))


# --- files, links, names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for target in LINK.findall(prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), target
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_project_that_is_named_exists(page):
    folders = "|".join([*PACKAGES, "tests", "benchmarks", "docs"])
    named = {code for code in inline_code(page) if re.fullmatch(rf"(?:{folders})/[\w/]+\.(?:py|md|svg)", code)}
    named |= set(re.findall(r"<br>([a-z]+/\w+\.py)", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_table():
    linked = set(LINK.findall(README.read_text(encoding="utf-8")))
    assert [page.name for page in PAGES if page != README and f"docs/{page.name}" not in linked] == []


def test_the_map_of_folders_lists_the_packages_and_nothing_that_is_not_there():
    (folders,) = [block for block in fenced(README, "") if block.startswith("producers/")]
    listed = re.findall(r"^(\w+)/", folders, re.MULTILINE)
    packages = {name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert sorted(set(listed) - {"tests", "docs"}) == sorted(packages)
    assert len(listed) == len(set(listed))
    assert [name for name in listed if not (ROOT / name).is_dir()] == []


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {"demo", "test"}
    for page in PAGES:
        text = "\n".join([*inline_code(page), *fenced(page, "bash")])
        named |= set(re.findall(r"^make ([a-z]+)$", text, re.MULTILINE))
    assert named <= targets
    assert "make demo\nmake test\n" in fenced(README, "bash")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_that_is_shown_imports_what_exists(page):
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# --- facts


def test_the_page_on_architecture_has_the_schema_of_the_results():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("\n## A row of the results\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE)
    assert rows == [(field.name, str(field.type)) for field in SCHEMA]


def test_the_page_on_architecture_has_the_streams_keys():
    named = set(inline_code(ROOT / "docs" / "architecture.md"))
    for key in (keys.frames, keys.verdicts, keys.dead, keys.ledger, keys.waiting):
        assert key("product") in named
    assert keys.PRODUCTS in named
    assert keys.GROUP in named


def test_the_answer_shown_is_the_interfaces_own_shape():
    (block,) = fenced(README, "json")
    answer = json.loads(block)
    source = (ROOT / "workers" / "replica.py").read_text(encoding="utf-8")
    assert answer["score"] > answer["threshold"]
    assert answer["verdict"] == "fail"
    assert [name for name in (*answer, *answer["map"]) if f'"{name}"' not in source] == []


def test_the_picture_is_whole_and_needs_no_other_host():
    picture = ROOT / "docs" / "status.svg"
    root = ElementTree.parse(picture).getroot()
    shown = "".join(root.itertext()).replace("\xa0", " ")
    for word in ("Ledger (balanced)", "captured", "judged", "in flight", "Replicas", "inspecting", "training"):
        assert word in shown
    addresses = re.findall(r"https?://[^\s\"')]+", picture.read_text(encoding="utf-8"))
    assert set(addresses) == {"http://www.w3.org/2000/svg"}
