"""Why a part of the compiled core is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CURES = {
    "cpp": "install cnext again where a C++17 compiler is at hand",
    "cuda": "install cnext again with CNEXT_CUDA=1 where a CUDA toolkit from 12.1 on is at hand",
    "triton": "install cnext again",
}


def without(part: str) -> str:
    """Why a part ("cpp", "cuda", "triton") is not there, and the cure."""
    record = PACKAGE / "_build.json"
    if record.is_file():  # by setup.py
        left_out = json.loads(record.read_text(encoding="utf-8"))["left_out"]
        why = left_out.get(part, "its module is gone, or is one for another Python")
        return f"cnext was built without it: {why}; {CURES[part]}"
    tree = PACKAGE.parent
    if not (tree / "csrc").is_dir():
        return f"cnext was built without it; {CURES[part]}"
    found = f"this is the source tree in {tree}, imported as it lies there, and nothing in it is compiled"
    compiles = f"pip install -e {tree}"
    if (other := installed()) is None:
        return f"{found}; `{compiles}` compiles it"
    return f"{found}; cnext is installed in {other}: run from another folder or with python -P, or `{compiles}`"


def installed() -> Path | None:
    """Where another cnext than this one is installed; None where there is no other."""
    for distribution in importlib.metadata.distributions(name="cnext"):
        package = Path(str(distribution.locate_file("cnext")))
        if (package / "__init__.py").is_file() and package.resolve() != PACKAGE:
            return package
    return None
