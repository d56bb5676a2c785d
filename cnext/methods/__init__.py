"""Methods, one file each. The file is the registration: ``zero_shot.py`` holds the method ``zero-shot``.

A package elsewhere adds one by an entry point of the group ``cnext.methods``: ``name = "module"``.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from pathlib import Path

from cnext.errors import UserError, unknown

GROUP = "cnext.methods"
ALIASES = {"ew+ga": "ew-ga", "4-split": "ew-ga", "2-split": "two-split", "joint": "upper-bound"}
"""Names that the paper writes, to names of methods."""


def modules() -> dict[str, str]:
    """Method names and the modules that hold them. Imports none of them."""
    own = {
        path.stem.replace("_", "-"): f"{__name__}.{path.stem}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem not in ("__init__", "base")
    }
    return own | {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}


def canonical(name: str) -> str:
    """The name of a method that goes by this one too: an alias, or another case. A name not known is left as it is."""
    known = modules()
    for other in (name, ALIASES.get(name.lower(), name.lower())):
        if other in known:
            return other
    return name


def summary(name: str) -> str:
    """The first line of a method's docstring, read without importing it (torch would take a second)."""
    spec = importlib.util.find_spec(modules()[name])
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(": ")[2]


def load(name: str) -> type:
    """The class of a method, by its name or another that it goes by. Raises UserError with the valid names."""
    from cnext.methods.base import Method

    known, found = modules(), canonical(name)
    if found not in known:
        raise unknown("method", name, sorted(known))
    module = importlib.import_module(known[found])
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(f"module {module.__name__} must define one subclass of Method, it defines {len(classes)}")
    return classes[0]
