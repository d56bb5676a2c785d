"""Lets every call for a file fail once: a command ends in one line, and repeated it ends with the same bits."""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import file_operations
import pytest

SOME = pytest.mark.parametrize("some", [3, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
ERRORS, SHORT = ("EIO", "ENOSPC", "EDQUOT", "EINTR"), "short write"
COUNTED = ("open", "write", "fsync", "mkdir", "rename")
PASSING = ("*.log", "manifest.json", ".heartbeat.json*", ".lock", "cost.json", "options.json", "run.yaml")
"""Of a run's files, those with times or paths."""


@dataclass
class Failing:
    """Lets the call number ``at`` fail, or none. sites: from where in the package each was called."""

    at: int = -1
    error: str = ""
    sites: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, name: str, act: Callable[..., Any], path: str, *more: Any) -> Any:
        if name not in COUNTED:
            return act()
        self.sites.append((name, *site()))
        if len(self.sites) - 1 != self.at:
            return act()
        if self.error == SHORT:
            return act(more[1][: len(more[1]) // 2 or 1]) if name == "write" else act()
        number = getattr(errno, self.error)
        raise OSError(number, os.strerror(number), path)


def site() -> Iterator[str]:
    """The lines of the package that led here."""
    frame = sys._getframe(2)
    while frame is not None:
        if f"{os.sep}cnext{os.sep}" in frame.f_code.co_filename:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back


@dataclass
class Command:
    """What is done again and again. begin: makes the folder as it is before.  call: returns the exit status."""

    folder: Path
    begin: Callable[[], None]
    call: Callable[[], int]

    def once(self, failing: Failing) -> int:
        with file_operations.watched(self.folder, failing):
            return self.call()

    def files(self) -> dict[str, bytes]:
        found = [path for path in self.folder.rglob("*") if path.is_file()]
        kept = [path for path in found if not any(path.match(pattern) for pattern in PASSING)]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in kept}


def fails_once(command: Command, capsys: pytest.CaptureFixture[str], some: int | None) -> int:
    """Lets calls fail, one each time: some by chance, or one of every two lines of the package that lead to one.

    Returns: how many lines there are.
    """
    command.begin()
    counted = Failing()
    assert command.once(counted) == 0, capsys.readouterr()
    expected, draw = command.files(), random.Random(0)
    places = {sites[:3]: at for at, sites in enumerate(counted.sites)}
    chosen = [(at, ERRORS[turn % len(ERRORS)]) for turn, at in enumerate(places.values())]
    chosen += [(at, SHORT) for (name, *_), at in places.items() if name == "write"]
    for at, error in chosen if some is None else draw.sample(chosen, some):
        what = f"{error} at {counted.sites[at]}"
        command.begin()
        capsys.readouterr()
        status = command.once(Failing(at, error))
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said, what
        if status:
            assert status in (1, 2), what
            assert said.strip(), what
            assert command.once(Failing()) == 0, (what, capsys.readouterr())
        found = command.files()
        unlike = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        assert not unlike, (what, [(name, expected.get(name), found.get(name)) for name in unlike])
    return len(places)
