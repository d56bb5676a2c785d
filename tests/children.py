"""The environment of child processes that import from ``tests``."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """This process's, with ``tests`` first in PYTHONPATH. An empty item there would mean the working directory, in a
    checkout the source tree."""
    paths = [str(TESTS), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
