"""The house keeps its floors: imports go downwards only, heavy libraries load where they are used."""

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
LIGHT = {"torch", "numpy", "cnext"}
SIBLINGS = ("methods", "backbones", "tasks", "scoring")
_UNDER = {"errors", "kv_cache", "ranks", "registry", "shapes", "tensor_files", "ops", "adapters", "averaging"}
BELOW = {
    "errors": set(),
    "kv_cache": {"errors"},
    "ranks": set(),
    "registry": {"errors"},
    "shapes": set(),
    "tensor_files": {"errors"},
    "ops": {"errors", "kernels"},
    "kernels": set(),
    "adapters": {"errors", "kv_cache", "ranks", "shapes", "ops"},
    "averaging": {"errors", "ops"},
    **dict.fromkeys(SIBLINGS, _UNDER),
    "running": {*_UNDER, *SIBLINGS},
    "cli": {"errors", "running", *SIBLINGS},
    "__main__": {"cli"},
}


def floor(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # "from cnext import ops" names the module "cnext.ops"
            found += (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "cnext" else [node.module]
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    here = floor(path)
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
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # "from cnext.tasks import formats" is an import of the module formats.
                paths = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {path if path in names else node.module for path in paths}
        graph[name] = (imported & names.keys()) - {name}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_top_imports_nothing_heavy(path: Path) -> None:
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    light = LIGHT | {"triton"} if floor(path) == "kernels" else LIGHT
    for name in imports(ast.Module(body=top, type_ignores=[])):
        package = name.split(".")[0]
        assert package in light or package in sys.stdlib_module_names, f"{package} at module top"


@pytest.mark.parametrize(
    "code",
    ["import cnext", "import cnext.cli", "from cnext.cli import main; main(['list'])"],
    ids=["package", "cli", "list"],
)
def test_loads_without_torch(code: str) -> None:
    heavy = "sys.modules.keys() & {'torch', 'numpy', 'transformers'}"
    check = f"import sys; {code}; assert not ({heavy}), {heavy}"
    subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parent, check=True, stdout=subprocess.DEVNULL)


def test_running_says_where_each_of_its_modules_is() -> None:
    folder = ROOT / "running"
    words = set(re.findall(r"\w+", (folder / "__init__.py").read_text()))
    modules = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert modules <= words, modules - words


def test_type_checkers_are_told_that_it_has_types() -> None:
    assert (ROOT / "py.typed").is_file()


def test_public_names_resolve() -> None:
    assert {name for name in cnext.__all__ if getattr(cnext, name)} == set(cnext.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda path: path.stem)
def test_a_method_is_at_most_80_lines(path: Path) -> None:
    if path.stem not in ("__init__", "base"):
        assert len(path.read_text().splitlines()) <= 80
