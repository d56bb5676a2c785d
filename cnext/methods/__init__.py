"""Methods, one file each. The file is the registration: ``zero_shot.py`` holds the method ``zero-shot``.

A package elsewhere adds one by an entry point of the group ``cnext.methods``: ``name = "module"``.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

from cnext.errors import UserError, unknown

GROUP = "cnext.methods"
ALIASES = {"ew+ga": "ew-ga", "4-split": "ew-ga", "2-split": "two-split", "joint": "upper-bound"}
"""Names that the paper writes, to names of methods."""


def modules() -> dict[str, str]:
    """Method names and the modules that hold them. Imports none of them.

    Raises UserError where another package's method has the name of one of ours.
    """
    own = {
        path.stem.replace("_", "-"): f"{__name__}.{path.stem}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem not in ("__init__", "base")
    }
    others = {entry.name: entry.value.partition(":")[0] for entry in importlib.metadata.entry_points(group=GROUP)}
    if taken := sorted(own.keys() & others.keys()):
        raise UserError(f"a package registers a method as {', '.join(taken)}, which cnext has; it needs another name")
    return own | others


def canonical(name: str) -> str:
    """The name of a method that goes by this one too: an alias, or another case. A name not known is left as it is."""
    known = modules()
    for other in (name, ALIASES.get(name.lower(), name.lower())):
        if other in known:
            return other
    return name


def summary(name: str) -> str:
    """The first line of a method's docstring, read without importing it (torch would take a second)."""
    try:
        text = ast.get_docstring(_source(modules()[name])) or ""
    except _Unclear:
        return f"registered by a package, but there is no module {modules()[name]}"
    return " ".join(text.partition("\n\n")[0].split()).partition(": ")[2]


def load(name: str) -> type:
    """The class of a method, by its name or another that it goes by. Raises UserError with the valid names."""
    from cnext.methods.base import Method

    known, found = modules(), canonical(name)
    if found not in known:
        raise unknown("method", name, sorted(known))
    try:
        module = importlib.import_module(known[found])
    except ImportError as error:
        raise UserError(
            f"the method {found} cannot be imported from {known[found]}: {error}; install the package again"
        ) from error
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(f"module {module.__name__} must define one subclass of Method, it defines {len(classes)}")
    return classes[0]


def described_fields(kind: type) -> dict[str, str]:
    """A method's hyperparameters and what the string under each says it means, its base classes' included."""
    found: dict[str, str] = {}
    for one in [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]:
        (node,) = [node for node in ast.parse(inspect.getsource(one)).body if isinstance(node, ast.ClassDef)]
        found |= {ast.unparse(field.target): text for field, text in _annotated(node)}
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(kind) if field.init}


def _annotated(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, str]]:
    """The annotated names of a class, each with the string under it or ""."""
    found = []
    for first, second in itertools.pairwise([*node.body, ast.Pass()]):
        if isinstance(first, ast.AnnAssign):
            said = second.value if isinstance(second, ast.Expr) else None
            text = str(said.value) if isinstance(said, ast.Constant) else ""
            found.append((first, " ".join(text.split())))
    return found


class _Unclear(Exception):
    """The source alone does not say what a class's fields are."""


def declared(name: str) -> type:
    """A dataclass with the fields, defaults and docstring of a method, and nothing else of it.

    Made from the method's source without importing it, as torch would take a second; each field's metadata has what it
    means as "help". The method's class itself, where a field's type or default is more than a plain literal.

    Raises: UserError with the valid names.
    """
    module = modules().get(canonical(name))
    if module is not None:
        with contextlib.suppress(_Unclear):
            nodes = [node for node in _source(module).body if isinstance(node, ast.ClassDef) and node.decorator_list]
            outlines = [_outline(module, node.name) for node in nodes]
            methods = [one for one in outlines if ("cnext.methods.base", "Method") in map(_place, one.__mro__)]
            if len(methods) == 1:
                return methods[0]
    return load(name)


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__name__


def _source(module: str) -> ast.Module:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package around it
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise _Unclear
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _outline(module: str, name: str) -> type:
    """A class of a module, or one that it imports, with its bases, fields and docstring."""
    if module.partition(".")[0] in sys.stdlib_module_names:  # no class of these has fields
        return type(name, (), {})
    for node in _source(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _outline(node.module, alias.name)
        if isinstance(node, ast.ClassDef) and node.name == name:
            break
    else:
        raise _Unclear
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if len(bases) < len(node.bases):
        raise _Unclear
    body: dict[str, Any] = {"__module__": module, "__doc__": ast.get_docstring(node), "__annotations__": {}}
    decorators = [ast.unparse(one) for one in node.decorator_list]
    if decorators not in ([], ["dataclass"]):
        raise _Unclear
    for field, text in _annotated(node) if decorators else ():
        kind = ast.unparse(field.annotation)
        if kind.startswith("ClassVar"):
            continue
        if kind not in _TYPES or field.value is None:
            raise _Unclear
        label = ast.unparse(field.target)
        body["__annotations__"][label] = _TYPES[kind]
        try:
            body[label] = dataclasses.field(default=ast.literal_eval(field.value), metadata={"help": text})
        except ValueError as error:
            raise _Unclear from error
    kind = type(name, tuple(_outline(module, base) for base in bases), body)
    return dataclasses.dataclass(kind) if decorators else kind


_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def describe(name: str, extra_bytes: str) -> str:
    """A method's card as text: its docstring, what it needs and keeps, and its hyperparameters with their defaults.

    extra_bytes: how many bytes it keeps, and where, for they depend on a backbone.
    """
    kind = load(name)
    method, canon = kind(), canonical(name)
    card = method.card
    lines = [inspect.getdoc(importlib.import_module(kind.__module__)) or "", ""]
    lines.append(f"paper               {card.paper}")
    rehearsal = f"{card.rehearsal} training samples of every task are kept" if card.rehearsal else "none"
    rehearsal = "every training sample of every task is there at once" if method.joint else rehearsal
    lines.append(f"rehearsal           {rehearsal}")
    lines.append(f"task id at test     {'needed' if card.task_id_at_test else 'not needed'}")
    lines.append(f"keeps between tasks {card.keeps}")
    lines.append(f"extra bytes         {extra_bytes}")
    lines.append(
        "learns              " + ("all tasks at once, as a reference" if method.joint else "one task after another")
    )
    for field, text in described_fields(kind).items():
        lines.append(f"--{canon}.{field.replace('_', '-')} (default {getattr(method, field)})\n    {text}")
    return "\n".join(lines)
