"""The shape of the house: who imports what, what is pinned, and how few exceptions the linter gets.

The linter itself runs in .ci/run, not here.
"""
import ast
import graphlib
import re
import sys
import tokenize
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "experiments", "examples", "pocket_lm", "tests")
FILES = [*ROOT.glob("*.py"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py"))]
NAMES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
# Scripts and tests see the modules of their own folder by their bare names.
BARE = ("experiments.", "examples.", "tests.")
SHORT = {file.stem: name for name, file in NAMES.items() if name.startswith(BARE)}
OWN = {*NAMES, *SHORT, *FOLDERS}
IMPORT_TIME = {"torch", "transformers", "peft", "numpy"}


def top_level(tree):
    """The nodes of a module that run when it is imported, and need what they name.

    An import under `try` is left out: it is optional.
    """
    nodes = [tree]
    for node in nodes:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Try)):
            nodes.extend(ast.iter_child_nodes(node))


def imports(name, walk=ast.walk):
    """The modules that a module of the project imports, each with the packages above it."""
    found = set()
    for node in walk(ast.parse(NAMES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[:-node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    parts = [module.split(".") for module in found]
    return {".".join(part[:i + 1]) for part in parts for i in range(len(part))}


def own(name, walk=ast.walk):
    """The modules of the project that a module of the project imports."""
    found = imports(name, walk)
    return {SHORT.get(module, module) for module in found if SHORT.get(module, module) in NAMES}


def normal(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def foreign(name, walk=ast.walk):
    """The packages that a module imports from neither the project nor the standard library."""
    modules = {module.split(".")[0] for module in imports(name, walk)}
    called = {"PIL": "pillow"}  # packages whose modules have another name
    return {normal(called.get(module, module))
            for module in modules - OWN - sys.stdlib_module_names}


def reached(name):
    """The modules of the project that importing this one imports, itself among them."""
    names = [name]
    for each in names:
        names.extend(sorted(own(each, top_level) - set(names)))
    return names


def brought():
    """What the four packages require, so that it is there whenever they are."""
    lines = [line for package in IMPORT_TIME for line in metadata.requires(package) or ()]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines if "extra ==" not in line}


@pytest.mark.parametrize("room, needs", [
    ("prompts", set()),
    ("envs", {"numpy"}),
    ("ppo", {"numpy", "torch"}),
    ("twosome", IMPORT_TIME),
])
def test_a_room_needs_four_packages_at_most(room, needs):
    assert foreign(room, top_level) <= needs


def test_importing_the_rooms_needs_nothing_beyond_the_four_packages():
    """The basement that they import may take what the four packages bring along."""
    for name in reached("twosome"):
        assert foreign(name, top_level) <= IMPORT_TIME | brought(), name


@pytest.mark.parametrize("name", ["prompts", "envs", "ppo", "engine.trie"])
def test_what_can_be_copied_alone_imports_nothing_of_the_project(name):
    assert not imports(name) & OWN


def test_the_basement_never_imports_the_method():
    for name in NAMES:
        if name.startswith("engine."):
            rooms = {module for module in own(name) if not module.startswith("engine.")}
            assert rooms <= {"ppo", "envs", "prompts"}, name


def test_nothing_is_imported_in_a_ring():
    """Neither at import time nor later, in the rooms, the basement and the experiments."""
    graph = {name: own(name) for name in NAMES if not name.startswith("tests")}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_what_is_imported_is_pinned():
    pins = set()
    for file in (*ROOT.glob("requirements*.txt"), ROOT / "experiments" / "requirements.txt"):
        lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), file.name
        pins |= {normal(line.split("==")[0]) for line in lines}
    for name in NAMES:
        assert foreign(name) <= pins, name


def test_exceptions_to_the_linter_are_few_and_have_their_reason():
    """A line with one ends like this: `noqa: E402`, two spaces, the reason in words."""
    found = []
    for file in FILES:
        with tokenize.open(file) as source:
            tokens = list(tokenize.generate_tokens(source.readline))
        found += [t.string for t in tokens if t.type == tokenize.COMMENT and "noqa" in t.string]
    reason = re.compile(r"# noqa: [A-Z]+\d+(, [A-Z]+\d+)*  \w+ \w+")
    assert [comment for comment in found if not reason.search(comment)] == []
    assert len(found) <= 10


def test_no_folder_is_exempted_from_more_than_docstrings():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert not {"exclude", "extend-exclude"} & set(ruff)
    assert not {"ignore", "extend-ignore", "extend-per-file-ignores"} & set(ruff["lint"])
    assert all(rules == ["D1"] for rules in ruff["lint"]["per-file-ignores"].values())
