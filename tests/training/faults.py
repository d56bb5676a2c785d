"""Runs with a fault injected at a chosen event, each in a process forked from one with everything loaded.

Events: a file about to be written, half of it written, a rename, a removal, a step, an answer.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from training.toy import shallow
from waiting import until

from cnext import RunConfig, cli, durable, report
from cnext.backbones.tiny.model import TinyBackbone
from cnext.training import runner
from cnext.training.trainer import StepLog, TaskTrainer

KILL, TERM, INTERRUPT, TWICE = "SIGKILL", "SIGTERM", "SIGINT", "SIGINT twice"
FULL, MEMORY = "full disk", "out of memory"
STATUS = {KILL: -signal.SIGKILL, TERM: 0, INTERRUPT: 130, FULL: 2, MEMORY: 2}
WRITES, COMPUTES = ("half", "write"), ("step", "answer")
NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)
"""Errors of torch on a GPU, of torch on a CPU, and of Python."""


class Fault:
    """Counts events, and ends the run at the given one, or at the next one of which the kind of fault is possible."""

    def __init__(self, kind: str | None, moment: int) -> None:
        self.kind, self.moment, self.events = kind, moment, 0

    def event(self, name: str) -> None:
        self.events += 1
        fits = {FULL: WRITES, MEMORY: COMPUTES, TWICE: ("step",)}.get(self.kind or "", (name,))
        if self.kind is None or self.events < self.moment or name not in fits:
            return
        kind, self.kind = self.kind, None
        if kind in (KILL, TERM, INTERRUPT):
            os.kill(os.getpid(), getattr(signal, kind))
        elif kind == TWICE:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        elif kind == FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
        else:
            raise NO_MEMORY[self.moment % len(NO_MEMORY)]


def _watch(fault: Fault, work: Path) -> None:
    """Patches the events into this process, and logs every step done in the file ``work``."""

    def before(owner: Any, name: str, event: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            fault.event(event)
            return original(*arguments, **named)

        setattr(owner, name, watched)

    def halves(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(path: Path, content: bytes) -> None:
            fault.event("write")
            half = len(content) // 2
            original(path, content[:half])
            fault.event("half")
            return original(path, content if name == "put" else content[half:])

        setattr(owner, name, watched)

    for name in ("put", "append"):
        halves(durable, name)
    for name in ("replace", "rename"):
        before(os, name, "move")
    before(shutil, "rmtree", "remove")
    before(TinyBackbone, "generate", "answer")
    step = TaskTrainer.train_step

    def logged(self: TaskTrainer) -> StepLog:
        fault.event("step")
        log = step(self)
        with open(work, "a") as file:
            file.write(f"{self.seed[1]} {self.step}\n")
        fault.event("step")
        return log

    TaskTrainer.train_step = logged


def _child(config: RunConfig, kind: str | None, moment: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.out.mkdir(parents=True, exist_ok=True)
    with open(config.out / "said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    # The report takes longer than the run, and is written last.
    report.write_report = lambda run: (run / "report.html", run / "report.md")
    TinyBackbone.load = shallow(TinyBackbone.load)
    fault = Fault(kind, moment)
    _watch(fault, config.out / "work")
    status = cli._exit_status([], lambda: runner.run(config) and None)
    (config.out / "events").write_text(str(fault.events))
    sys.exit(status)


@cache
def _server() -> BaseContext:
    """The process to fork from. Its own imports see PYTHONPATH and not this process's sys.path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def go(config: RunConfig, kind: str | None = None, moment: int = 0) -> tuple[int, str]:
    """(exit status, what was said) of a run with a fault of this kind at this moment."""
    process = _server().Process(target=_child, args=(config, kind, moment))
    process.start()
    assert process.pid is not None
    until(lambda: process.exitcode is not None, [process.pid])
    return process.exitcode, (config.out / "said").read_text()


def damage(path: Path, place: float, cut: bool) -> None:
    """Cuts a file short at a share of its length, or flips a bit there."""
    content = bytearray(path.read_bytes())
    at = int(place * (len(content) - 1))
    if cut:
        content = content[:at]
    else:
        content[at] ^= 1 << at % 8
    path.write_bytes(content)
