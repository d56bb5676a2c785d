"""Which layers' weights a module's forward computes with by itself, found in its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType

from torch import nn

ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "layout", "is_cuda", "requires_grad"}
"""Attributes of a weight that say nothing of its values."""


def weight_readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Layers to a module whose forward, or a method with "forward" in its name, reads their weight's values.

    Found are reads such as ``self.proj.weight @ x``; not found are those in other functions.
    """
    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        for path in _paths(type(module)):
            layer: object = module
            for name in path:
                layer = getattr(layer, name, None)
            if isinstance(layer, nn.Module):
                found.setdefault(layer, module)
    return found


@cache
def _paths(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """("proj",) for ``self.proj.weight``."""
    if kind.__module__.startswith("torch."):
        return frozenset()
    methods = [inspect.getattr_static(kind, name) for name in dir(kind) if "forward" in name]
    return frozenset(path for method in methods if isinstance(method, FunctionType) for path in _reads(method))


def _reads(method: FunctionType) -> Iterator[tuple[str, ...]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, SyntaxError):
        return  # no source to read
    harmless = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ABOUT:
            harmless.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "id"):
            harmless.update(node.args)
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            harmless.update((node.left, *node.comparators))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless:
            path, place = [], node.value
            while isinstance(place, ast.Attribute):
                path.append(place.attr)
                place = place.value
            if path and isinstance(place, ast.Name) and place.id == "self":
                yield tuple(reversed(path))
