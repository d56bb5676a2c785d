"""Copies of the toy suite with another budget, and the rows of a run's logs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def copy_suite(toy_suite: Path, folder: Path, **budget: object) -> Path:
    """The toy suite in a new folder, with other values in its budget."""
    shutil.copytree(toy_suite, folder)
    manifest = json.loads((folder / "suite.json").read_text())
    manifest["budgets"]["default"] |= budget
    (folder / "suite.json").write_text(json.dumps(manifest))
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
