"""Reads files that users name: regular files alone. A named pipe would be waited for, and a device may have no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LARGEST = 2**28
"""Bytes of a file of settings or results that is read: 256 MiB. More is no such file, and decoded takes much more."""


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raises OSError for what is not there, a link that leads to itself, a folder, pipe, socket or device."""
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(kind):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        found = kinds.get(stat.S_IFMT(kind), "a device")
        raise OSError(errno.EINVAL, f"expected a regular file, found {found}", str(path))


def read_bytes(path: str | os.PathLike[str], largest: int | None = None) -> bytes:
    """The content of a regular file. Raises OSError as `require_regular`, and for more than ``largest`` bytes."""
    require_regular(path)
    if largest is not None and (size := os.stat(path).st_size) > largest:
        raise OSError(errno.EFBIG, f"expected at most {largest:,} bytes, it has {size:,}; put the right file there")
    return Path(path).read_bytes()


def read_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text of a regular file. Raises OSError as `read_bytes`, and UnicodeDecodeError."""
    return read_bytes(path).decode(encoding)
