"""Registries: objects by name, those that come with cnext and those that other packages add by entry points."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cnext.errors import UserError, unknown


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
        """Names to "module:attribute". Imports none of them.

        Raises:
            UserError: another package uses a name of cnext's.
        """
        others = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=self.group)}
        if taken := sorted(self.own.keys() & others.keys()):
            raise UserError(
                f"a package registers a {self.kind} as {', '.join(taken)}, which cnext has; it needs another name"
            )
        return {**self.own, **others}

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
        module, _, attribute = places[name].partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"the {self.kind} {name} cannot be imported from {places[name]}, expected module:attribute: {error}; "
                "install its package again"
            ) from error
        return self.finish(found)

    def summary(self, name: str) -> str:
        """The first line of an object's docstring, read from the source without importing it; "" if there is none."""
        module, _, attribute = self.places()[name].partition(":")
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        source = spec.loader.get_source(module) if spec and hasattr(spec.loader, "get_source") else None  # pyright: ignore
        for node in ast.parse(source or "").body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
        return ""
