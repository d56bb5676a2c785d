"""An audit hook that reports file access outside of a folder, and bounds of memory and time."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cnext
from cnext.errors import UserError

EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "os.rename", "shutil.rmtree"}
OURS = [*{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}, "/proc", "/dev", "/sys"]
"""Folders that the interpreter and the libraries read."""
_watching: list[Guard] = []


class Guard:
    """Runs a function and returns whether it succeeded (and raised no UserError); fails on access to other files.

    Args: given: the folder that may be read and written.
    """

    def __init__(self, given: Path) -> None:
        # Entry points are searched wherever modules are.
        places = (*OURS, Path(cnext.__file__).parent, sys.prefix, *filter(None, sys.path))
        installed = [os.path.realpath(path) for path in places]
        self.allowed = (os.path.realpath(given), *installed)
        self.strayed: list[str] = []

    def __call__(self, work: Callable[[], object]) -> bool:
        _watching.append(self)
        try:
            work()
            taken = True
        except UserError:
            taken = False
        finally:
            _watching.remove(self)
        strayed, self.strayed = self.strayed, []
        assert not strayed, strayed
        return taken

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Records a path outside."""
        for path in arguments[: 2 if event == "os.rename" else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.fsdecode(path))
                if not any(real == folder or real.startswith(folder + os.sep) for folder in self.allowed):
                    self.strayed.append(f"{event} {real}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in EVENTS:
        _watching[-1].look(event, arguments)


sys.addaudithook(_hook)


@contextmanager
def bounded(megabytes: int = 300, seconds: float = 20) -> Iterator[None]:
    """Fails where a block takes more memory than what was there before it, or more time."""
    start, before = time.monotonic(), _megabytes("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    yield
    assert _megabytes("VmHWM") - before < megabytes
    assert time.monotonic() - start < seconds


def _megabytes(name: str) -> float:
    """A line of this process's status in Linux; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
