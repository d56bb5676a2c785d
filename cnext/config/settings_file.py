"""Settings in a YAML file: those of a run or a study, by the names of the flags, and hyperparameters by method.

    method: [mage, lora]
    learning_rate: 1e-3
    mage:
      pull: 0.02

Each value is read by the type that is declared for its name, so that ``1e-3`` is a number, and ``on`` a text where a
text is expected. Which names there are is not said here.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from cnext import methods
from cnext.errors import UserError, listed
from cnext.regular_files import read_bytes

if TYPE_CHECKING:
    from yaml import Node

LONGEST = 1_000_000
"""Bytes of the largest file that is read."""
_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,999})")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TRUTHS = {text: value for value in (True, False) for text in (str(value).lower(), str(value), str(value).upper())}
_NULLS = ("", "~", "null", "Null", "NULL")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class Problem:
    """What is wrong in a file, and where."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass
class Settings:
    """What a file says.

    Attributes:
        values: by name, with the declared types.
        hyperparameters: by method and name.
        lines: the line of every name, and of every hyperparameter as "mage.pull".
        problems: what could not be read, and is left out.
    """

    path: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def check(self) -> None:
        """Raises UserError with the first problem, if there is any."""
        if self.problems:
            first, *more = sorted(self.problems, key=lambda problem: problem.line)
            others = f" (and {len(more)} more; cnext validate {self.path} shows all)" if more else ""
            raise UserError(f"{first}{others}")

    def given(self, method: str, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters of a method that differ from their defaults: a method may have no use for some of these.

        preset: defaults in place of the method's.
        """
        own = self.hyperparameters.get(method)
        if not own:
            return {}
        defaults = {item.name: item.default for item in dataclasses.fields(methods.declared(method))} | {**preset}
        return {name: value for name, value in own.items() if value != defaults[name]}


def read(path: str | Path, kinds: Mapping[str, Any]) -> Settings:
    """The settings in a file.

    Args:
        kinds: names to types, as `typing.get_type_hints` returns them. Further names are those of methods.

    Raises:
        UserError: there is no such file, or it is not YAML. Everything else is in `Settings.problems`.
    """
    import yaml

    try:
        content = _read_pipe(path) if _is_open_pipe(path) else read_bytes(path)
        if len(content) > LONGEST:
            raise UserError(f"{path}: expected a small YAML file of settings, it has {len(content):,} bytes")
        root = yaml.compose(content.decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: expected a YAML file of settings, could not read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected YAML in UTF-8: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: it is nested too deeply for settings") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        why = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {why}") from error
    reader = _Reader(Settings(str(path)), kinds)
    if root is not None:
        reader.all(root)
    return reader.settings


def _is_open_pipe(path: str | Path) -> bool:
    """Whether a shell has opened it for this process, as of ``--config <(...)`` and ``/dev/stdin``: it has a writer."""
    return str(path).startswith(("/dev/fd/", "/dev/stdin", "/proc/self/fd/")) and stat.S_ISFIFO(os.stat(path).st_mode)


def _read_pipe(path: str | Path) -> bytes:
    with open(path, "rb") as pipe:
        return pipe.read(LONGEST + 1)


class _Wrong(Exception):
    """What was expected, and what came."""


class _Reader:
    """Fills `Settings` from the nodes of a file."""

    def __init__(self, settings: Settings, kinds: Mapping[str, Any]) -> None:
        self.settings, self.kinds, self.methods = settings, kinds, methods.modules()

    def wrong(self, node: Node, text: str) -> None:
        self.settings.problems.append(Problem(self.settings.path, node.start_mark.line + 1, text))

    def all(self, root: Node) -> None:
        for name, key, node in self.pairs(root, ""):
            self.settings.lines[name] = key.start_mark.line + 1
            if name in self.kinds:
                self.put(self.settings.values, name, self.kinds[name], node)
            elif name in self.methods:
                self.method(name, node)
            else:
                self.wrong(key, self.unknown(name, node))

    def pairs(self, node: Node, prefix: str) -> list[tuple[str, Node, Node]]:
        """Names, their nodes and those of their values."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            what = f"{prefix.rstrip('.')}: expected" if prefix else "expected"
            self.wrong(node, f"{what} names and values, as in `name: value`, got {_shown(node)}")
            return []
        found: dict[str, tuple[str, Node, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(key, f"expected a name before the colon, got {_shown(key)}")
            elif key.value in found:
                before = found[key.value][1].start_mark.line + 1
                self.wrong(key, f"{prefix}{key.value} is there twice, first in line {before}; remove one")
            else:
                found[key.value] = (key.value, key, value)
        return list(found.values())

    def method(self, name: str, node: Node) -> None:
        own = self.settings.hyperparameters.setdefault(name, {})
        try:
            kinds = {item.name: item.type for item in dataclasses.fields(methods.declared(name))}
        except UserError as error:
            self.wrong(node, str(error))
            return
        for label, key, value in self.pairs(node, f"{name}."):
            self.settings.lines[f"{name}.{label}"] = key.start_mark.line + 1
            if label in kinds:
                self.put(own, label, kinds[label], value, f"{name}.")
            else:
                self.wrong(key, f"unknown hyperparameter {name}.{label}{near(label, kinds, f'{name}.')}")

    def unknown(self, name: str, node: Node) -> str:
        import yaml

        method, dot, label = name.partition(".")
        if dot and method in self.methods:
            return f"expected a hyperparameter below its method, got {name}; write {method}: {{{label}: ...}}"
        if isinstance(node, yaml.MappingNode):
            return f"unknown method {name}{near(name, [*self.methods, *self.kinds])}"
        return f"unknown name {name}{near(name, [*self.kinds, *self.methods])}"

    def put(self, into: dict[str, Any], name: str, kind: Any, node: Node, prefix: str = "") -> None:
        try:
            into[name] = _value(node, kind)
        except _Wrong as error:
            self.wrong(node, f"{prefix}{name}: {error}")


def near(name: str, valid: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    """The nearest valid name for a message, or else the first of them."""
    found = difflib.get_close_matches(name.replace("-", "_"), valid, 1) or difflib.get_close_matches(name, valid, 1)
    if found:
        return f"; perhaps you meant {prefix}{found[0]}"
    return f"; valid: {listed(valid, 40)}" if valid else ", which has none"


def _value(node: Node, kind: Any) -> Any:
    """The value of a node as a declared type. Raises _Wrong."""
    import yaml

    if not node.tag.startswith(_TAG) or node.tag.removeprefix(_TAG) not in (
        "str int float bool null timestamp seq map merge".split()
    ):
        raise _Wrong(f"YAML's tags are not read, got {node.tag.replace(_TAG, '!!')}; write the plain value")
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [each for each in args if each is not type(None)]
        if len(inner) < len(args) and _is_null(node):
            return None
        return _value(node, inner[0])
    if origin in (list, tuple):
        several = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return origin(_value(each, args[0]) for each in several)
    if not isinstance(node, yaml.ScalarNode) or _is_null(node):
        raise _Wrong(f"expected {_expected(kind)}, got {_shown(node)}")
    plain = node.style is None
    if origin is Literal:
        if node.value in args:
            return node.value
    elif kind in (str, Path):
        return kind(node.value)
    elif kind is bool and plain and node.value in _TRUTHS:
        return _TRUTHS[node.value]
    elif kind is int and plain and _WHOLE.fullmatch(node.value):
        return int(node.value)
    elif kind is float and plain and _NUMBER.fullmatch(node.value):
        return float(re.sub(r"\.(?=[a-z])", "", node.value.lower()))
    elif kind not in _WORDS:
        raise _Wrong(f"values of type {getattr(kind, '__name__', kind)} cannot be given in a file; use the flag")
    raise _Wrong(f"expected {_expected(kind)}, got {_shown(node)}")


def _is_null(node: Node) -> bool:
    return node.tag == f"{_TAG}null" and node.value in _NULLS


def _expected(kind: Any) -> str:
    return f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else _WORDS.get(kind, "a value")


def _shown(node: Node) -> str:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return "names and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is_null(node):
        return "nothing"
    text = str(node.value) if len(node.value) <= 60 else f"{node.value[:60]}..."
    plain = not isinstance(node, yaml.ScalarNode) or node.style is None
    return repr(text) if plain else f"the text {text!r} in quotes"


def text(values: Mapping[str, Any], hyperparameters: Mapping[str, Mapping[str, Any]], comment: str) -> str:
    """A file that `read` reads, with a comment before it."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"{name}: {_dumped(value)}" for name, value in values.items()]
    for method, own in hyperparameters.items():
        lines += [f"{method}:", *(f"  {name}: {_dumped(value)}" for name, value in own.items())] if own else []
    return "\n".join(lines) + "\n"


def _dumped(value: Any) -> str:
    """A value in one line, as it may stand in a list."""
    import yaml

    plain = [str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value]
    style = None if str(value).isprintable() else '"'
    shown = yaml.safe_dump(plain, default_flow_style=True, default_style=style, allow_unicode=True, width=10**9)
    return shown.strip()[1:-1]
