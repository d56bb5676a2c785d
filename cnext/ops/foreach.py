"""Ops over lists of tensors: declaration, registration with torch.library, prepared calls and kernel launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import averaging_reference, checks, dispatch

LIBRARY = torch.library.Library("cnext", "FRAGMENT")
LETTER = {torch.float32: "f", torch.bfloat16: "b", torch.float16: "h"}


@dataclass(frozen=True)
class Op:
    """Declaration of an op over lists of tensors, each list indexed by tensor.

    name: as registered, and of its function in `cnext.ops.averaging_reference`.
    rules: names of its kernels; the statistics of one are the rows of the next. Empty: plain torch only.
    roles: argument name to role (see `checks.require_metadata`), in the order of the signature.
    order: argument names in the kernels' order; the first ``outputs`` are written.
    scalars: names of the scalars in the kernels' order, with their defaults (None: required).
    reductions: how each column of the float64 statistics, (tensors, columns), is reduced over a tensor's elements: "+"
        sum, "<" minimum, ">" maximum. Empty: the op returns nothing.
    rows: name of the argument with a float64 row per tensor, "" where there is none, and the width of a row.
    convert: makes the rows and the scalars of the public function's arguments, where they differ.
    """

    name: str
    rules: tuple[str, ...]
    roles: Mapping[str, str]
    order: tuple[str, ...]
    outputs: int
    scalars: Mapping[str, float | None] = field(default_factory=dict)
    reductions: str = ""
    rows: tuple[str, int] = ("", 0)
    convert: Callable[..., tuple[tuple[Tensor, ...], dict[str, float]]] | None = None

    @property
    def columns(self) -> int:
        return len(self.reductions)

    def reference(self, *arguments: Any, **scalars: float) -> Tensor | None:
        """The reference implementation: lists in the order of the signature, rows, and scalars or their defaults."""
        defaults = {name: value for name, value in self.scalars.items() if value is not None}
        return getattr(averaging_reference, self.name)(*arguments, **defaults | scalars)

    @property
    def written(self) -> tuple[str, ...]:
        return self.order[: self.outputs]

    @property
    def schema(self) -> str:
        alias = {name: f"({chr(ord('a') + i)}!)" for i, name in enumerate(self.written)}
        lists = [f"Tensor{alias.get(name, '')}[] {name}" for name in self.roles]
        rows = [f"Tensor {self.rows[0]}"] if self.rows[0] else []
        numbers = [f"float {name}" + ("" if value is None else f"={value}") for name, value in self.scalars.items()]
        arguments = ", ".join([*lists, *rows, "*", *numbers, "str? impl=None"])
        return f"{self.name}({arguments}) -> {'Tensor' if self.columns else '()'}"

    def register(self) -> None:
        """Registers ``torch.ops.cnext.<name>`` for every device and for fake tensors."""
        LIBRARY.define(self.schema)
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        # No gradient flows through these ops, and their results must not require one.
        LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"cnext::{self.name}", self.fake, lib=LIBRARY)

    def check_rows(self, given: Sequence[Tensor], base: Sequence[Tensor]) -> None:
        """Checks the dtype, shape and device of the argument that has a row per tensor."""
        if not given:
            raise UserError(f"{self.name}: {self.rows[0]} is missing; expected a float64 row for each tensor")
        rows, device = given[0], base[0].device
        shape = (len(base), self.rows[1]) if self.rows[1] > 1 else (len(base),)
        if rows.dtype != torch.float64 or rows.shape != shape or rows.device != device:
            raise UserError(
                f"{self.name}: {self.rows[0]} has dtype {rows.dtype}, shape {tuple(rows.shape)} and device "
                f"{rows.device}; expected torch.float64, {shape} and {device}"
            )

    def statistics(self, base: Sequence[Tensor]) -> Tensor | None:
        """Uninitialized memory for the op's statistics; None where it has none."""
        return base[0].new_empty((len(base), self.columns), dtype=torch.float64) if self.columns else None

    def fake(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists = dict(zip(self.roles, arguments, strict=False))
        checks.require_metadata(self.name, lists, self.roles)
        if self.rows[0]:
            self.check_rows(arguments[len(lists) :], arguments[0])
        return self.statistics(arguments[0])

    def run(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists = dict(zip(self.roles, arguments, strict=False))
        return Prepared(self, lists, impl, once=True).launch({}, arguments[len(lists) :], scalars)


SAMPLE = 32
"""How many tensors of each list a prepared call checks for a replaced storage."""


class Prepared:
    """An op over lists of tensors that were checked once, made by `prepare`: a call does little but launch the kernel.

    Called as the op is, without the lists. A list that the op only reads may be left open at preparation (None): every
    call then takes it by name. In it None counts as zeros, and a tensor of other strides is copied.

    The other tensors and their storages are kept alive. Every call checks `SAMPLE` tensors of each list, others each
    time: where the storages of a whole list were replaced (``.data = ``, ``.to``, ``set_``), the next call raises;
    where that of a single tensor was, one of the next tensors / SAMPLE calls. Under CUDA graph capture a call is
    captured; the tensors must outlive the graph. Not thread-safe.

    Returns:
        What the op returns.

    Raises:
        UserError: as the op; an argument is unknown or missing; a tensor's storage was replaced.

    Example:
        >>> import torch
        >>> from cnext import ops
        >>> theta, ema = [torch.ones(3)], [torch.zeros(3)]
        >>> step = ops.prepare("ema_step_", theta, ema)
        >>> for _ in range(2):
        ...     step(beta=0.5)
        >>> ema[0]
        tensor([0.7500, 0.7500, 0.7500])
    """

    def __init__(
        self, op: Op, lists: Mapping[str, Sequence[Tensor] | None], impl: str | None = None, once: bool = False
    ) -> None:
        self.op, self.once, self.calls = op, once, 0
        self.lists = {name: list(tensors) for name, tensors in lists.items() if tensors is not None}
        self.per_call = [name for name in op.roles if name not in self.lists]
        if missing := [name for name in self.per_call if name in op.written] or list(op.roles) * (not self.lists):
            raise UserError(
                f"{op.name}: {missing[0]} is None; expected its tensors, as only lists that are read can be left open"
            )
        if empty := [name for name, tensors in self.lists.items() if not tensors]:
            raise UserError(f"{op.name}: {empty[0]} is empty; expected at least one tensor")
        self.tables = checks.tables(op.name, self.lists, op.roles)
        self._written = checks.require_disjoint(op.name, self.lists, self.tables, op.written)
        self.base = next(iter(self.lists.values()))
        self.device = self.base[0].device
        self._kinds = {op.roles[name]: int(rows[0, checks.KIND]) for name, rows in self.tables.items()}
        self._dtypes = {op.roles[name]: tensors[0].dtype for name, tensors in self.lists.items()}
        self.path = dispatch.choose(op.name, self.device.type, impl, compiled=bool(op.rules))
        # Autograd must see writes to what requires a gradient; for the state of prepared calls they are not counted.
        written = [tensor for name in op.written for tensor in self.lists[name]]
        self._versioned = [tensor for tensor in written if once or tensor.requires_grad]
        if self.path != "reference":
            rows = next(iter(self.tables.values()))
            self.sizes = numpy.ascontiguousarray(rows[:, checks.ELEMENTS])
            self.pointers = numpy.zeros((len(op.order), len(self.base)), numpy.int64)
            for name, rows in self.tables.items():
                self.pointers[op.order.index(name)] = rows[:, checks.ADDRESS]
            self._launch = _launcher(self.path, self.sizes, self.device)
            # The addresses must stay valid between calls, whatever becomes of the tensors.
            kept = [] if once else self.lists.values()
            self._storages = [tensor.detach() for tensors in kept for tensor in tensors]

    def __call__(self, *rows: Tensor, **given: Any) -> Tensor | None:
        op = self.op
        lists = {name: given.pop(name, None) for name in self.per_call}
        if op.convert is not None:
            rows, given = op.convert(*rows, **given)
        if unknown := given.keys() - op.scalars.keys():
            expected = ", ".join([*self.per_call, *op.scalars])
            raise UserError(f"{op.name}: unknown argument {min(unknown)!r}; expected {expected}")
        return self.launch(lists, rows, given)

    @torch.no_grad()
    def launch(
        self, lists: Mapping[str, Sequence[Tensor | None] | None], rows: Sequence[Tensor], scalars: Mapping[str, float]
    ) -> Tensor | None:
        """Runs the op on the prepared lists and those of this call."""
        op = self.op
        whole = {name: self.lists.get(name) or self._checked(name, lists[name]) for name in op.roles}
        if missing := [name for name, default in op.scalars.items() if default is None and name not in scalars]:
            raise UserError(f"{op.name}: {missing[0]} is missing; expected a number")
        numbers = {name: scalars.get(name, default or 0.0) for name, default in op.scalars.items()}
        if op.rows[0]:
            op.check_rows(rows, self.base)
        if self.path == "reference":
            out = op.reference(*whole.values(), *rows, **numbers)
            statistics = out if out is None else out.view(-1, op.columns)
        else:
            if not self.once:
                self._require_same_storages()
            dtypes = "".join(LETTER[whole[name][0].dtype] for name in op.order)
            statistics = self._run(dtypes, rows[0].contiguous() if rows else None, list(numbers.values()))
        self.calls += 1
        torch.autograd.graph.increment_version(self._versioned)
        return statistics

    def _run(self, dtypes: str, rows: Tensor | None, scalars: list[float]) -> Tensor | None:
        statistics = None
        for rule in self.op.rules:
            out = self.op.statistics(self.base) if rule == self.op.rules[0] else None
            self._launch(rule, dtypes, self.pointers, scalars, out, rows if statistics is None else statistics)
            statistics = statistics if out is None else out
        return statistics

    def _checked(self, name: str, tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
        """A list that this call gives, checked, and converted where necessary."""
        op, role = self.op, self.op.roles[name]
        if tensors is None:
            raise UserError(
                f"{op.name}: {name} is missing; it was left open at preparation, so every call must give it"
            )
        like = next(iter(self.tables.values()))
        table = checks.table(tensors)
        given: list[Any] = list(tensors)  # a None has a row of -1, and does not fit
        fits = len(table) == len(like) and (table[:, checks.LAYOUT] == like[:, checks.LAYOUT]).all()
        if not fits or (table[:, checks.KIND] != self._kinds.get(role)).any():
            given = self._converted(name, tensors)
            table = checks.table(given)
            self._kinds[role] = int(table[0, checks.KIND])
        checks.require_disjoint_from(
            op.name, name, checks.spans(table, given[0].element_size()), self._written, op.written
        )
        if self.path != "reference":
            self.pointers[op.order.index(name)] = table[:, checks.ADDRESS]
        return given

    def _converted(self, name: str, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors with the prepared lists' strides, zeros for None, after checks of dtype, shape and device."""
        if len(tensors) != len(self.base):
            raise UserError(
                f"{self.op.name}: {name} has {len(tensors)} tensors; expected {len(self.base)}, as prepared"
            )
        present = [tensor for tensor in tensors if tensor is not None]
        role = self.op.roles[name]
        dtype = self._dtypes.get(role, present[0].dtype if present else torch.float32)
        whole = [
            torch.zeros_like(like, dtype=dtype, requires_grad=False) if tensor is None else tensor
            for tensor, like in zip(tensors, self.base, strict=True)
        ]
        allowed = (dtype,) if dtype in checks.PARAM else checks.PARAM
        for i, (tensor, like) in enumerate(zip(whole, self.base, strict=True)):
            what = f"{self.op.name}: {name}[{i}]"
            checks.require_tensor(what, tensor, allowed, like.shape, self.device, "that of the prepared list", i)
            if tensor.layout != torch.strided:
                raise UserError(f"{what} has layout {tensor.layout}; expected torch.strided, see to_dense()")
        prepared = {other: tensors[0].dtype for other, tensors in self.lists.items()}
        checks.require_one_16_bit_dtype(self.op.name, {**prepared, name: dtype})
        self._dtypes[role] = dtype
        return [
            tensor
            if tensor.stride() == like.stride()
            else torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(tensor.detach())
            for tensor, like in zip(whole, self.base, strict=True)
        ]

    def _require_same_storages(self) -> None:
        """Raises where the storage of one of this call's sample was replaced."""
        step = -(-len(self.base) // SAMPLE)
        begin = self.calls % step
        for name, tensors in self.lists.items():
            now = numpy.fromiter(map(Tensor.data_ptr, tensors[begin::step]), numpy.int64)
            if (moved := now != self.tables[name][begin::step, checks.ADDRESS]).any():
                raise UserError(
                    f"{self.op.name}: the storage of {name}[{begin + step * int(moved.argmax())}] was replaced after "
                    f"the call was prepared (as .data = and .to do); up to {step} calls may have worked on the old "
                    "storage. Prepare the call again after moving tensors"
                )


def _launcher(path: str, sizes: numpy.ndarray, device: torch.device) -> Callable[..., None]:
    """What launches a rule's kernel: (rule, dtypes, pointers, scalars, out, rows).

    pointers: (operands, tensors) int64. out: (tensors, columns) float64 for the statistics, rows: a float64 row per
    tensor; None where the rule has none.
    """
    if path == "triton":
        kernels: Any = importlib.import_module(f"{dispatch.ROOT}.kernels.averaging")
        return kernels.Lists(sizes, device)
    return _Cpp(sizes) if path == "cpp" else _Cuda(sizes, device)


class _Compiled:
    def __init__(self, path: str, sizes: numpy.ndarray) -> None:
        self.module: Any = dispatch.core(path)
        self.sizes = sizes

    def launch(
        self,
        rule: str,
        dtypes: str,
        pointers: numpy.ndarray,
        scalars: list[float],
        out: Tensor | None,
        rows: Tensor | None,
        **options: int,
    ) -> None:
        columns = {} if out is None else {"columns": out.data_ptr(), "column_width": out.shape[1]}
        width = {} if rows is None else {"rows": rows.data_ptr(), "row_width": rows[0].numel()}
        self.module.foreach(rule, dtypes, pointers, self.sizes, scalars, **columns, **width, **options)


class _Cpp(_Compiled):
    def __init__(self, sizes: numpy.ndarray) -> None:
        super().__init__("cpp", sizes)

    def __call__(self, *call: Any) -> None:
        self.launch(*call, threads=torch.get_num_threads())


class _Cuda(_Compiled):
    """Keeps scratch memory for reductions, one per stream: calls on one stream run in order."""

    def __init__(self, sizes: numpy.ndarray, device: torch.device) -> None:
        super().__init__("cuda", sizes)
        self.device, self.blocks = device, self.module.blocks(sizes)
        self.scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, *call: Any) -> None:
        out: Tensor | None = call[4]
        with dispatch.on(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            if out is None:
                return self.launch(*call, stream=stream)
            partial, tickets = self._scratch(stream, out)
            return self.launch(*call, partial=partial.data_ptr(), tickets=tickets.data_ptr(), stream=stream)

    def _scratch(self, stream: int, out: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks' partial results, and a zero per tensor that its blocks count up and reset."""
        key, capturing = (stream, out.shape[1]), torch.cuda.is_current_stream_capturing()
        if (kept := self.scratch.get(key)) is not None and not capturing:
            return kept
        made = out.new_empty((self.blocks, out.shape[1])), out.new_zeros(len(self.sizes), dtype=torch.int32)
        if not capturing:
            self.scratch[key] = made  # an allocation under capture belongs to the graph's own memory
        return made
