"""Reasons why a part of the compiled core is missing, and the remedy."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from cnext.errors import parse_json

PACKAGE = Path(__file__).resolve().parents[1]
REMEDIES = {
    "cpp": "install a C++17 compiler, then cnext again",
    "cuda": "install a CUDA toolkit of version 12.1 or newer, then cnext again with CNEXT_CUDA=1",
    "triton": "install cnext again",
}


def without(part: str) -> str:
    """Why a part ("cpp", "cuda", "triton") is missing, and the remedy."""
    record = PACKAGE / "_build.json"
    if record.is_file():  # by setup.py
        left_out = parse_json(record.read_bytes())["left_out"]
        why = left_out.get(part, "its module is gone, or is one for another Python")
        return f"cnext was built without it: {why}; {REMEDIES[part]}"
    tree = PACKAGE.parent
    if not (tree / "csrc").is_dir():
        return f"cnext was built without it; {REMEDIES[part]}"
    found = f"this is the source tree in {tree}, imported without being installed, and nothing in it is compiled"
    compiles = f"pip install -e {tree}"
    if (other := installed()) is None:
        return f"{found}; `{compiles}` compiles it"
    return f"{found}; cnext is installed in {other}: run from another folder or with python -P, or `{compiles}`"


def installed() -> Path | None:
    """The folder of another installed cnext than this one; None where there is none."""
    for distribution in importlib.metadata.distributions(name="cnext"):
        package = Path(str(distribution.locate_file("cnext")))
        if (package / "__init__.py").is_file() and package.resolve() != PACKAGE:
            return package
    return None
