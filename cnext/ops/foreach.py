"""An op over lists of tensors: its schema, checks, fake kernel and the choice of implementation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.ops import checks, dispatch, reference

_LIBRARY = torch.library.Library("cnext", "FRAGMENT")
_LETTER = {torch.float32: "f", torch.bfloat16: "b", torch.float16: "h"}


@dataclass(frozen=True)
class Op:
    """One op over lists of tensors, each list indexed by tensor.

    name: as registered, and of its function in `cnext.ops.reference`.
    rules: what the kernels call it; the counts of one are the rows of the next. Empty: plain torch alone has it.
    roles: argument name to role (see `checks.metadata`), in the order of the signature.
    order: argument names as the kernels take them; the first ``outputs`` are written.
    scalars: names of the numbers, in the kernels' order, with their defaults (None: required).
    columns: width of the float64 statistics, (tensors, columns); 0 where the op returns nothing.
    rows: name of the argument with a float64 row per tensor, "" where there is none, and the width of a row.
    public: what makes the rows and the numbers of the public function's arguments, where they are not the same.
    """

    name: str
    rules: tuple[str, ...]
    roles: Mapping[str, str]
    order: tuple[str, ...]
    outputs: int
    scalars: Mapping[str, float | None] = field(default_factory=dict)
    columns: int = 0
    rows: tuple[str, int] = ("", 0)
    public: Callable[..., tuple[tuple[Tensor, ...], dict[str, float]]] | None = None

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
        """Makes ``torch.ops.cnext.<name>``, for every device and for fake tensors."""
        _LIBRARY.define(self.schema)
        _LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        # No gradient flows through these ops, so their results must not look as if one did.
        _LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"cnext::{self.name}", self.fake, lib=_LIBRARY)

    def check_rows(self, given: Sequence[Tensor], base: Sequence[Tensor]) -> None:
        """Checks the dtype, shape and device of the argument with a row per tensor."""
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
        """Uninitialised memory for what the op counts; None where it counts nothing."""
        return base[0].new_empty((len(base), self.columns), dtype=torch.float64) if self.columns else None

    def fake(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists = dict(zip(self.roles, arguments, strict=False))
        checks.metadata(self.name, lists, self.roles)
        if self.rows[0]:
            self.check_rows(arguments[len(lists) :], arguments[0])
        return self.statistics(arguments[0])

    def run(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists = dict(zip(self.roles, arguments, strict=False))
        return Prepared(self, lists, impl, once=True).launch({}, arguments[len(lists) :], scalars)


SAMPLE = 32
"""How many tensors of each list a prepared call looks at, to see whether they are still where they were."""


class Prepared:
    """An op over lists of tensors that have been checked once, so that a call launches and does little more.

        step = ops.prepare("pema_step_", theta, None, fisher, ema)
        step(level, grad=[parameter.grad for parameter in parameters])

    Called as the op is, without the lists. In place of one that the op only reads, None says that every call gives it
    by its name: None in it counts as zeros, a tensor that is laid out otherwise is copied, and nothing of it is kept.

    The other tensors, and the memory that they had, are kept alive. Every call looks at `SAMPLE` of each list, others
    each time: where storage was replaced (``.data = ``, ``.to``, ``set_``) a whole list is noticed at once, and a
    single tensor within tensors / SAMPLE calls. Under CUDA graph capture a call is captured; the tensors must outlive
    the graph. One thread at a time may call it.

    Raises:
        UserError: as the op; and where a tensor has moved.
    """

    def __init__(
        self, op: Op, lists: Mapping[str, Sequence[Tensor] | None], impl: str | None = None, once: bool = False
    ) -> None:
        self.op, self.once, self.calls = op, once, 0
        self.lists = {name: list(tensors) for name, tensors in lists.items() if tensors is not None}
        self.open = [name for name in op.roles if name not in self.lists]
        if missing := [name for name in self.open if name in op.written] or list(op.roles) * (not self.lists):
            raise UserError(f"{op.name}: {missing[0]} is None; expected its tensors, once and for all calls")
        if empty := [name for name, tensors in self.lists.items() if not tensors]:
            raise UserError(f"{op.name}: {empty[0]} is empty; expected at least one tensor")
        self.tables = checks.tables(op.name, self.lists, op.roles)
        self._written = checks.alone(op.name, self.lists, self.tables, op.written)
        self.base = next(iter(self.lists.values()))
        self.device = self.base[0].device
        self._kinds = {op.roles[name]: int(rows[0, checks.KIND]) for name, rows in self.tables.items()}
        self._dtypes = {op.roles[name]: tensors[0].dtype for name, tensors in self.lists.items()}
        self.path = dispatch.choose(op.name, self.device.type, impl, compiled=bool(op.rules))
        # Autograd is told of what is written. Of a state that needs no gradient it need not hear at every step.
        written = [tensor for name in op.written for tensor in self.lists[name]]
        self._versioned = [tensor for tensor in written if once or tensor.requires_grad]
        if self.path != "reference":
            rows = next(iter(self.tables.values()))
            self.sizes = numpy.ascontiguousarray(rows[:, checks.ELEMENTS])
            self.pointers = numpy.zeros((len(op.order), len(self.base)), numpy.int64)
            for name, rows in self.tables.items():
                self.pointers[op.order.index(name)] = rows[:, checks.ADDRESS]
            self._launch = _launcher(self.path, self.sizes, self.device)
            # Between calls the addresses stay good whatever becomes of the tensors.
            kept = [] if once else self.lists.values()
            self._memory = [tensor.detach() for tensors in kept for tensor in tensors]

    def __call__(self, *rows: Tensor, **given: Any) -> Tensor | None:
        op = self.op
        lists = {name: given.pop(name, None) for name in self.open}
        if op.public is not None:
            rows, given = op.public(*rows, **given)
        if unknown := given.keys() - op.scalars.keys():
            expected = ", ".join([*self.open, *op.scalars])
            raise UserError(f"{op.name}: {min(unknown)!r} is no argument; expected {expected}")
        return self.launch(lists, rows, given)

    @torch.no_grad()
    def launch(
        self, lists: Mapping[str, Sequence[Tensor | None] | None], rows: Sequence[Tensor], scalars: Mapping[str, float]
    ) -> Tensor | None:
        """Runs the op on the lists that it was made with and those of this call."""
        op = self.op
        whole = {name: self.lists.get(name) or self._taken(name, lists[name]) for name in op.roles}
        if missing := [name for name, default in op.scalars.items() if default is None and name not in scalars]:
            raise UserError(f"{op.name}: {missing[0]} is missing; expected a number")
        numbers = {name: scalars.get(name, default or 0.0) for name, default in op.scalars.items()}
        if op.rows[0]:
            op.check_rows(rows, self.base)
        if self.path == "reference":
            out = getattr(reference, op.name)(*whole.values(), *rows, **numbers)
            counts = out.view(-1, op.columns) if op.columns else None
        else:
            if not self.once:
                self._require_unmoved()
            dtypes = "".join(_LETTER[whole[name][0].dtype] for name in op.order)
            counts = self._run(dtypes, rows[0].contiguous() if rows else None, list(numbers.values()))
        self.calls += 1
        torch.autograd.graph.increment_version(self._versioned)
        return counts

    def _run(self, dtypes: str, rows: Tensor | None, scalars: list[float]) -> Tensor | None:
        counts = None
        for rule in self.op.rules:
            counting = self.op.columns and rule == self.op.rules[0]
            out = self.op.statistics(self.base) if counting else None
            self._launch(rule, dtypes, self.pointers, scalars, out, rows if counts is None else counts)
            counts = out if counting else counts
        return counts

    def _taken(self, name: str, tensors: Sequence[Tensor | None] | None) -> list[Tensor]:
        """A list of this call alone, once it is seen to fit."""
        op, role = self.op, self.op.roles[name]
        if tensors is None:
            raise UserError(f"{op.name}: {name} is missing; the call was prepared without it and takes it every time")
        like = next(iter(self.tables.values()))
        found = checks.table(tensors)
        kept: list[Any] = list(tensors)  # None among them has a row of -1, and does not fit
        fits = len(found) == len(like) and (found[:, checks.LAYOUT] == like[:, checks.LAYOUT]).all()
        if not fits or (found[:, checks.KIND] != self._kinds.get(role)).any():
            kept = self._mended(name, tensors)
            found = checks.table(kept)
            self._kinds[role] = int(found[0, checks.KIND])
        checks.apart(op.name, name, checks.spans(found, kept[0].element_size()), self._written, op.written)
        if self.path != "reference":
            self.pointers[op.order.index(name)] = found[:, checks.ADDRESS]
        return kept

    def _mended(self, name: str, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The tensors laid out as the prepared ones, zeros in place of None, once dtypes, shapes and devices fit."""
        if len(tensors) != len(self.base):
            raise UserError(
                f"{self.op.name}: {name} has {len(tensors)} tensors; expected {len(self.base)}, as prepared"
            )
        there = [tensor for tensor in tensors if tensor is not None]
        role = self.op.roles[name]
        dtype = self._dtypes.get(role, there[0].dtype if there else torch.float32)
        whole = [
            torch.zeros_like(like, dtype=dtype, requires_grad=False) if tensor is None else tensor
            for tensor, like in zip(tensors, self.base, strict=True)
        ]
        allowed = (dtype,) if dtype in checks.PARAM else checks.PARAM
        for i, (tensor, like) in enumerate(zip(whole, self.base, strict=True)):
            what = f"{self.op.name}: {name}[{i}]"
            checks.require(what, tensor, allowed, like.shape, self.device, "that of the prepared list", i)
            if tensor.layout != torch.strided:
                raise UserError(f"{what} has layout {tensor.layout}; expected torch.strided, see to_dense()")
        kept = {other: tensors[0].dtype for other, tensors in self.lists.items()}
        checks.one_narrow(self.op.name, {**kept, name: dtype})
        self._dtypes[role] = dtype
        return [
            tensor
            if tensor.stride() == like.stride()
            else torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(tensor.detach())
            for tensor, like in zip(whole, self.base, strict=True)
        ]

    def _require_unmoved(self) -> None:
        """Raises where one of this call's sample is no longer where it was."""
        step = -(-len(self.base) // SAMPLE)
        begin = self.calls % step
        for name, tensors in self.lists.items():
            now = numpy.fromiter(map(Tensor.data_ptr, tensors[begin::step]), numpy.int64)
            if (moved := now != self.tables[name][begin::step, checks.ADDRESS]).any():
                raise UserError(
                    f"{self.op.name}: {name}[{begin + step * int(moved.argmax())}] is no longer in the memory that it "
                    f"had when the call was prepared (its storage was replaced, as .data = and .to do); up to {step} "
                    "calls may have worked on the old memory. Prepare the call anew after moving tensors"
                )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(rows: Tensor | None) -> int:
    return 0 if rows is None else rows[0].numel()


def _launcher(
    path: str, sizes: numpy.ndarray, device: torch.device
) -> Callable[[str, str, numpy.ndarray, list[float], Tensor | None, Tensor | None], None]:
    """What launches a rule by one implementation: (rule, dtypes, pointers, scalars, out, rows)."""
    if path == "cpp":
        return _Cpp(sizes)
    if path == "cuda":
        return _Cuda(sizes, device)
    kernels: Any = importlib.import_module("cnext.kernels.averaging")
    return kernels.Lists(sizes, device)


class _Cpp:
    def __init__(self, sizes: numpy.ndarray) -> None:
        self.module: Any = dispatch.core("cpp")
        self.sizes = sizes

    def __call__(
        self,
        rule: str,
        dtypes: str,
        pointers: numpy.ndarray,
        scalars: list[float],
        out: Tensor | None,
        rows: Tensor | None,
    ) -> None:
        self.module.foreach(
            rule,
            dtypes,
            pointers,
            self.sizes,
            scalars,
            columns=_address(out),
            column_width=_width(out),
            rows=_address(rows),
            row_width=_width(rows),
            threads=torch.get_num_threads(),
        )


class _Cuda:
    """Keeps the scratch memory of counting rules, one a stream: calls on one stream follow each other."""

    def __init__(self, sizes: numpy.ndarray, device: torch.device) -> None:
        self.module: Any = dispatch.core("cuda")
        self.sizes, self.device, self.blocks = sizes, device, self.module.blocks(sizes)
        self.scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        rule: str,
        dtypes: str,
        pointers: numpy.ndarray,
        scalars: list[float],
        out: Tensor | None,
        rows: Tensor | None,
    ) -> None:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            partial, tickets = (None, None) if out is None else self._counting(stream, out)
            self.module.foreach(
                rule,
                dtypes,
                pointers,
                self.sizes,
                scalars,
                columns=_address(out),
                column_width=_width(out),
                partial=_address(partial),
                tickets=_address(tickets),
                rows=_address(rows),
                row_width=_width(rows),
                stream=stream,
            )

    def _counting(self, stream: int, out: Tensor) -> tuple[Tensor, Tensor]:
        """Scratch for the blocks' sums, and the zeros that each tensor's blocks count in and leave as zeros."""
        key = stream, out.shape[1]
        if (kept := self.scratch.get(key)) is not None and not torch.cuda.is_current_stream_capturing():
            return kept
        made = out.new_empty((self.blocks, out.shape[1])), out.new_zeros(len(self.sizes), dtype=torch.int32)
        if not torch.cuda.is_current_stream_capturing():
            self.scratch[key] = made  # what is made under capture belongs to the graph's own memory
        return made
