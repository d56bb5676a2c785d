"""Images that rows hold as bytes, kept as files in the cache, since models, reports and the judge read files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"RIFF": ".webp"}
"""Of files that begin so; others have none. `cnext.image_files` goes by the content."""


def cache() -> Path:
    """Folder of generated suites and kept images: $CNEXT_CACHE, else $XDG_CACHE_HOME/cnext, else ~/.cache/cnext."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CNEXT_CACHE") or Path(base) / "cnext")


@dataclass(frozen=True)
class ImageBytes:
    """An image in a row of a table: the bytes of its file, and the name that the table has for it, or "".

    Example:
        >>> row["image"].file()
        PosixPath('/home/me/.cache/cnext/images/3f/3fa9....png')
    """

    content: bytes
    name: str = ""

    def file(self) -> Path:
        """The file with these bytes in the cache, named by their SHA-256; it is written unless it is there whole."""
        digest = hashlib.sha256(self.content).hexdigest()
        suffix = next((suffix for start, suffix in _SUFFIXES.items() if self.content.startswith(start)), "")
        suffix = ".wav" if self.content[8:12] == b"WAVE" else suffix
        path = cache().absolute() / "images" / digest[:2] / f"{digest}{suffix}"
        if path.is_file() and path.read_bytes() == self.content:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(self.content)
            os.chmod(unfinished, 0o644)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
        return path
