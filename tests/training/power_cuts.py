"""What a disk may hold after a power cut: states of a folder in which some of the recorded operations are lost.

Entries of folders and contents of files are apart, as on a disk: an operation on an entry is certain once its folder is
synced, a write once its file is.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DOZEN = 12
IGNORED = re.compile(r"/(\.heartbeat\.json.*|run\.log|\.lock)$")
"""Files that say how far a run is, and that nothing else depends on."""


@dataclass(frozen=True)
class Operation:
    """What changed. inode: of the folder with the entry, or of the file.

    what: "link" (an entry ``name`` of ``target``), "unlink", "rename" (of ``source``, a folder and a name, to ``name``
    of ``target``), "write" (``content`` at ``offset``), "truncate" (to ``offset``), "fsync", or
    "mark" (nothing; ``marked`` is done).
    """

    what: str
    inode: int
    name: str = ""
    target: int = 0
    source: tuple[int, str] = (0, "")
    offset: int = 0
    content: bytes = b""
    marked: tuple[Any, ...] = ()


@dataclass
class Disk:
    """Folders by inode, each inodes by name; and contents of files by inode. Folder 0 is the root."""

    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    files: dict[int, bytes] = field(default_factory=dict)

    def apply(self, one: Operation) -> None:
        entries = self.folders.setdefault(one.inode, {}) if one.what in ("link", "unlink", "rename") else {}
        if one.what == "link":
            entries[one.name] = one.target
        elif one.what == "unlink":
            entries.pop(one.name, None)
        elif one.what == "rename":
            folder, name = one.source
            before = self.folders.setdefault(folder, {})
            if before.get(name) == one.target:
                del before[name]
            entries[one.name] = one.target
        elif one.what == "write":
            before = self.files.get(one.inode, b"")
            start = before[: one.offset].ljust(one.offset, b"\0")
            # The same object where that is all, whose hash Python keeps.
            self.files[one.inode] = b"".join([start, one.content, before[one.offset + len(one.content) :]])
        elif one.what == "truncate":
            self.files[one.inode] = self.files.get(one.inode, b"")[: one.offset].ljust(one.offset, b"\0")

    def tree(self, directories: set[int], folder: int = 0, at: str = "") -> Iterator[tuple[str, bytes | None]]:
        """Every path and its content, of folders None, each folder before what is in it."""
        for name, inode in sorted(self.folders.get(folder, {}).items()):
            path = f"{at}{name}"
            if inode in directories:
                yield path, None
                yield from self.tree(directories, inode, f"{path}/")
            else:
                yield path, self.files.get(inode, b"")


class Journal:
    """The operations below a folder, recorded by `file_operations.watched`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[Operation] = []
        self.directories = {0}
        self._entries: dict[str, int] = {"": 0}
        self._inodes: dict[int, int] = {}
        """By the system's number, which it gives again once a file is gone."""
        self.made = 0

    def mark(self, name: str, *what: Any) -> None:
        self.operations.append(Operation("mark", 0, name, marked=what))

    def adopt(self, other: Journal, disk: Disk) -> None:
        """Begins with the operations of another journal, after which the folder was as ``disk``."""
        self.operations, self.directories = list(other.operations), set(other.directories)
        self.made = other.made
        self._adopt(disk, 0, "")

    def _adopt(self, disk: Disk, folder: int, at: str) -> None:
        for name, inode in disk.folders.get(folder, {}).items():
            path = f"{at}{name}"
            self._entries[path] = inode
            self._inodes[os.stat(self.root / path).st_ino] = inode
            if inode in self.directories:
                self._adopt(disk, inode, f"{path}/")

    def inode(self, path: str) -> int:
        """The one that a path has now."""
        return self._entries[path]

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)

    def _place(self, path: str) -> tuple[int, str]:
        folder, _, name = self._relative(path).rpartition("/")
        return self._entries[folder], name

    def _new(self, path: str) -> int:
        self.made += 1
        self._entries[self._relative(path)] = self.made
        self._inodes[os.stat(path).st_ino] = self.made
        self.operations.append(Operation("link", *self._place(path), target=self.made))
        return self.made

    def __call__(self, name: str, act: Callable[..., Any], path: str, *more: Any) -> Any:
        return act() if IGNORED.search(path) else getattr(self, f"_{name}")(act, path, *more)

    def _open(self, act: Callable[[], Any], path: str, flags: int) -> Any:
        new, size = not os.path.exists(path), os.path.exists(path) and os.path.getsize(path)
        opened = act()
        if new:
            self._new(path)
        elif flags & os.O_TRUNC and size:
            self.operations.append(Operation("truncate", self._entries[self._relative(path)]))
        return opened

    def _write(self, act: Callable[[], int], path: str, descriptor: int, content: bytes) -> int:
        count = act()
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        inode = self._inodes[os.fstat(descriptor).st_ino]
        self.operations.append(Operation("write", inode, offset=end - count, content=content[:count]))
        return count

    def _truncate(self, act: Callable[[], int], path: str, descriptor: int) -> int:
        size = act()
        self.operations.append(Operation("truncate", self._inodes[os.fstat(descriptor).st_ino], offset=size))
        return size

    def _fsync(self, act: Callable[[], None], path: str, descriptor: int) -> None:
        number = os.fstat(descriptor).st_ino
        root = number == os.stat(self.root).st_ino
        self.operations.append(Operation("fsync", 0 if root else self._inodes[number]))

    def _mkdir(self, act: Callable[[], None], path: str) -> None:
        act()
        self.directories.add(self._new(path))

    def _unlink(self, act: Callable[[], None], path: str) -> None:
        act()
        self.operations.append(Operation("unlink", *self._place(path)))
        del self._entries[self._relative(path)]

    _rmdir = _unlink

    def _rename(self, act: Callable[[], None], path: str, target: str) -> None:
        source, place = self._place(path), self._place(target)
        act()
        old, new = self._relative(path), self._relative(target)
        moved = {name: inode for name, inode in self._entries.items() if f"{name}/".startswith(f"{old}/")}
        for name in moved:
            del self._entries[name]
        self._entries |= {new + name[len(old) :]: inode for name, inode in moved.items()}
        self.operations.append(Operation("rename", *place, target=self._entries[new], source=source))


Cut = tuple[int, list[Operation]]
"""How many operations had been called, and those of them that are on the disk."""


def uncertain(operations: list[Operation], at: int) -> list[int]:
    """Places of the operations before ``at`` that no fsync has made certain."""
    found: dict[int, list[int]] = {}
    for place, one in enumerate(operations[:at]):
        if one.what == "fsync":
            found.pop(one.inode, None)
        elif one.what != "mark":
            found.setdefault(one.inode, []).append(place)
    return sorted(place for places in found.values() for place in places)


def torn(one: Operation, draw: random.Random) -> list[Operation]:
    """What may be left of an operation: nothing, or of a write a part or zeros."""
    if one.what != "write":
        return []
    part = one.content[: draw.randrange(len(one.content) + 1)]
    return draw.choice([[], [replace(one, content=part)], [replace(one, content=bytes(len(one.content)))]])


def killed(operations: list[Operation], draw: random.Random) -> Iterator[Cut]:
    """SIGKILL after each operation, and within each write: the system keeps what has been called."""
    for at, one in enumerate(operations):
        yield at, operations[:at]
        if one.what == "write":
            yield at, [*operations[:at], replace(one, content=one.content[: len(one.content) // 2])]
    yield len(operations), operations


def journal(operations: list[Operation], draw: random.Random, each: int) -> Iterator[Cut]:
    """An ordered journal: entries up to a moment after the last fsync, which keeps all before it; writes by chance."""
    for at in range(1, len(operations) + 1):
        synced = max((place for place in range(at) if operations[place].what == "fsync"), default=0)
        open_ = {place for place in uncertain(operations, at) if operations[place].what in ("write", "truncate")}
        for _ in range(each):
            until = draw.randint(synced, at)
            kept = []
            for place, one in enumerate(operations[:at]):
                if place not in open_:
                    kept += [one] if place < until else []
                else:
                    kept += [one] if draw.random() < 0.5 else torn(one, draw)
            yield at, kept


def lost(operations: list[Operation], draw: random.Random, each: int, most: int | None) -> Iterator[Cut]:
    """Any of the last ``most`` operations that are not certain are lost; None: of all, which is all that POSIX says."""
    for at in range(1, len(operations) + 1):
        candidates = uncertain(operations, at)
        candidates = candidates if most is None else candidates[-most:]
        for turn in range(min(each, 2 ** len(candidates))):
            share = draw.random() if turn else 1.0
            gone = {place for place in candidates if draw.random() < share}
            kept = []
            for place, one in enumerate(operations[:at]):
                kept += torn(one, draw) if place in gone else [one]
            yield at, kept
