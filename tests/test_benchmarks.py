"""The benchmarks run as the README says, where the libraries of the tests are installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_they_are_measured() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", "-k", "answers_at_once"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"benchmark: \d+ tests", done.stdout)
    assert re.search(r"[1-9]\d* passed", done.stdout)
