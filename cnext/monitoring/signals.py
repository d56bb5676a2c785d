"""Stopping from outside: SIGTERM and the interrupt key are obeyed between two steps, when what is done is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from cnext.errors import GO_ON

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Told to stop, the program has stopped, and all that was finished is saved. status: what to exit with."""

    def __init__(self, number: signal.Signals, where: str = "all that was finished is saved") -> None:
        super().__init__(f"stopped by {number.name}: {where}; {GO_ON}")
        self.status = 0 if number == signal.SIGTERM else 130


class Stop:
    """While entered, SIGTERM and the interrupt key raise `Stopped`: at once, or inside `held` when `check` is called.

    The interrupt key pressed again raises KeyboardInterrupt wherever the program is. A signal that was ignored before
    stays ignored, and outside the main thread, where Python hears none, nothing changes.

    requested: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._held, self._process = False, os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _hear(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker forked from this process: it ends with what it works for.
            return
        heard = signal.Signals(number)
        if self.requested is not None:
            if heard == signal.SIGINT:
                raise KeyboardInterrupt(
                    "interrupted again: left at once; the same command goes on after the last block"
                )
            return
        self.requested = heard
        if not self._held:
            raise Stopped(heard)
        if heard == signal.SIGINT:
            # Not print, which the signal may have interrupted. Perhaps nobody reads it any more.
            with suppress(OSError):
                os.write(
                    2, f"{heard.name}: saving at the end of this step; interrupt again to leave at once\n".encode()
                )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, only `check` obeys a signal, and so does the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def check(self, *where: str) -> None:
        """Raises Stopped where a signal has come. where: what is saved, and how far."""
        if self.requested is not None:
            raise Stopped(self.requested, *where)
