"""Continual-learning methods, one module each: ``zero_shot.py`` defines the method ``zero-shot``.

A package elsewhere adds one by an entry point of the group ``cnext.methods``: ``name = "module"``. `base` has the
interface, `parts` what methods are composed of. Training itself is not here.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any, get_type_hints

from cnext.errors import UserError, unknown
from cnext.registry import imported, registered, spec_of

GROUP = "cnext.methods"
PAPER_NAMES = {"4-split": "ew-ga", "2-split": "two-split", "joint": "upper-bound"}
"""What the literature calls a method, where that is another word: suggested for an unknown name."""


def modules() -> dict[str, str]:
    """Method names to the modules that define them, which are not imported."""
    own = {
        path.stem.replace("_", "-"): f"{__name__}.{path.stem}"
        for path in sorted(Path(__file__).parent.glob("*.py"))
        if path.stem not in ("__init__", "base")
    }
    return own | {name: place.partition(":")[0] for name, place in registered("method", GROUP, own).items()}


def summary(name: str) -> str:
    """The first line of a method's docstring, read without importing it (importing torch takes a second)."""
    try:
        text = ast.get_docstring(_source(modules()[name])) or ""
    except ValueError:
        return f"registered by a package, but there is no module {modules()[name]}"
    return " ".join(text.partition("\n\n")[0].split()).partition(": ")[2]


def load(name: str) -> type:
    """The class of a method. Raises UserError with the valid names, or why it cannot be imported."""
    from cnext.methods.base import Method

    known = modules()
    if name not in known:
        near = [PAPER_NAMES.get(name.lower()), *difflib.get_close_matches(name.lower(), known, 1)]
        hint = next((f"; perhaps you meant {other}" for other in near if other), "")
        raise UserError(f"{unknown('method', name, sorted(known))}{hint}")
    try:
        module = imported(known[name])
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"the method {name} cannot be imported from {known[name]}: {error}; install the package again"
        ) from error
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise UserError(f"module {module.__name__} must define one subclass of Method, it defines {len(classes)}")
    kind = classes[0]
    if not dataclasses.is_dataclass(kind) or inspect.isabstract(kind) or not hasattr(kind, "card"):
        raise UserError(f"the method {name} must be a dataclass with a card, attach and trainable; complete its class")
    return kind


def declared(name: str) -> type:
    """A dataclass with a method's hyperparameters, whose fields' metadata have their descriptions as "help".

    A field ``lr: Annotated[float, "Learning rate."] = 0.1`` is read from the source, without importing torch, and so is
    another default of a base class's field, ``lr: float = 0.2``, which keeps its description. The method is imported if
    one of its fields has another form; a field without Annotated has the description "".

    Raises: UserError as `load`.
    """
    try:
        title, text, fields = _read(modules().get(name, ""))
    except ValueError:
        kind = load(name)
        title, text = kind.__name__, kind.__doc__
        fields = [_field(_hint(kind, f.name), f) for f in dataclasses.fields(kind) if f.init]
    return dataclasses.make_dataclass(title, fields, namespace={"__doc__": text})


def _hint(kind: type, name: str) -> Any:
    """The annotation of a field, from the nearest class that describes it; else its own."""
    hints = [get_type_hints(base, include_extras=True).get(name) for base in kind.__mro__[:-1]]
    return next((hint for hint in hints if hasattr(hint, "__metadata__")), hints[0])


def _field(hint: Any, declared: dataclasses.Field) -> tuple[str, Any, Any]:
    """A field as `dataclasses.make_dataclass` takes it, with its Annotated description in the metadata."""
    text = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, str)), "")
    kind = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
    defaults = {"default": declared.default, "default_factory": declared.default_factory}
    return declared.name, kind, dataclasses.field(metadata={"help": text}, **defaults)


_TYPES: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}


def _read(module: str) -> tuple[str, str | None, list[tuple[str, Any, Any]]]:
    """Name, docstring and fields of the one dataclass that a module defines. Raises ValueError: it must be imported."""
    [node] = [node for node in _source(module).body if isinstance(node, ast.ClassDef) and node.decorator_list]
    return node.name, ast.get_docstring(node), list(_fields(module, node.name).values())


def _fields(module: str, name: str) -> dict[str, tuple[str, Any, Any]]:
    """The dataclass fields of a class and its bases, as `_field` returns them. Raises ValueError: see `_read`."""
    if module == f"{__name__}.base":  # Method has none
        return {}
    body = _source(module).body
    places = {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in body
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
    }
    [node] = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    found: dict[str, tuple[str, Any, Any]] = {}
    for base in reversed(node.bases):
        found |= _fields(*places.get(ast.unparse(base), (module, ast.unparse(base))))
    if not node.decorator_list:
        return found
    for statement in node.body:
        match statement:
            case ast.AnnAssign(
                ast.Name(label),
                ast.Subscript(ast.Name("Annotated"), ast.Tuple([ast.Name(kind), ast.Constant(str(text))])),
                ast.expr() as default,
            ) if kind in _TYPES:
                value = dataclasses.field(default=ast.literal_eval(default), metadata={"help": text})
                found[label] = (label, _TYPES[kind], value)
            case ast.AnnAssign(ast.Name(label), ast.Name(kind), ast.expr() as default) if (
                label in found and kind in _TYPES
            ):
                value = dataclasses.field(default=ast.literal_eval(default), metadata=found[label][2].metadata)
                found[label] = (label, _TYPES[kind], value)
            case ast.AnnAssign(annotation=ast.Subscript(ast.Name("ClassVar"))):
                pass
            case ast.AnnAssign():
                raise ValueError(f"{ast.unparse(statement)} of {module} is read by importing it")
    return found


def _source(module: str) -> ast.Module:
    """The syntax tree of a module that is not imported. Raises ValueError where there is no source of it."""
    try:
        spec = spec_of(module)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"no source of module {module!r}")
    try:
        return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(f"module {module!r} has a syntax error") from error


def describe(name: str, extra_bytes: str) -> str:
    """A method's card as text: its docstring, what it needs and keeps, and its hyperparameters with their defaults.

    extra_bytes: how many bytes it keeps, and where, for they depend on a backbone.
    """
    kind = load(name)
    method = kind()
    card = method.card
    rehearsal = f"{card.rehearsal} training samples of every task are kept" if card.rehearsal else "none"
    rows = {
        "paper": card.paper,
        "rehearsal": "every training sample of every task is there at once" if method.joint else rehearsal,
        "task id at test": "needed" if card.task_id_at_test else "not needed",
        "keeps between tasks": card.keeps,
        "extra bytes": extra_bytes,
        "learns": "all tasks at once, as a reference" if method.joint else "one task after another",
    }
    lines = [inspect.getdoc(importlib.import_module(kind.__module__)) or "", ""]
    lines += [f"{label:<19} {value}" for label, value in rows.items()]
    for field in dataclasses.fields(declared(name)):
        lines.append(f"--{name}.{field.name.replace('_', '-')} (default {getattr(method, field.name)})")
        lines.append(f"    {field.metadata['help']}")
    return "\n".join(lines)
