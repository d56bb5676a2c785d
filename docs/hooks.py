"""Fill in the generated parts of the documentation from the installed package while MkDocs builds.

A page marks such a part with ``<!-- generated: NAME -->``, where NAME is a key of ``PARTS``. mkdocs.yml also loads
`Docstrings` from here, for the API reference.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import griffe

from cnext import cli, methods
from cnext.scoring.matrix import FORMULAS, REFERENCE_FORMULAS
from cnext.tables import formats
from cnext.tasks import suites

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def output(main: Callable[[list[str]], int], *arguments: str) -> str:
    """What a command prints, 100 columns wide and without color."""
    printed, status = io.StringIO(), 0
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with contextlib.redirect_stdout(printed):
        try:
            status = main([*arguments])
        except SystemExit as end:  # after --help
            status = end.code
    if status:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {status}")
    return printed.getvalue().rstrip()


def block(text: str) -> str:
    return f"```text\n{text}\n```"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def verbs(*parents: str) -> list[tuple[str, ...]]:
    """Every verb of ``cnext`` that the help lists, ``data check`` and its like included."""
    listed = re.findall(r"^    ([a-z-]+)(?= |$)", output(cli.main, *parents, "--help"), re.MULTILINE)
    return [verb for name in listed for verb in [(*parents, name), *(verbs(*parents, name) if not parents else [])]]


def command_line() -> str:
    """The help of ``cnext-run`` and of every verb of ``cnext``."""
    parts = ["## cnext-run\n", block(output(cli.run_main, "--help-all"))]
    for verb in verbs():
        if verb != ("run",):
            parts += [f"\n## cnext {' '.join(verb)}\n", block(output(cli.main, *verb, "--help"))]
    return "\n".join(parts)


def cards() -> str:
    """A section for every method: its card as ``cnext card`` prints it."""
    return "\n\n".join(f"## {name}\n\n{block(output(cli.main, 'card', name))}" for name in sorted(methods.modules()))


def summaries() -> str:
    rows = [[f"[`{name}`](#{name})", methods.summary(name)] for name in sorted(methods.modules())]
    return table(["method", "what it is"], rows)


def formulas(definitions: Mapping[str, str]) -> str:
    """A row for each metric: its formula as code, and what follows it as text."""
    parts = {name: formula.partition(";") for name, formula in definitions.items()}
    rows = [[f"`{name}`", f"`{formula}`", rest.strip()] for name, (formula, _, rest) in parts.items()]
    return table(["metric", "formula", ""], rows)


def suite_details() -> str:
    return "\n\n".join(f"### {name}\n\n{block(output(cli.main, 'list', name))}" for name in suites.names())


def backbones() -> str:
    """A row for each backbone that ``cnext list`` names."""
    listed = output(cli.main, "list").partition("\nbackbones\n")[2].partition("\nsuites")[0]
    return table(["backbone", "what it is"], [[f"`{name}`", text] for name, text in re.findall(r"(\S+) +(.+)", listed)])


def results() -> str:
    """The methods' means and deviations over three seeds in the paper's order, from results/next-tiny/study.json."""
    study = json.loads((ROOT / "results/next-tiny/study.json").read_text(encoding="utf-8"))

    def cell(value: dict[str, Any]) -> str:
        return formats.NOTHING if value["mean"] is None else f"{value['mean']:.1f} ± {value['sd']:.1f}"

    metrics = ("avg_acc", "forgetting", "new_acc")
    rows = [
        [f"[`{row['method']}`](methods.md#{row['method']})", *(cell(row[metric]) for metric in metrics)]
        for row in study["rows"]
        if row["order"] == "paper"
    ]
    return table(["method", "Avg.ACC", "Forgetting", "New.ACC"], rows)


def ablations() -> str:
    """results/next-tiny/README.md without its title; its links lead into the repository and become plain text."""
    text = (ROOT / "results/next-tiny/README.md").read_text(encoding="utf-8").partition("\n")[2]
    return re.sub(r"\[([^\]]+)\]\(\.\.?/[^)]*\)", r"`results/\1`", text)


PARTS: dict[str, Callable[[], str]] = {
    "ablations": ablations,
    "backbones": backbones,
    "cards": cards,
    "command-line": command_line,
    "methods": summaries,
    "metrics": lambda: formulas({name: formula for name, formula in FORMULAS.items() if name != "bwt"}),
    "reference-metrics": lambda: formulas(REFERENCE_FORMULAS),
    "results": results,
    "suites": suite_details,
}


class Docstrings(griffe.Extension):
    """Examples of docstrings as code: Griffe knows the section by its plural."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:{1,2}$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of every page."""
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)
