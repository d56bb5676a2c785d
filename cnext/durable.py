"""Files and folders that are there whole or not at all, also after a power cut, and while several processes write them.

What is written gets a temporary name of its own, beginning with a dot, and is locked while it is written: what a
process that has died leaves behind is unlocked, and removed by the next that writes the same file or folder. A file is
on the disk once it and its folder have been synced; see fsync(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED, REPLACED = ".unfinished", ".replaced"
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.unfinished")
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)
"""Errors of file systems that cannot sync a folder, and of folders that may be written but not read."""


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """As `sync`, of a folder and everything in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def still_there(path: Path, opened_as: int) -> bool:
    """Whether a path leads to the file that is open as this descriptor, which may have been moved or deleted."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened_as))
    except OSError:
        return False


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, unless it is there."""
    missing = [each for each in folder.parents if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # Also where it was there: the process that made it may have ended before this.
    for each in (folder, *missing):
        sync(each.parent)


def put(path: Path, content: bytes) -> None:
    """Writes a file that nobody else sees yet, and that `sync` has to follow."""
    with open(path, "wb") as file:
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Adds to a file, which is made if it is missing; the addition is on the disk when this returns."""
    new = not path.exists()
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Writes a file in place of the one that is there."""
    write_all(path.parent, [(path.name, content)])


def write_all(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes several files into a folder, each as `write` does, and syncs the folder once."""
    _remove_leftovers(folder)
    for name, content in files:
        with _own(folder / name) as unfinished:
            put(unfinished, content)
            sync(unfinished)
            os.replace(unfinished, folder / name)
    sync(folder)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` at the end of the block, or is removed if that raises."""
    _remove_leftovers(path.parent)
    with _own(path) as unfinished:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    sync(path.parent)


@contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes ``folder`` at the end of the block, or is removed if that raises.

    Args:
        replace: takes the place of a folder with files too; in between `restore` finds that one.
    """
    make_folder(folder.parent)
    _remove_leftovers(folder.parent)
    with _own(folder, is_folder=True) as unfinished:
        yield unfinished
        sync_all(unfinished)
        old = _temporary(folder, REPLACED) if replace and folder.exists() else None
        if old:
            os.rename(folder, old)
        try:
            os.rename(unfinished, folder)
            sync(folder.parent)
        except OSError:
            # As before, so that the same command is not refused because of a folder that is there.
            if not unfinished.exists():
                os.rename(folder, unfinished)
            if old:
                os.rename(old, folder)
            raise
    if old:
        shutil.rmtree(old)


def restore(within: Path) -> None:
    """Puts folders back that `new_folder` was replacing when its process ended. For one process at a time."""
    for old in sorted(within.glob(f".*{REPLACED}")):
        folder = within / old.name[1 : -len(REPLACED)].rpartition(".")[0]
        if not folder.exists():
            os.rename(old, folder)


def discard(folder: Path) -> None:
    """Removes a folder; it is hidden before it is incomplete."""
    hidden = _temporary(folder, UNFINISHED)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _temporary(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{ending}")


@contextmanager
def _own(path: Path, is_folder: bool = False) -> Iterator[Path]:
    """A new file or folder under a temporary name, locked; removed at the end of the block if it is still there."""
    while True:
        unfinished = _temporary(path, UNFINISHED)
        if is_folder:
            unfinished.mkdir()
        # Another process may remove it until it is locked.
        with suppress(FileNotFoundError):
            lock = os.open(unfinished, os.O_RDONLY | (0 if is_folder else os.O_CREAT | os.O_EXCL), 0o666)
            with suppress(OSError):  # a file system without locks, where no leftovers are removed either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)
    try:
        yield unfinished
    finally:
        with suppress(OSError):
            _remove(unfinished)
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that have died were writing into a folder; those that live hold a lock."""
    for name in filter(_LEFTOVER.fullmatch, os.listdir(folder)):
        with suppress(OSError):
            lock = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder / name)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
