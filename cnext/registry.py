"""Registries: objects by name, those that come with cnext and those that other packages add by entry points."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Container, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from cnext.errors import UserError, printable, unknown


class Registry:
    """Objects by name, imported when they are used.

    Another package adds one in its pyproject.toml, by an entry point of the registry's group:

        [project.entry-points."cnext.scorers"]
        rouge = "my_package.scoring:rouge"

    Args:
        kind: what is registered, in messages: "scorer".
        group: the group of entry points: "cnext.scorers".
        own: names to "module:attribute", of what comes with cnext.
        finish: called with what was imported; gives the object.

    Example:
        >>> scorers["rouge"], "rouge" in scorers, list(scorers)
    """

    def __init__(
        self, kind: str, group: str, own: Mapping[str, str], finish: Callable[[Any], Any] = lambda found: found
    ) -> None:
        self.kind, self.group, self.own, self.finish = kind, group, own, finish

    def places(self) -> dict[str, str]:
        """Names to "module:attribute". Imports none of them."""
        return {**self.own, **registered(self.kind, self.group, self.own)}

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.places()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places())

    def __getitem__(self, name: str) -> Any:
        """The object of that name.

        Raises:
            UserError: an unknown name, with the valid ones, or a package that cannot be imported.
        """
        # Installed packages are searched only for other names: it takes milliseconds.
        places = self.own if name in self.own else self.places()
        if name not in places:
            raise unknown(self.kind, name, sorted(places))
        return self._imported(name, places[name], "")

    def named(self, name: str, folder: str, what: str) -> Any:
        """The object that a suite's manifest names: as registered, or as "module:attribute".

        Args:
            folder: the suite's, see `module_of`.
            what: what is named, in messages: "scorer of task Photos".

        Raises:
            UserError: as ``[]``, and for a module that is neither in the folder nor installed.
        """
        if ":" in name:
            module, _, function = name.partition(":")
            suffixed = module.endswith(".py") and source_of(module, folder) is None
            if suffixed or not all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
                shown = f"{module.removesuffix('.py')}:{function}" if suffixed else "module:function"
                raise UserError(f'the {what} {name} cannot be imported from {name}, expected "{shown}"')
            return self._imported(f"{what} {name}".removeprefix(f"{self.kind} "), name, folder)
        if name not in self:
            raise unknown(what, name, [*self, "or module:function"])
        return self[name]

    def digest(self, name: str, folder: str) -> str:
        """SHA-256 of the source file of an object as `named` takes it; "" for one of cnext's, or without a file."""
        place = name if ":" in name else "" if name in self.own else self.places().get(name, "")
        file = place and source_of(place.partition(":")[0], folder)
        return hashlib.sha256(file.read_bytes()).hexdigest() if file else ""

    def _imported(self, name: str, place: str, folder: str) -> Any:
        module, _, attribute = place.partition(":")
        expected = f"the {self.kind} {name} cannot be imported from {place}, expected module:attribute"
        try:
            found: Any = module_of(module, folder)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, SyntaxError) as error:
            beside = f" {module}.py is expected beside suite.json in {folder}, or installed;" if folder else ""
            advice = f"{beside} correct it" if folder else "install its package again"
            raise UserError(f"{expected}: {error};{' ' * (not folder)}{advice}") from error
        try:
            return self.finish(found)
        except (TypeError, UserError) as error:
            raise UserError(f"{place} is no {self.kind} to use as {name}: {error}; correct its package") from error

    def summary(self, name: str) -> str:
        """The first line of an object's docstring, read from the source without importing it; "" if there is none."""
        module, _, attribute = self.places()[name].partition(":")
        try:
            spec = spec_of(module)
            source = spec.loader.get_source(module) if spec and hasattr(spec.loader, "get_source") else None  # pyright: ignore
            nodes = ast.parse(source or "").body
        except (ImportError, SyntaxError, ValueError) as error:
            return f"registered by a package, but {module} cannot be read: {_reason(error)}"
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
        return ""


def registered(kind: str, group: str, own: Container[str]) -> dict[str, str]:
    """Names to places of what other packages register by entry points.

    One whose name is taken, by cnext or by another package, is left out, and a note says so: others work on.
    """
    found: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=group):
        if entry.name in own or found.setdefault(entry.name, entry.value) != entry.value:
            has = "cnext" if entry.name in own else found[entry.name]
            _note(f"note: the {kind} {entry.name} of {entry.value} is left out: {has} has that name")
    return found


@functools.cache
def _note(text: str) -> None:
    """Prints a line once."""
    print(text, file=sys.stderr)


def imported(module: str) -> ModuleType:
    """A module by its name. Raises ImportError for whatever one of another package raises."""
    if module.startswith("cnext."):
        return importlib.import_module(module)
    try:
        return importlib.import_module(module)
    except (ImportError, SyntaxError, UserError):
        raise
    except (Exception, SystemExit) as error:
        raise ImportError(f"{module} raises {_reason(error)}") from error


def spec_of(module: str) -> ModuleSpec | None:
    """Where a module is, None if there is none. Raises ImportError for whatever the package around it raises."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    except (Exception, SystemExit) as error:
        raise ImportError(f"{module}: the package around it raises {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")[:200]


def source_of(module: str, folder: str) -> Path | None:
    """The file of a module as `module_of` finds it; None if there is none. A package around it is imported."""
    parts = module.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    beside = Path(folder, *parts[:-1], f"{parts[-1]}.py")
    if folder and beside.is_file():
        return beside
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def module_of(module: str, folder: str) -> ModuleType:
    """A module by its name: a file in a folder, or one that Python finds, as of an installed package.

    The file is executed once, and again after a change, under a name of its own: two suites may each have a
    ``scoring.py``. It imports installed packages, but no other file of the folder: its source is all of the code.

    Args:
        folder: looked into first; "": not.

    Raises:
        ImportError: there is no such module.
        UserError: the file raises an error.
    """
    file = source_of(module, folder) if folder else None
    if not all(part.isidentifier() for part in module.split(".")):
        raise ImportError(f"{module!r} is no name of a module")
    if file is None or not file.is_relative_to(folder):
        return imported(module)
    content = file.read_bytes()
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode() + content).hexdigest()[:16]}"
    if name not in sys.modules:
        made = sys.modules[name] = ModuleType(name)  # where dataclasses look for it
        made.__file__ = str(file)
        try:
            exec(compile(content, str(file), "exec"), made.__dict__)
        except (ImportError, SyntaxError):
            del sys.modules[name]
            raise
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise UserError(f"{file} raises {type(error).__name__}: {error}; correct it") from error
    return sys.modules[name]
