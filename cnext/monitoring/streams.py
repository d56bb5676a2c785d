"""Standard streams that tolerate a closed pipe, as in ``cnext list | head -1``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Outliving:
    """A standard stream that outlives its reader: what is written when nobody reads any more goes nowhere."""

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
        if self._error is not None:  # of a write, after which argparse goes on
            raise self._error

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What waits in the buffer would fail again when the interpreter exits, which then complains of it.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not isinstance(error, BrokenPipeError):
                self._error = error
                raise


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside, standard output and error outlive their readers: a verb, or a run of hours, does its work to the end."""
    before = sys.stdout, sys.stderr
    # A stream that was closed when Python started is None.
    sys.stdout, sys.stderr = (stream and Outliving(stream) for stream in before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
