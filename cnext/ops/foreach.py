"""An op over lists of tensors: its schema, checks, fake kernel and the choice of implementation."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    name: str
    rules: tuple[str, ...]
    roles: Mapping[str, str]
    order: tuple[str, ...]
    outputs: int
    scalars: Mapping[str, float | None] = field(default_factory=dict)
    columns: int = 0
    rows: tuple[str, int] = ("", 0)

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

    def checked(self, arguments: tuple[Any, ...]) -> tuple[dict[str, list[Tensor]], Tensor | None]:
        """The lists by name, and the rows, once they are seen to fit."""
        lists = dict(zip(self.roles, arguments, strict=False))
        checks.metadata(self.name, lists, self.roles)
        rows = arguments[len(lists)] if self.rows[0] else None
        if rows is not None:
            base = arguments[0]
            shape = (len(base), self.rows[1]) if self.rows[1] > 1 else (len(base),)
            if rows.dtype != torch.float64 or rows.shape != shape or rows.device != base[0].device:
                raise UserError(
                    f"{self.name}: {self.rows[0]} has dtype {rows.dtype}, shape {tuple(rows.shape)} and device "
                    f"{rows.device}; expected torch.float64, {shape} and {base[0].device}"
                )
        return lists, rows

    def statistics(self, like: Tensor, tensors: int) -> Tensor | None:
        return like.new_empty((tensors, self.columns), dtype=torch.float64) if self.columns else None

    def fake(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists, _ = self.checked(arguments)
        base = next(iter(lists.values()))
        return self.statistics(base[0], len(base))

    @torch.no_grad()
    def run(self, *arguments: Any, impl: str | None = None, **scalars: float) -> Tensor | None:
        lists, rows = self.checked(arguments)
        checks.layout(self.name, lists)
        ordered = {name: lists[name] for name in self.order}
        sizes = numpy.array([tensor.numel() for tensor in ordered[self.order[0]]], dtype=numpy.int64)
        pointers = checks.addresses(self.name, ordered, sizes, self.written)
        device = arguments[0][0].device
        path = dispatch.choose(self.name, device.type, impl, compiled=bool(self.rules))
        # The schema has made sure of those that have no default.
        numbers = {name: scalars.get(name, default or 0.0) for name, default in self.scalars.items()}
        if path == "reference":
            out = getattr(reference, self.name)(*arguments, **numbers)
            return out.view(-1, self.columns) if self.columns else None
        launch = {"cpp": _cpp, "cuda": _cuda, "triton": _triton}[path]
        dtypes = "".join(_LETTER[tensors[0].dtype] for tensors in ordered.values())
        counts = None
        rows = rows.contiguous() if rows is not None else None
        for rule in self.rules:
            counting = self.columns and rule == self.rules[0]
            out = self.statistics(arguments[0][0], len(sizes)) if counting else None
            launch(
                rule, dtypes, pointers, sizes, list(numbers.values()), out, rows if counts is None else counts, device
            )
            counts = out if counting else counts
        torch.autograd.graph.increment_version([tensor for name in self.written for tensor in lists[name]])
        return counts


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(rows: Tensor | None) -> int:
    return 0 if rows is None else rows[0].numel()


def _cpp(
    rule: str,
    dtypes: str,
    pointers: numpy.ndarray,
    sizes: numpy.ndarray,
    scalars: list[float],
    out: Tensor | None,
    rows: Tensor | None,
    device: torch.device,
) -> None:
    module: Any = dispatch.core("cpp")
    module.foreach(
        rule,
        dtypes,
        pointers,
        sizes,
        scalars,
        columns=_address(out),
        column_width=_width(out),
        rows=_address(rows),
        row_width=_width(rows),
        threads=torch.get_num_threads(),
    )


def _cuda(
    rule: str,
    dtypes: str,
    pointers: numpy.ndarray,
    sizes: numpy.ndarray,
    scalars: list[float],
    out: Tensor | None,
    rows: Tensor | None,
    device: torch.device,
) -> None:
    module: Any = dispatch.core("cuda")
    partial = tickets = None
    if out is not None:
        partial = out.new_empty((module.blocks(sizes), out.shape[1]))
        tickets = torch.zeros(len(sizes), dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        module.foreach(
            rule,
            dtypes,
            pointers,
            sizes,
            scalars,
            columns=_address(out),
            column_width=_width(out),
            partial=_address(partial),
            tickets=_address(tickets),
            rows=_address(rows),
            row_width=_width(rows),
            stream=torch.cuda.current_stream().cuda_stream,
        )


def _triton(
    rule: str,
    dtypes: str,
    pointers: numpy.ndarray,
    sizes: numpy.ndarray,
    scalars: list[float],
    out: Tensor | None,
    rows: Tensor | None,
    device: torch.device,
) -> None:
    from cnext.kernels import averaging  # pyright: ignore[reportMissingImports]

    averaging.foreach(rule, dtypes, pointers, sizes, scalars, out, rows, device)
