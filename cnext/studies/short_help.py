"""``cnext-run --help``: the flags that most runs need, from their declarations; the others by name alone.

The declarations are read, not imported, so that the help answers at once.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

PLACES = {"config/run_config.py": "Options", "studies/flags.py": "Flags"}
"""Files of cnext and their classes that declare flags."""
SHOWN = {
    "What to run": ("method", "order", "seeds", "suite", "preset", "split", "baseline"),
    "Data and model": ("data", "on_bad_row", "backbone", "weights", "clip", "init_from", "init_tasks"),
    "How": ("out", "log", "jobs", "config", "dry_run", "version", "help_all"),
}
NAMED = {
    "training": (
        *("learning_rate", "batch_size", "micro_batch_size", "schedule", "trainable", "precision", "checkpointing"),
        *("draws", "prompts", "checkpoint_interval"),
    ),
    "hardware": ("device", "threads", "device_map", "workers", "backbone_options", "gpus", "tflops"),
    "launchers": ("launcher", "launcher_option", "mix_environments", "mix_data"),
}
"""Flags that are explained by --help-all alone."""
WIDTH, INDENT, SPACE = 100, 26, "\xa0"
EXAMPLES = """\
cnext-run --method mage --preset smoke                  # a quick check
cnext-run --method mage lora --seeds 0 1 2              # a study: six runs and a table
cnext-run --config RUN/run.yaml --out again             # a run again, from what it wrote
"""


class Flag(NamedTuple):
    """A declared flag: its annotation, default and docstring as written."""

    kind: str
    default: str
    text: str


def declared() -> dict[str, Flag]:
    """Every flag by its name, in the order of declaration."""
    found = {}
    for node in _classes():
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            match item, after:
                case ast.AnnAssign(ast.Name(name), kind, default), ast.Expr(ast.Constant(str(text))):
                    given = "" if default is None else ast.unparse(default)
                    found[name] = Flag(ast.unparse(kind), given, " ".join(text.split()))
    return found


def text(width: int | None = None) -> str:
    """The help, in lines of at most ``width`` characters: by default the terminal's, and 100 at most."""
    width = min(width or shutil.get_terminal_size().columns, WIDTH)
    flags = declared()
    about = inspect.cleandoc(ast.get_docstring(_classes()[-1]) or "")
    lines = ["usage: cnext-run [-h] [FLAGS]", "", *textwrap.wrap(" ".join(about.split()), width), ""]
    lines += [line[:width].rstrip() for line in EXAMPLES.splitlines()]
    for title, names in SHOWN.items():
        lines += ["", title]
        for name in names:
            lines += _shown(name, flags[name], width)
    lines += ["", "More, which --help-all explains"]
    for title, names in NAMED.items():
        lines += _wrapped(f"  {title}", " ".join(map(_flag, names)), width)
    methods = "--METHOD.NAME, for example --mage.pull 0.02: `cnext card METHOD` shows them"
    return "\n".join([*lines, *_wrapped("  hyperparameters", methods, width)])


def _classes() -> list[ast.ClassDef]:
    root, found = Path(__file__).parents[1], []
    for place, name in PLACES.items():
        tree = ast.parse((root / place).read_text(encoding="utf-8"))
        found += [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(name: str, flag: Flag, width: int) -> list[str]:
    try:
        default = ast.literal_eval(flag.default)
    except ValueError:  # a call: its argument
        inner = re.search(r"'(\w[^']*)'|\[(.*?)\]", flag.default)
        default = (inner[1] or inner[2]) if inner else None
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    note = "" if shown in (None, False, "") else f" (default:{SPACE}{str(shown).strip(chr(39))})"
    text = re.sub(r" None: .*?(?=\.$)\.", "", flag.text) if note else flag.text
    return _wrapped(f"  {_flag(name)} {_value(flag.kind)}".rstrip(), f"{text}{note}", width)


def _value(kind: str) -> str:
    """What follows a flag, by its type."""
    several = " ..." if re.match(r"(list|tuple)\[", kind) else ""
    if choices := re.search(r"Literal\[(.*?)\]", kind):
        return "{" + choices[1].replace("'", "").replace(" ", "") + "}" + several
    word = {"str": "STR", "int": "INT", "float": "FLOAT", "Path": "PATH", "bool": ""}
    return next(shown for name, shown in word.items() if name in kind) + several


def _wrapped(head: str, text: str, width: int) -> list[str]:
    """Text in a column beside a flag, or below one that is too long."""
    own = [line.replace(SPACE, " ") for line in textwrap.wrap(text, width - INDENT, break_on_hyphens=False)]
    if len(head) >= INDENT:
        return [head, *(" " * INDENT + line for line in own)]
    return [f"{head:<{INDENT}}{own[0]}", *(" " * INDENT + line for line in own[1:])]
