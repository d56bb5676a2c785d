"""Make tests and benchmarks import the installed cnext (with -e: this tree), from whatever folder they start.

``python -m pytest`` here, or a PYTHONPATH, would put this folder first: nothing in it is compiled, so they would run on
plain torch, and on other code than what is installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def elsewhere(folder: str) -> bool:
    return Path(folder or ".").resolve() != ROOT


sys.path[:] = filter(elsewhere, sys.path)
if "PYTHONPATH" in os.environ:  # of the processes that tests start
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(elsewhere, os.environ["PYTHONPATH"].split(os.pathsep)))
if importlib.util.find_spec("cnext") is None:
    advice = "pip install '.[test]', or pip install -e '.[test]' to work on it"
    sys.exit(f"cnext is not installed in {sys.prefix}: {advice}")
