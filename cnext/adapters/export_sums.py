"""Checksums of an export: files that were changed, left behind or of two exports are refused where it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from cnext.errors import UserError, listed
from cnext.records import Record, RelativePath, read
from cnext.regular_files import require_regular

FILE = "checksums.json"
EDITED = ("README.md",)
"""People write more into a card, and nothing is read from it."""
DELETED = ("reference.json",)
"""What may be deleted, to read the adapter without comparing logits."""
ADVICE = f"copy the whole export again, or delete {FILE} to read it as it is"


class Sums(Record):
    """checksums.json. files: name within the folder to SHA-256."""

    files: dict[str, str]


def of_file(file: Path) -> str:
    """SHA-256 of a file."""
    require_regular(file)
    found = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(2**20):
            found.update(block)
    return found.hexdigest()


def of_folder(folder: Path) -> Sums:
    """The checksums of the files in a folder and its subfolders."""
    there = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in EDITED)
    return Sums({path.relative_to(folder).as_posix(): of_file(path) for path in there})


def check(folder: Path, of_file: Callable[[Path], str] = of_file) -> None:
    """Compares the files of an export with its checksums; an export of an earlier version has none.

    Args:
        of_file: gives the SHA-256 of a file.

    Raises:
        UserError: a file is missing or has changed since; all are named.
    """
    if not (folder / FILE).is_file():
        return
    files = read(folder / FILE, Sums, ADVICE).files
    if strange := [name for name in files if not RelativePath.fits(name)]:
        raise UserError(f"{folder / FILE}: expected names of files in its folder, found {listed(strange)}; {ADVICE}")
    missing = [name for name in files if not (folder / name).is_file()]
    changed = [name for name, sum in files.items() if name not in missing and of_file(folder / name) != sum]
    missing = [name for name in missing if name not in DELETED]
    kinds = (("missing", missing), ("not those of this export", changed))
    if problems := [f"{what}: {listed(names)}" for what, names in kinds if names]:
        raise UserError(f"{folder} is not as it was exported: {'; '.join(problems)}; {ADVICE}")
