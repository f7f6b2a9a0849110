"""The import arrows, what each package may load, and what a distribution holds."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Who may import whom; what is missing here is forbidden.
ARROWS = {
    "producers": set(),
    "models": set(),
    "workers": {"models", "producers"},
    "cluster": {"workers", "models", "producers", "benchmarks"},  # `proctor bench`, inside its commands alone
    "benchmarks": {"cluster", "workers", "models", "producers"},
}
# What a leaf never imports, not even inside a function.
FOREIGN = {"producers": {"torch", "torchvision", "timm", "ray"}, "models": {"redis", "ray"}}
BANNED_NAMES = {"util", "utils", "common", "helper", "helpers", "manager", "managers", "misc"}

MODULES = sorted(path for package in ARROWS for path in (ROOT / package).rglob("*.py"))

# Imports module by module and reports the first that has loaded something it may not.
PROBE = """
import importlib, json, sys
forbidden, modules = json.loads(sys.argv[1])
for module in modules:
    importlib.import_module(module)
    loaded = sorted(set(forbidden) & set(sys.modules))
    if loaded:
        print(f"importing {module} loads {', '.join(loaded)}")
        break
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_roots(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the top-level name and the line of every import in the file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield str(node.module).split(".")[0], node.lineno
            else:
                depth = len(path.relative_to(ROOT).parts) - 1
                assert node.level <= depth, f"{path}:{node.lineno} imports from above its package"


def loads(modules: list[str], forbidden: list[str]) -> str:
    """Import the modules in a fresh interpreter; return what was loaded against the rule, or nothing."""
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([forbidden, modules])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    return probe.stdout.strip()


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    forbidden = (set(ARROWS) - ARROWS[package] - {package}) | FOREIGN.get(package, set()) | {"tests"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}" for name, line in imported_roots(path) if name in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_names_say_what_is_inside(path):
    assert set(module_name(path).split(".")) & BANNED_NAMES == set()


@pytest.mark.parametrize(("package", "forbidden"), [("producers", ["torch", "ray"]), ("models", ["redis", "ray"])])
def test_a_leaf_loads_nothing_heavy_of_the_others(package, forbidden):
    modules = [module_name(path) for path in MODULES if path.is_relative_to(ROOT / package)]
    assert loads(modules, forbidden) == ""


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("workers.loop", ["ray"]),  # the loop runs, and is tested, without Ray
        ("cluster.cli", ["torch", "ray"]),  # `proctor --help` answers at once
        ("cluster.autoscaling", ["torch"]),  # Serve imports it in its controller
        ("benchmarks.engine", ["ray", "redis", "matplotlib"]),  # it runs where there is a GPU and little else
        ("benchmarks.cameras", ["torch", "ray"]),  # cameras start at once
    ],
)
def test_a_module_stays_light(module, forbidden):
    assert loads([module], forbidden) == ""


def test_the_distribution_holds_the_packages_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(path.relative_to(ROOT).parts[:-1]) for path in MODULES}
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_the_modules_of_the_four_packages_lie_flat():
    four = [path for path in MODULES if not path.is_relative_to(ROOT / "benchmarks")]
    assert [str(path) for path in four if len(path.relative_to(ROOT).parts) != 2] == []


def test_only_the_bench_commands_know_the_benchmarks():
    knowing = {module_name(path) for path in MODULES if "benchmarks" in {name for name, _ in imported_roots(path)}}
    assert {name for name in knowing if not name.startswith("benchmarks")} == {"cluster.bench_commands"}


def test_the_tests_lie_flat():
    assert [str(path) for path in (ROOT / "tests").rglob("*.py") if path.parent != ROOT / "tests"] == []


def test_the_arrows_would_catch_an_import_inside_a_function(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "models" / "late.py"
    path.parent.mkdir()
    path.write_text("def f():\n    from workers.loop import Loop\n    import redis.client\n")
    assert list(imported_roots(path)) == [("workers", 2), ("redis", 3)]
