"""Handle SIGTERM and the interrupt key: stop between two optimizer steps, after saving a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from cnext.errors import RESUME

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """The program has stopped because of a signal, and everything finished is saved. status: the exit status."""

    def __init__(self, number: signal.Signals, where: str = "everything finished is saved") -> None:
        super().__init__(f"stopped by {number.name}: {where}; {RESUME}")
        self.status = 0 if number == signal.SIGTERM else 130

    def _render_traceback_(self) -> list[str]:
        """What IPython and notebooks show, instead of where in the code the signal came."""
        return [f"{type(self).__name__}: {self}"]


@contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM is as the interrupt key, for commands that save as they go."""

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt("stopped by SIGTERM; the same command continues from what was saved")

    main = threading.current_thread() is threading.main_thread()
    default = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if default:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Stop:
    """Context in which SIGTERM and the interrupt key raise `Stopped`: at once, or inside `deferred` at `check`.

    A second press of the interrupt key raises KeyboardInterrupt at once. A signal that was ignored before stays
    ignored. Outside the main thread, which alone receives signals in Python, nothing changes.

    Attributes:
        requested: the first signal received, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferred, self._process = False, os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker ends with this process.
            return
        received = signal.Signals(number)
        if self.requested is not None:
            if received == signal.SIGINT:
                raise KeyboardInterrupt(f"interrupted twice, left at once; {RESUME}")
            return
        self.requested = received
        if not self._deferred:
            raise Stopped(received)
        if received == signal.SIGINT:
            # Not print, which the signal may have interrupted. The stream may be closed.
            with suppress(OSError):
                os.write(2, b"SIGINT: saving at the end of this step; interrupt again to leave at once\n")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which a signal raises only at `check` and at the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self, *where: str) -> None:
        """Raises Stopped if a signal has been received. where: what is saved, and how far."""
        if self.requested is not None:
            raise Stopped(self.requested, *where)
