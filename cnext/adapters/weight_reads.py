"""Layers whose weight a module computes with by itself, without calling the layer: branches would be left out.

Such reads are found in the source of a module's forward where they are sure to happen. Others meet `ReadOnlyWeight`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from cnext.errors import UserError

ABOUT = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "layout", "is_cuda", "requires_grad"} | {
    *("grad", "nelement", "element_size", "itemsize", "nbytes", "get_device", "__len__", "is_cpu", "is_meta"),
    *("is_sparse", "is_quantized", "is_floating_point", "is_complex", "is_leaf"),
}
"""Attributes of a weight that say nothing of its values."""
ITSELF = ("data", "detach")
"""What gives a `ReadOnlyWeight` again."""


def read_only(weight: Tensor) -> ReadOnlyWeight:
    """A weight, dense or quantized, to be asked about and not to be computed with. It is an nn.Parameter to isinstance.

    A quantized weight's is of the dtype and shape of what is stored, which bitsandbytes packs.
    """
    if type(weight) not in (Tensor, nn.Parameter):  # other subclasses have no view as a ReadOnlyWeight
        weight = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    found = weight.detach().as_subclass(ReadOnlyWeight)
    found._is_param = True
    return found


class ReadOnlyWeight(Tensor):
    """A weight that tells its dtype, device and shape, and refuses to be computed with.

    Raises:
        UserError: by any other use, such as ``x @ weight``.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The getter of an attribute is a method "__get__" of it.
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name in ITSELF:
            return args[0]
        if name not in ABOUT and name != "__repr__":
            raise UserError(
                f"the weight of a layer that has branches is read ({name}), which leaves the branches out; do not "
                "attach them to this layer, or merge them first, or read its base.weight if they are to be left out"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def weight_readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Layers to a module whose forward, or a method with "forward" in its name, reads their weight's values.

    Found are reads such as ``self.proj.weight @ x``; not found are those in other functions, and those that a setting
    of the module turns on, as in ``if self.slow_but_exact:``.
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
    for node in _without_settings(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless:
            path, place = [], node.value
            while isinstance(place, ast.Attribute):
                path.append(place.attr)
                place = place.value
            if path and isinstance(place, ast.Name) and place.id == "self":
                yield tuple(reversed(path))


def _without_settings(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, without what follows an ``if`` of nothing but the module's own attributes."""
    yield node
    optional = node.body if isinstance(node, ast.If) and _is_setting(node.test) else []
    for child in ast.iter_child_nodes(node):
        if child not in optional:
            yield from _without_settings(child)


def _is_setting(test: ast.expr) -> bool:
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    attributes = {node.attr for node in ast.walk(test) if isinstance(node, ast.Attribute)}
    return names == {"self"} and "training" not in attributes
