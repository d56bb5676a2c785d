"""Architecture tests: imports go downwards only, and heavy libraries are imported where they are used."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cnext

ROOT = Path(cnext.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py"))
LIGHT = {"torch", "numpy", "msgspec", "cnext"}
SIBLINGS = ("methods", "backbones", "tasks", "scoring")
LEVELS = (
    ("errors", "kernels"),
    ("packages", "regular_files"),
    ("records", "registry", "tensor_files", "image_files", "durable", "kv_cache", "distributed", "ops"),
    ("adapters", "averaging"),
    SIBLINGS,
    ("config",),
    ("runs",),
    ("tables", "integrations"),
    ("monitoring", "analysis", "judging"),
    ("report",),
    ("results",),
    ("training",),
    ("exchange", "studies", "testing"),
    ("doctor", "example_method"),
    ("cli",),
    ("__main__",),
)
"""Packages by level, lowest first: a module imports from its own package and from levels below."""
BELOW = {name: {*sum(LEVELS[:level], ())} for level, names in enumerate(LEVELS) for name in names}


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    here = package(path)
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "cnext" or len(parts) == 1:
            continue
        there = parts[1]
        if there == here:
            continue
        if here in SIBLINGS and there in SIBLINGS:
            assert parts[2:3] == ["base"], f"{here} imports {name}: the four share their base types only"
            continue
        assert there in BELOW[here], f"{here} imports {name}, which is not below it"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports within functions and for type checkers count."""
    names = {".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {}
    for name, path in names.items():
        # "from cnext.tasks import formats" is an import of the module formats.
        imported = imports(ast.parse(path.read_text()))
        graph[name] = {each if each in names else each.rpartition(".")[0] for each in imported} & names.keys() - {name}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_top_imports_nothing_heavy(path: Path) -> None:
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    light = LIGHT | {"kernels": {"triton"}, "integrations": {path.stem}}.get(package(path), set())
    for name in imports(ast.Module(body=top, type_ignores=[])):
        top_level = name.split(".")[0]
        assert top_level in light or top_level in sys.stdlib_module_names, f"{top_level} at module top"


@pytest.mark.parametrize(
    "code",
    ["import cnext", "import cnext.cli", "from cnext.cli import main; main(['list'])", "import cnext.scoring.matrix"],
    ids=["package", "cli", "list", "scoring"],
)
def test_loads_without_torch(code: str) -> None:
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'transformers', 'open_clip', 'PIL'}"
    check = f"import sys; {code}; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parent, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("package_name", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_every_package_says_what_it_holds_and_what_not(package_name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / package_name / "__init__.py").read_text())) or ""
    assert len([part for part in re.split(r"(?<=[.])\s", text) if part]) >= 2, f"{package_name}: two sentences"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_json_is_read_by_parse_json(path: Path) -> None:
    """It refuses a key that an object has twice, of which others keep the last."""
    if path == ROOT / "errors.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load", "msgspec.json.decode"):
            assert ast.unparse(node.args[0]).startswith("json.dumps("), f"line {node.lineno}: use errors.parse_json"


def test_type_checkers_are_told_that_it_has_types() -> None:
    assert (ROOT / "py.typed").is_file()


def test_public_names_resolve() -> None:
    assert {name for name in cnext.__all__ if getattr(cnext, name)} == set(cnext.__all__)
