"""Files of a run folder as a run would have written them with other values: with the seal of their run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cnext.runs import seals


def write(path: Path, values: Any) -> None:
    """Writes a JSON file with the seal of the run whose config.json is beside it, or of its own."""
    path.write_text(json.dumps(seals.sealed(values, path.name, _run(path.parent, values))))


def change(path: Path, **changes: object) -> None:
    """Changes values of a JSON file, and its seal accordingly."""
    write(path, json.loads(path.read_text()) | changes)


def _run(folder: Path, values: Any) -> str | None:
    config = folder / seals.CONFIG
    found = json.loads(config.read_text()) if config.is_file() else values
    return found.get(seals.SEAL, {}).get("run")
