"""Wait for child processes by processor time, not by the clock: a slow child on a loaded machine is not a hang."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil

IDLE = 120.0
"""Seconds without progress after which processes count as hanging."""
LEAST = 0.02
"""Fraction of that time that must be spent computing: more than a process that polls."""
MOST = 1200.0
"""Seconds of processor time after which processes are in a loop: many times what any test needs."""


def processor_time(pids: Sequence[int]) -> float:
    """Seconds that these processes and their descendants have computed, those that have ended included.

    Without those, a process that starts many short ones would seem to make no progress.
    """
    total = 0.0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    times = one.cpu_times()
                    total += times.user + times.system + times.children_user + times.children_system
    return total


class Hanging(AssertionError):
    """Processes that make no progress, or do not end."""


class Patience:
    """Raises `Hanging` once processes have computed next to nothing for ``IDLE`` seconds, or more than ``MOST``.

    Processor time goes on as slowly as a machine is loaded, and stops where a process waits for what never comes.
    """

    def __init__(self, pids: Sequence[int], idle: float = IDLE, most: float = MOST) -> None:
        self.pids, self.idle, self.most = pids, idle, most
        self.used, self.since = 0.0, time.monotonic()

    def look(self) -> None:
        used = processor_time(self.pids)
        if used > self.most:
            raise Hanging(f"processes {self.pids} have computed {used:.0f} s and do not end")
        if used < self.used or used - self.used > LEAST * self.idle:
            self.used, self.since = used, time.monotonic()
        elif (idle := time.monotonic() - self.since) > self.idle:
            raise Hanging(f"processes {self.pids} have made no progress for {idle:.0f} s")


def until(done: Callable[[], bool], pids: Sequence[int]) -> None:
    """Waits until ``done``, as long as the processes make progress."""
    patience, looks = Patience(pids), 0
    while not done():
        time.sleep(0.002)
        looks += 1
        if looks % 250 == 0:
            patience.look()


def outputs(children: Sequence[subprocess.Popen[str]], idle: float = IDLE, most: float = MOST) -> list[tuple[str, str]]:
    """Standard output and error of each child, once all have ended. Children that hang are killed, and `Hanging` raised
    with what they said."""
    patience, said = Patience([child.pid for child in children], idle, most), {}
    try:
        while len(said) < len(children):
            for child in children:
                if child not in said:
                    with suppress(subprocess.TimeoutExpired):
                        said[child] = child.communicate(timeout=0.5)
            patience.look()
    except Hanging as error:
        for child in children:
            child.kill()
        texts = [text or "" for child in children for text in (said.get(child) or child.communicate())]
        raise Hanging(f"{error}; they said:\n" + "\n".join(texts)[-4000:]) from None
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [(out or "", err or "") for out, err in (said[child] for child in children)]
