"""Write the kernels in the layout of the Hugging Face kernels hub: `python kernels/hub/assemble.py OUT`.

OUT gets what kernel-builder takes (build.toml, CARD.md, torch-ext/cnext_kernels, benchmarks) and, in OUT/build, what
it makes of a package without compiled parts, so that `kernels.get_local_kernel(OUT)` loads it offline. The Python files
are those of cnext/ops and kernels/triton: imports of cnext become relative, and ops are registered under a name of
their own, so that they and an installed cnext can be used side by side.

The C++ and CUDA parts are not in it. They are modules for Python without a header of torch (csrc), and the hub wants
ops that are registered through torch's C++ library and built by kernel-builder, which needs Nix and a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME, PACKAGE, BACKENDS, VERSION = "cnext-kernels", "cnext_kernels", ("cpu", "cuda"), 1
SOURCES = {"": ROOT / "cnext/errors.py", "ops": ROOT / "cnext/ops", "kernels": ROOT / "kernels/triton"}
LEFT_OUT = "the package of the kernels hub has Triton and plain torch alone"
INIT = '''"""{summary}"""

from .ops import *
from .ops import __all__
'''
OPS = '''"""The name that this package's ops are registered under, as kernel-builder makes it."""

import torch

ops = torch.ops.{unique}


def add_op_namespace_prefix(op_name: str) -> str:
    """Name of an op in this package's namespace."""
    return f"{unique}::{{op_name}}"
'''


def rewritten(text: str, folder: str) -> str:
    """A source file of the package cnext for the hub's package. folder: of it there, "" for the top."""

    def relative(match: re.Match[str]) -> str:
        inside, _, module = match["module"].partition(".")
        if inside == folder and folder:
            return f"from .{module} import"
        return f"from {'..' if folder else '.'}{match['module']} import"

    text = re.sub(r"\bfrom cnext\.(?P<module>[\w.]+) import", relative, text)
    if "torch.ops.cnext" in text or 'Library("cnext"' in text:
        text = text.replace("torch.ops.cnext", "_ops.ops").replace('Library("cnext"', "Library(_NAMESPACE")
        text = text.replace('f"cnext::{', 'f"{_NAMESPACE}::{')
        head, mark, rest = text.partition("import torch\n")
        own = 'from .. import _ops\n\n_NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")\n'
        # After the imports that the file has: before the first statement at its margin that is none.
        lines = rest.splitlines(keepends=True)
        first = next(i for i, line in enumerate(lines) if re.match(r"(?!from |import |[\s)#@]|\Z)", line))
        text = head + mark + "".join([*lines[:first], own, "\n", *lines[first:]])
    return text


def files() -> dict[str, str]:
    """The package's files and their text, by path in it."""
    found = {}
    for folder, source in SOURCES.items():
        for path in [source] if source.is_file() else sorted(source.glob("*.py")):
            found[str(Path(folder, path.name))] = rewritten(path.read_text(encoding="utf-8"), folder)
    summary = "Ops for continual learning, in Triton and in plain torch: those of `cnext.ops`."
    found["__init__.py"] = INIT.format(summary=summary)
    # What the ops say where a user asks for an implementation that is not here.
    found["_build.json"] = json.dumps({"built": {}, "left_out": dict.fromkeys(("cpp", "cuda"), LEFT_OUT)}) + "\n"
    return found


def write(out: Path) -> list[Path]:
    """Writes the layout into a new folder. Returns its parts."""
    if out.exists():
        sys.exit(f"{out} exists; give a folder that does not")
    package = files()
    unique = hashlib.sha256("".join(map("".join, sorted(package.items()))).encode()).hexdigest()[:8]
    (out / "benchmarks").mkdir(parents=True)
    for name, to in (("build.toml", ""), ("CARD.md", ""), ("benchmark.py", "benchmarks")):
        shutil.copy(HERE / name, out / to / name)
    targets = [out / "torch-ext" / PACKAGE, *(out / "build" / f"torch-{backend}" for backend in BACKENDS)]
    for target in targets:
        for name, text in package.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_text(text, encoding="utf-8")
    for backend, target in zip(BACKENDS, targets[1:], strict=True):
        name = f"_{PACKAGE}_{backend}_{unique}"
        (target / "_ops.py").write_text(OPS.format(unique=name), encoding="utf-8")
        known = {"name": NAME, "id": name, "version": VERSION, "license": "Apache-2.0", "python-depends": []}
        (target / "metadata.json").write_text(json.dumps(known | {"backend": {"type": backend}}, indent=2) + "\n")
    return sorted(out.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    for part in write(parser.parse_args().out):
        print(part)
