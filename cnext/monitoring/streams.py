"""Standard streams that tolerate a closed pipe, as in ``cnext list | head -1``, and characters they cannot encode."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class TolerantStream:
    """A standard stream whose output is discarded once its reader has closed the pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._may_fail():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._may_fail():
            self._stream.flush()
        if self._error is not None:  # argparse ignores that of a write
            raise self._error

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffer would fail again when the interpreter exits.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                self._error = error
                raise


def escape_unencodable() -> None:
    """From now on the standard streams escape characters that they cannot encode, as ``\\xb1`` where they are ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def tolerate_closed_pipes() -> Iterator[None]:
    """Context in which a closed pipe at standard output or error does not end the program."""
    before = sys.stdout, sys.stderr
    # A stream that was closed when Python started is None.
    sys.stdout, sys.stderr = (stream and TolerantStream(stream) for stream in before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
