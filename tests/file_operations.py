"""The calls with which this process changes files below a folder, given to a function that may record them or fail."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Act = Callable[[], Any]
Watch = Callable[..., Any]
"""Called as ``watch(name, act, path, ...)`` in place of ``act()``, whose value it returns. The names, and what follows:

- "open": path, flags as of os.open
- "write": path, descriptor, content; ``act(part)`` writes a part of it
- "fsync", "truncate": path, descriptor
- "mkdir", "unlink", "rmdir": path
- "rename": path, target
"""
WRITES = {"w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND, "r": 0}


class _Raw(io.FileIO):
    def __init__(self, path: str, mode: str, watch: Watch) -> None:
        super().__init__(path, mode)
        self.path, self.watch = path, watch

    def write(self, content: Any) -> int:
        whole, write = bytes(content), super().write

        def act(part: bytes = whole) -> int:
            return write(part)

        return self.watch("write", act, self.path, self.fileno(), whole)

    def truncate(self, size: int | None = None) -> int:
        return self.watch("truncate", lambda: super(_Raw, self).truncate(size), self.path, self.fileno())


def _opened(path: str, mode: str, watch: Watch, encoding: Any, errors: Any, newline: Any) -> Any:
    kind = mode.replace("b", "").replace("t", "")
    flags = WRITES[kind[0]] | (os.O_RDWR if "+" in kind else os.O_RDONLY if kind == "r" else os.O_WRONLY)
    raw = watch("open", lambda: _Raw(path, kind, watch), path, flags)
    buffer = {"r": io.BufferedReader, "+": io.BufferedRandom}.get(kind[-1], io.BufferedWriter)(raw)
    return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding or "utf-8", errors, newline)


@contextmanager
def watched(root: Path, watch: Watch) -> Iterator[None]:
    """Within the block, calls for ``root`` and what is below it go through ``watch``; only what Python itself calls."""
    below = f"{root}{os.sep}"
    real_open, os_open = builtins.open, os.open

    def inside(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and f"{os.fsdecode(path)}{os.sep}".startswith(below)

    def open_(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if inside(file):
            return _opened(os.fsdecode(file), mode, watch, encoding, errors, newline)
        return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)

    def open_descriptor(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def act() -> int:
            return os_open(path, flags, mode, dir_fd=dir_fd)

        return watch("open", act, os.fsdecode(path), flags) if inside(path) else act()

    def simple(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            def act() -> Any:
                return real(path, *arguments, **named)

            more = [os.fsdecode(argument) for argument in arguments[:1]] if name == "rename" else []
            return watch(name, act, os.fsdecode(path), *more) if inside(path) else act()

        return call

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if inside(path):
            watch("fsync", lambda: real_fsync(descriptor), path, descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(os, "open", open_descriptor)
        patch.setattr(os, "fsync", fsync)
        for owner in ("replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
            name = {"replace": "rename", "remove": "unlink"}.get(owner, owner)
            patch.setattr(os, owner, simple(name, getattr(os, owner)))
        patch.setattr(shutil, "_use_fd_functions", False)  # or rmtree names files by a descriptor of their folder
        yield
