"""The benchmarks run as the README says, where the libraries of the tests are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from waiting import outputs

ROOT = Path(__file__).parents[1]


def test_they_are_measured() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-k", "answers_at_once"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ((said, _),) = outputs([child])
    assert child.returncode == 0, said
    assert re.search(r"benchmark: \d+ tests", said)
    assert re.search(r"[1-9]\d* passed", said)
