"""Runs a command in several processes, with the environment of a launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from waiting import outputs

CHILD = Path(__file__).with_name("process_child.py")


def start(command: list[str], processes: int = 2, **environment: str) -> list[subprocess.Popen[str]]:
    """The command in several processes with torchrun's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            cwd=CHILD.parent,  # where no source tree of cnext comes before what is installed
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(processes)
    ]


def finish(children: list[subprocess.Popen[str]]) -> list[str]:
    texts = [out for out, _ in outputs(children)]
    assert [child.returncode for child in children] == [0] * len(children), "\n".join(texts)
    return texts
