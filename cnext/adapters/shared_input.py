"""Computes adapter layers that read the same input, such as q, k and v, together, by rewriting their parent's forward.

This needs one pass over x for all down-projections and one chain for dX, instead of one per layer. `join` reads the
source of the parent's forward. Where one block calls several of the layers on one local variable, as in

    q = self.q_proj(x)
    k = self.k_proj(x)

a statement before the first of them calls `together`, and its results replace the calls. The parent's class is replaced
by a subclass with this forward, without state, so that threads and replicas do not interfere. A forward whose source is
not available, or does not show that all calls see the same values, is left unchanged: each layer is computed by itself.

Between the calls, the variable may only be used for its shape, dtype and device, and nothing may be written in place.
Not detected: an alias of the same memory that is modified by a function called between them.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import symtable
import tokenize
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn.modules import module as modules

from cnext import ops
from cnext.adapters.linear import AdapterLinear

Names = tuple[tuple[str, ...], ...]

_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_UNUSABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
_LAZY = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.GeneratorExp)
_CONDITIONAL = (*_LAZY, ast.IfExp, ast.BoolOp, ast.Compare, ast.ListComp, ast.SetComp, ast.DictComp)
_LEAVING = (ast.Return, ast.Break, ast.Continue)
_READS = {"shape", "dtype", "device", "ndim"}
_READING_CALLS = {"size", "dim"}


def together(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of several layers for x, by one call of `cnext.ops.lora_branches_grouped` where possible.

    That is possible if all are adapter layers without hooks, not merged and not routed, of dense weights, with the same
    active branches, ranks, scale and dropout. Otherwise each is called by itself.

    Args:
        layers: two or more.
        x: (..., in_features).

    Returns:
        One (..., out_features) per layer.

    Example:
        >>> q, k, v = together((attention.q_proj, attention.k_proj, attention.v_proj), x)
    """
    alike = _alike(layers)
    if alike is None:
        return tuple(layer(x) for layer in layers)
    for layer in alike:
        if layer.observer is not None:
            layer.observer(x)
    a = [[layer.branches[name].A for name in layer.active] for layer in alike]
    b = [[layer.branches[name].B for name in layer.active] for layer in alike]
    first = alike[0]
    return tuple(
        ops.lora_branches_grouped(
            x,
            [layer.dense_weight for layer in alike],
            [layer.base.bias for layer in alike],
            a,
            b,
            scale=first.scale,
            dropout=first.dropout if first.training else 0.0,
            independent=first.independent,
        )
    )


def _alike(layers: Sequence[nn.Module]) -> list[AdapterLinear] | None:
    """The layers, if one call can compute all of them, else None."""
    if modules._has_any_global_hook():
        return None
    found: list[AdapterLinear] = []
    for layer in layers:
        # A subclass, or a forward that another library has wrapped, may do more than the op.
        if type(layer) is not AdapterLinear or "forward" in layer.__dict__ or layer._compiled_call_impl is not None:
            return None
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return None
        if layer.merged or layer.router is not None or not layer.active or layer.dense_weight is None:
            return None
        found.append(layer)
    first = found[0]
    width, ranks = first.in_features, _ranks(first)
    for layer in found[1:]:
        if (
            layer.active != first.active
            or layer.scale != first.scale
            or layer.dropout != first.dropout
            or layer.independent != first.independent
            or layer.training != first.training
            or layer.in_features != width
            or _ranks(layer) != ranks
        ):
            return None
    return found


def _ranks(layer: AdapterLinear) -> list[int]:
    return [layer.branches[name].A.shape[0] for name in layer.active]


class _Joined(NamedTuple):
    """What a rewritten class was made from: its class, its layers' names, and the groups that are joined."""

    original: type[nn.Module]
    names: Names
    groups: Names


_classes: WeakValueDictionary[tuple[type, Names, tuple[str, ...], object], type[nn.Module]] = WeakValueDictionary()


def join(module: nn.Module, shared: Sequence[Sequence[str]]) -> None:
    """Lets a module compute its adapter layers together where its forward calls them on the same variable.

    Args:
        module: the parent of the layers; its class is replaced by a subclass of the same name.
        shared: groups of names of children that may be computed together.
    """
    part(module)
    children = dict(module.named_children())
    names = tuple(tuple(name for name in one if isinstance(children.get(name), AdapterLinear)) for one in shared)
    names = tuple(one for one in names if len(one) > 1)
    if names and "forward" not in vars(module):
        # A linear layer without adapters is known not to change its input either.
        plain = tuple(name for one in shared for name in one if isinstance(children.get(name), nn.Linear))
        module.__class__ = _joining(type(module), names, plain)


def part(module: nn.Module) -> None:
    """Undoes `join`."""
    found = vars(type(module)).get("_joined")
    if found is not None:
        module.__class__ = found.original


def joined(model: nn.Module) -> dict[str, Names]:
    """Which adapter layers of a model are computed together.

    Returns:
        Name of a module that computes some of its layers together, to their names, one tuple per joint call.

    Example:
        >>> joined(model)["layers.0.self_attn"]
        (('q_proj', 'k_proj', 'v_proj'),)
    """
    found = {name: getattr(type(module), "_joined", None) for name, module in model.named_modules()}
    return {name: one.groups for name, one in found.items() if isinstance(one, _Joined)}


def _joining(original: type[nn.Module], names: Names, plain: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose forward joins the calls of these layers; the class itself if there is nothing to join."""
    forward = inspect.getattr_static(original, "forward", None)
    if not isinstance(forward, FunctionType):
        return original
    key = (original, names, plain, forward)
    if (made := _classes.get(key)) is not None:
        return made
    rewritten = _rewritten(forward, names, plain)
    if rewritten is None:
        return original

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The subclass cannot be found by name, so the pickle contains the original and joins again.
        make, arguments, *rest = original.__reduce_ex__(self, protocol)
        arguments = tuple(original if one is made else one for one in arguments)
        return (_rebuilt, (original, names, plain, make, arguments), *rest)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "forward": rewritten[0],
        "__reduce_ex__": reduce,
        "_joined": _Joined(original, names, rewritten[1]),
    }
    try:
        made = type(original)(original.__name__, (original,), members)  # pyright: ignore[reportCallIssue]
    except TypeError:  # a class whose __init_subclass__ requires arguments
        return original
    _classes[key] = made
    return made


def _rebuilt(
    original: type[nn.Module], names: Names, plain: tuple[str, ...], make: Callable[..., nn.Module], arguments: tuple
) -> nn.Module:
    """Constructs an unpickled module, before its state is set."""
    module = make(*arguments)
    if type(module) is original:
        module.__class__ = _joining(original, names, plain)
    return module


def _rewritten(forward: object, names: Names, plain: tuple[str, ...]) -> tuple[Callable[..., Any], Names] | None:
    """A forward with joined calls, and the groups of names; None if nothing can be joined."""
    chain = _chain(forward)
    inner = chain[-1]
    if not all(isinstance(one, FunctionType) for one in chain) or not isinstance(inner, FunctionType):
        return None
    code = inner.__code__
    if code.co_freevars or code.co_flags & _UNUSABLE or not code.co_argcount:
        return None
    parsed = _parsed(inner)
    if parsed is None:
        return None
    tree, imports = parsed
    if not _same(_code([imports, _bare(tree)], code, tree.name), code):
        return None
    groups = _groups(tree, names, set(plain))
    if not groups:
        return None
    used = {one for node in ast.walk(tree) for one in (getattr(node, "id", ""), getattr(node, "arg", ""))}
    prefix = "_joined"
    while any(one and one.startswith(prefix) for one in used):
        prefix += "_"
    _rewrite(tree, groups, prefix)
    new = _evaluated(tree, imports, prefix, inner)
    # Decorators that were added or changed later are not in the source.
    layers = _chain(new)
    if len(layers) != len(chain) or not all(isinstance(one, FunctionType) for one in layers):
        return None
    # Equal, not identical: some decorators give every function that they create a copy of its code.
    if any(one.__code__ != other.__code__ for one, other in zip(layers[:-1], chain[:-1], strict=True)):
        return None
    if layers[-1].__code__.co_freevars != (f"{prefix}_together",):
        return None
    return new, tuple(tuple(group.calls) for group in groups)


def _chain(function: Any) -> list[Any]:
    """A function and the functions that it wraps, outermost first."""
    chain = [function]
    while hasattr(chain[-1], "__wrapped__") and len(chain) < 50:
        chain.append(chain[-1].__wrapped__)
    return chain


def _parsed(function: FunctionType) -> tuple[ast.FunctionDef, ast.Import] | None:
    """The statement that defines a function, with its positions in the file, and an import of what its module imports.

    The import is needed because the compiler generates other code for calls of imported modules' functions.
    """
    try:
        lines, first = inspect.getsourcelines(function)
        nested = lines[0][:1].isspace()
        tree = ast.parse("if 1:\n" * nested + "".join(lines))
        file = function.__code__.co_filename
        table = symtable.symtable("".join(linecache.getlines(file, function.__globals__)), file, "exec")
    except (OSError, TypeError, ValueError, SyntaxError, IndexError, tokenize.TokenError):
        return None
    ast.increment_lineno(tree, first - 1 - nested)
    found: Any = tree.body[0]
    found = found.body[0] if nested else found
    if not isinstance(found, ast.FunctionDef) or getattr(found, "type_params", None):
        return None
    return found, ast.Import([ast.alias(one.get_name()) for one in table.get_symbols() if one.is_imported()])


def _bare(tree: ast.FunctionDef) -> ast.FunctionDef:
    """The function without decorators, defaults and annotations, which are not part of its code object."""
    given = tree.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    bare = [one and ast.copy_location(ast.arg(one.arg), one) for one in every]
    positional, named = len(given.posonlyargs), len(given.posonlyargs) + len(given.args)
    arguments: dict[str, Any] = {
        "posonlyargs": bare[:positional],
        "args": bare[positional:named],
        "vararg": bare[named],
        "kwonlyargs": bare[named + 1 : -1],
        "kwarg": bare[-1],
        # Defaults matter to callers only; `_evaluated` sets the original's.
        "defaults": [],
        "kw_defaults": [None for _ in given.kwonlyargs],
    }
    plain = ast.FunctionDef(tree.name, ast.arguments(**arguments), tree.body, [], None, None)
    if hasattr(tree, "type_params"):
        plain.type_params = []  # pyright: ignore[reportAttributeAccessIssue]
    return ast.copy_location(plain, tree)


def _code(body: list[ast.stmt], like: CodeType, name: str) -> CodeType:
    """The code of a function of a module that is this body, compiled as ``like`` was."""
    tree = ast.fix_missing_locations(ast.Module([one for one in body if getattr(one, "names", True)], []))
    compiled = compile(tree, like.co_filename, "exec", like.co_flags & _FUTURE, dont_inherit=True)
    return next(one for one in compiled.co_consts if isinstance(one, CodeType) and one.co_name == name)


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether two functions do the same. They do not where a file has changed since it was imported."""
    parts = "co_code co_names co_varnames co_freevars co_cellvars co_argcount co_posonlyargcount co_kwonlyargcount"
    return (
        all(getattr(one, name) == getattr(other, name) for name in parts.split())
        and len(one.co_consts) == len(other.co_consts)
        and all(_same_constant(mine, its) for mine, its in zip(one.co_consts, other.co_consts, strict=True))
    )


def _same_constant(one: object, other: object) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return _same(one, other)
    if isinstance(one, str) and isinstance(other, str):
        # Python 3.10 has the qualified names of inner functions here.
        return one.rpartition(".<locals>.")[2] == other.rpartition(".<locals>.")[2]
    return type(one) is type(other) and one == other


class _Group(NamedTuple):
    """Calls to be joined: the variable, the statement of a block before the first one, and each layer's call."""

    block: list[ast.stmt]
    first: int
    variable: str
    calls: dict[str, ast.Call]


class _Uses(ast.NodeVisitor):
    """Uses of variables in a statement or a part of one: calls of layers on one, and others."""

    def __init__(self, owner: str, names: set[str], plain: set[str]) -> None:
        self.owner = owner
        self.names = names
        self.plain = plain
        self.calls: list[tuple[str, str, ast.Call]] = []
        self.others: set[str] = set()
        self.writes = False
        self._conditional = 0

    def generic_visit(self, node: ast.AST) -> None:
        # Names bound without a Name node: "except ... as name", imports, definitions, patterns.
        self.others |= {one for key in ("name", "asname", "rest") if isinstance(one := getattr(node, key, None), str)}
        self.writes |= isinstance(node, ast.AugAssign | ast.Nonlocal | ast.Global | ast.Yield | ast.YieldFrom)
        inside = isinstance(node, _CONDITIONAL)
        self._conditional += inside
        super().generic_visit(node)
        self._conditional -= inside

    def visit_Name(self, node: ast.Name) -> None:
        self.others.add(node.id)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.writes |= not isinstance(node.ctx, ast.Load)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            if not (isinstance(node.value, ast.Name) and node.attr in _READS):
                self.generic_visit(node)
        else:
            self.writes |= node.attr in self.names
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            name = called.attr
            match node:
                case ast.Call(args=[ast.Name(id=variable)], keywords=[]) if called.value.id == self.owner:
                    if name in self.plain:
                        return
                    if name in self.names and not self._conditional:
                        self.calls.append((name, variable, node))
                        return
            if name in _READING_CALLS:
                for one in (*node.args, *node.keywords):
                    self.visit(one)
                return
        if isinstance(called, ast.Attribute):
            self.writes |= called.attr.endswith("_") and not called.attr.endswith("__")
        self.writes |= any(one.arg in ("out", "inplace") for one in node.keywords)
        self.generic_visit(node)


def _groups(tree: ast.FunctionDef, names: Names, plain: set[str]) -> list[_Group]:
    """The calls in a function that can be joined."""
    owner = [*tree.args.posonlyargs, *tree.args.args][0].arg
    parameters = {one.arg for one in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)} - {owner}
    inside = [node for statement in tree.body for node in ast.walk(statement)]
    bound = {node.id for node in inside if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    if owner in bound:
        return []
    elsewhere = {one for node in inside if isinstance(node, ast.Global | ast.Nonlocal) for one in node.names}
    # Code that is evaluated later may change a variable at any call.
    for node in inside:
        if isinstance(node, _LAZY):
            elsewhere |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    local = (parameters | bound) - elsewhere
    of = {name: number for number, one in reversed(list(enumerate(names))) for name in one}
    uses = partial(_Uses, owner, set(of), plain)
    found = [group for block in _blocks(tree.body) for group in _in_block(block, uses, of, local)]
    order = [name for one in names for name in one]
    return [group._replace(calls={n: group.calls[n] for n in order if n in group.calls}) for group in found]


def _blocks(block: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """A block and the blocks of its statements, but not those of nested functions."""
    yield block
    for statement in block:
        if not isinstance(statement, _LAZY):
            for part in (statement, *getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
                for key in ("body", "orelse", "finalbody"):
                    if inner := getattr(part, key, None):
                        yield from _blocks(inner)


def _in_block(
    block: list[ast.stmt], uses: Callable[[], _Uses], of: dict[str, int], local: set[str]
) -> Iterator[_Group]:
    """The groups of one block; blocks within its statements count as other uses."""
    waiting: dict[tuple[int, str], _Group] = {}

    def closed(found: _Uses, everything: bool = False) -> Iterator[_Group]:
        for key in list(waiting):
            if everything or found.writes or key[1] in found.others:
                group = waiting.pop(key)
                if len(group.calls) > 1:
                    yield group

    for number, statement in enumerate(block):
        before, after = uses(), uses()
        leaves = False
        match statement:
            case ast.Assign(targets=targets, value=value):
                before.visit(value)
                for target in targets:
                    after.visit(target)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                before.visit(value)
                after.visit(target)
            case ast.Return(value=ast.expr() as value) | ast.Expr(value=value):
                before.visit(value)
            case _:
                before.visit(statement)
                before.others |= {variable for _, variable, _ in before.calls}
                leaves = any(isinstance(node, _LEAVING) for node in ast.walk(statement))
        after.others |= {variable for _, variable, _ in after.calls}
        yield from closed(before, everything=leaves)
        for name, variable, call in before.calls:
            if variable in local and variable not in before.others and not before.writes:
                key = (of[name], variable)
                if key in waiting and name in waiting[key].calls:
                    group = waiting.pop(key)
                    if len(group.calls) > 1:
                        yield group
                waiting.setdefault(key, _Group(block, number, variable, {})).calls[name] = call
        yield from closed(after)
    yield from closed(uses(), everything=True)


class _Replaced(ast.NodeTransformer):
    """Replaces calls by variables."""

    def __init__(self, variables: dict[ast.Call, str]) -> None:
        self.variables = variables

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if (name := self.variables.get(node)) is not None:
            return ast.copy_location(ast.Name(name, ast.Load()), node)
        return self.generic_visit(node)


def _rewrite(tree: ast.FunctionDef, groups: list[_Group], prefix: str) -> None:
    """Inserts the joint calls into a function, at the source position of the first call that they replace."""
    variables: dict[ast.Call, str] = {}
    above: list[tuple[_Group, ast.stmt]] = []
    for group in groups:
        results = [f"{prefix}_{len(variables) + number}" for number in range(len(group.calls))]
        variables.update(zip(group.calls.values(), results, strict=True))
        place = min(group.calls.values(), key=lambda call: (call.lineno, call.col_offset))
        layers = ast.Tuple([call.func for call in group.calls.values()], ast.Load())
        arguments: list[ast.expr] = [layers, place.args[0]]
        call = ast.Call(ast.Name(f"{prefix}_together", ast.Load()), arguments, [])
        statement = ast.Assign([ast.Tuple([ast.Name(one, ast.Store()) for one in results], ast.Store())], call)
        for node in (statement, *ast.walk(statement)):
            if "lineno" in node._attributes:
                ast.copy_location(node, place)
        above.append((group, statement))
    _Replaced(variables).visit(tree)
    for group, statement in sorted(above, key=lambda one: -one[0].first):
        group.block.insert(group.first, statement)


def _evaluated(tree: ast.FunctionDef, imports: ast.Import, prefix: str, inner: FunctionType) -> Any:
    """The rewritten function with its decorators, in the original's globals; None if they raise."""

    def restored(function: FunctionType) -> FunctionType:
        # A default may use names that existed in the class body only.
        function.__defaults__, function.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
        function.__qualname__, function.__module__ = inner.__qualname__, inner.__module__
        function.__doc__ = inner.__doc__
        annotations = "__annotate__" if hasattr(inner, "__annotate__") else "__annotations__"
        setattr(function, annotations, getattr(inner, annotations))
        vars(function).update(vars(inner))
        return function

    bare = _bare(tree)
    bare.decorator_list = [*tree.decorator_list, ast.Name(f"{prefix}_restored", ast.Load())]
    given = [ast.arg(f"{prefix}_together"), ast.arg(f"{prefix}_restored")]
    arguments: dict[str, Any] = {"posonlyargs": [], "args": given, "kwonlyargs": [], "kw_defaults": [], "defaults": []}
    body: list[ast.stmt] = [bare, ast.Return(ast.Name(tree.name, ast.Load()))]
    factory = ast.FunctionDef(f"{prefix}_factory", ast.arguments(**arguments), body, [], None, None)
    if hasattr(tree, "type_params"):
        factory.type_params = []  # pyright: ignore[reportAttributeAccessIssue]
    ast.copy_location(factory, tree)
    made = _code([imports, factory], inner.__code__, factory.name)
    try:
        return FunctionType(made, inner.__globals__)(together, restored)
    except Exception:  # noqa: BLE001 - a decorator may raise anything where its class body is not around it
        return None
