"""Folders in the cache: put there whole, and made good where a file in one has changed since."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from cnext.errors import UserError, listed, parse_json

MANIFEST = "manifest.json"
"""SHA-256 over the names and the content of all other files of a folder."""


def digest(folder: Path) -> str:
    """SHA-256 over the names and the bytes of all files in a folder, without its manifest."""
    found = hashlib.sha256()
    for name in _files(folder):
        found.update(f"{name}\n{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def seal(folder: Path) -> None:
    """Writes the manifest."""
    (folder / MANIFEST).write_text(json.dumps({"sha256": digest(folder)}) + "\n", encoding="utf-8")


def intact(folder: Path) -> bool:
    """Whether a folder has the files of its manifest, and no others."""
    try:
        return parse_json((folder / MANIFEST).read_bytes()) == {"sha256": digest(folder)}
    except (OSError, ValueError):
        return False


def place(fresh: Path, folder: Path) -> None:
    """Moves a finished folder to its place. Where one is there, its files that differ are replaced, and named.

    One by one, so that another process that reads the folder, or does the same, never sees half of one.

    Raises:
        UserError: a file cannot be replaced.
    """
    try:
        os.rename(fresh, folder)
        return
    except OSError:
        if not folder.is_dir():
            raise
    wanted, changed = _files(fresh), []
    try:
        for name in wanted:
            content, file = (fresh / name).read_bytes(), folder / name
            if not file.is_file() or file.read_bytes() != content:
                changed.append(name)
                file.parent.mkdir(parents=True, exist_ok=True)
                os.replace(fresh / name, file)
        for name in sorted({*_files(folder)} - {*wanted}):
            changed.append(name)
            (folder / name).unlink(missing_ok=True)
        if (fresh / MANIFEST).is_file():
            os.replace(fresh / MANIFEST, folder / MANIFEST)
    except OSError as error:
        raise UserError(
            f"the cached data in {folder} have changed and cannot be made anew: {error}; delete it"
        ) from error
    if changed:
        print(f"the cached data in {folder} had changed; made anew: {listed(changed)}", file=sys.stderr)


def _files(folder: Path) -> list[str]:
    """The files in a folder and those below it, sorted, without its manifest and hidden files."""
    files = [(where, name) for where, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    found = [os.path.relpath(os.path.join(where, name), folder) for where, name in files]
    return sorted(name for name in found if name != MANIFEST)
