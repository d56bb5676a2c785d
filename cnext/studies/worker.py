"""Entry point of the process that a launcher starts for one run."""

from __future__ import annotations

import faulthandler
import signal

from cnext.monitoring.streams import escape_unencodable
from cnext.runs import command_line
from cnext.studies import local


def main(path: str) -> int:
    """Executes the run whose options are in a file. Returns the exit status."""
    # The study handles SIGINT, and stops this process by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    escape_unencodable()
    return local.run_logged(command_line.read(path), lambda event: None)
