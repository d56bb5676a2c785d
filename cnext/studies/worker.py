"""One run as a process of its own: what a launcher starts, wherever that is."""

from __future__ import annotations

import faulthandler
import signal

from cnext.runs import command_line
from cnext.studies import local


def main(path: str) -> int:
    """Does the run whose options a file has, and says on standard output how it goes on. Returns the exit status."""
    # The interrupt key is the study's to obey: it tells this process to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    return local.perform(command_line.read(path), lambda event: None)
