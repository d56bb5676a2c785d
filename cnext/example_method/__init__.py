"""The example of a method in a package of its own, and its copy under another name: ``cnext new-method NAME``.

The files beside this one are that package: a method, its entry point and its test. They are not imported by cnext.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import tempfile
from pathlib import Path

from cnext.errors import UserError
from cnext.methods import modules

LONGEST = 60
"""Most letters of a name."""
FILES = ("l2_lora.py", "test_l2_lora.py", "pyproject.toml")


def write(name: str, folder: Path | None = None) -> list[Path]:
    """Writes a package with a method of that name: the example, to be changed.

    Args:
        name: of the method, as ``--method`` takes it: lower-case words joined by hyphens.
        folder: a new one; None: the name, in the current folder.

    Returns:
        The files.

    Raises:
        UserError: a name that is no such word or is taken, also by a module, or a folder that is there already.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise UserError(f"expected a name such as my-method, of lower-case letters, digits and hyphens, got {name!r}")
    if len(name) > LONGEST:
        raise UserError(f"expected a name of at most {LONGEST} letters, got {len(name)}: {name}")
    if name in modules():
        raise UserError(f"there is a method {name} already; choose another name")
    folder = Path(name) if folder is None else folder
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it, or name another folder with --out")
    # A folder without __init__.py, such as one in the current folder, has a spec without an origin.
    if (spec := importlib.util.find_spec(module)) and spec.origin:
        raise UserError(f"there is a module {module} already, which {name} would hide; choose another name")
    title = "".join(map(str.capitalize, name.split("-")))
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file in FILES:
            text = (Path(__file__).parent / file).read_text(encoding="utf-8")
            for old, new in (("l2_lora", module), ("l2-lora", name), ("L2Lora", title)):
                text = text.replace(old, new)
            (unfinished / file.replace("l2_lora", module)).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sorted(folder.iterdir())
