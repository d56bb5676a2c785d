"""One run in several processes, as a launcher starts them, of which one may be ended at a chosen moment."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from training import faults
from waiting import Hanging, until

from cnext import RunConfig, cli, report
from cnext.training import runner


@dataclass(frozen=True)
class End:
    """A fault in one process: its kind, and at which of the events that count. process: its rank."""

    kind: str
    moment: int
    events: tuple[str, ...]
    process: int = 0


class Counted(faults.Fault):
    """Counts events of some names only. here: the fault is in this process."""

    def __init__(self, end: End | None, here: bool) -> None:
        super().__init__(end.kind if end and here else None, end.moment if end else 0)
        self.names = end.events if end else ("step", "answer")
        self.seen: list[str] = []

    def event(self, name: str) -> None:
        self.seen.append(name)
        if name in self.names:
            super().event(name)


@dataclass
class Member:
    """How a process ended. events: how often each event came in it."""

    status: int | None
    said: str
    events: dict[str, int] = field(default_factory=dict)


def _run(config: RunConfig, rank: int, environment: dict[str, str], end: End | None) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(config.out / f"said-{rank}", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    report.write_report = lambda run: (run / "report.html", run / "report.md")
    fault = Counted(end, end is not None and end.process == rank)
    faults._watch(fault, config.out / f"work-{rank}")
    status = cli._exit_status([], lambda: runner.run(config) and None)
    (config.out / f"events-{rank}").write_text("\n".join(fault.seen))
    sys.exit(status)


def go(config: RunConfig, processes: int, end: End | None = None, **environment: str) -> list[Member]:
    """A run in several processes. Those that do not end are killed, and have no status."""
    config.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for number in range(processes):
        own = {"WORLD_SIZE": str(processes), "RANK": str(number), "LOCAL_RANK": str(number)}
        (config.out / f"events-{number}").unlink(missing_ok=True)
        started.append(faults._server().Process(target=_run, args=(config, number, environment | shared | own, end)))
        started[-1].start()
    with suppress(Hanging):
        until(lambda: all(process.exitcode is not None for process in started), [process.pid for process in started])
    found = []
    for number, process in enumerate(started):
        status = process.exitcode
        process.kill()
        file = config.out / f"events-{number}"
        names = file.read_text().split() if file.is_file() else []
        said = (config.out / f"said-{number}").read_text()
        found.append(Member(status, said, {name: names.count(name) for name in set(names)}))
    return found
