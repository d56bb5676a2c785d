"""``cnext judge validate``: agreement of a judge with 200 synthetic errors of known type."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from cnext.judging import output
from cnext.judging.cases import Case, rule
from cnext.judging.run import JudgeConfig, judge_cases
from cnext.judging.statistics import agreement
from cnext.runs.checkpoint import write_json
from cnext.scoring import BOXES
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.kinds import known_words
from cnext.scoring.matrix_file import read_json
from cnext.tasks import scenes, suites, synthetic

LABELLED = Path(__file__).with_name("labelled.json")


def validate(config: JudgeConfig, folder: Path) -> dict[str, Any] | None:
    """Judges the labelled errors; prints, saves and returns accuracy, kappa and confusion matrix.

    Args:
        folder: gets the verdicts, as ``<name>.jsonl``, and the result, as ``<name>.json``.

    Returns:
        As `statistics.agreement`, with the judge; None after a dry run.

    Raises:
        UserError: as `judge_cases`, or judging ended early; verdicts so far are saved.
    """
    labelled = read_json(LABELLED)
    with tempfile.TemporaryDirectory() as pictures:
        cases = _cases(labelled, Path(pictures), draw=config.kind != "rules")
        outcome = judge_cases(cases, config, folder)
    if outcome is None:
        return None
    if outcome.stopped is not None:
        raise outcome.stopped
    found = agreement([row["error"] for row in labelled], [outcome.labels.get(case) for case in cases])
    found = {**outcome.judge, **found, "reasons": dict(outcome.reasons)}
    file = folder / f"{config.file_name}.json"
    if config.kind == "openai":
        found["usage"] = output.usage(file, found, outcome.usage)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    print(text(found))
    print(file)
    return found


def text(found: dict[str, Any]) -> str:
    """The result of `validate` as text."""
    values = [
        f"{name} {'undefined' if found[name] is None else f'{found[name]:.3f}'}" for name in ("accuracy", "kappa")
    ]
    lines = ["  ".join([*values, f"judged {found['judged']}", f"unjudged {found['unjudged']}"])]
    lines.append(f"{'known, judged as':<26}" + "".join(f"{kind:>26}" for kind in ERROR_TYPES))
    for label, row in found["confusion"].items():
        lines.append(f"{label:<26}" + "".join(f"{row[kind]:>26}" for kind in ERROR_TYPES))
    return "\n".join([*lines, *(f"not judged: {count}, {reason}" for reason, count in found["reasons"].items())])


def _cases(labelled: list[dict[str, Any]], folder: Path, draw: bool) -> list[Case]:
    """The labelled errors as a judge sees them. draw: whether to write their images, which rules do not need."""
    suite = suites.load("next-tiny")
    cases = {}
    for task in suite.tasks:
        rows = [row for row in labelled if row["task"] == task.name]
        known = known_words(text for row in rows for text in (row["instruction"], row["expected"]))
        last = max(max(row["index"], row["drawn"] or 0) for row in rows)
        examples = list(islice(synthetic.examples(task.name, "test"), last + 1))

        def picture(index: int, name: str, task: str = task.name, examples: list = examples) -> Path:
            path = folder / f"{task}-{index}-{name}.png"
            if draw and not path.exists():
                _save(scenes.draw(getattr(examples[index], name)), path)
            return path

        draws = "image" in task.writes
        kind = ("edit" if "image" in task.reads else "draw") if draws else "box" if task.scorer in BOXES else "text"
        right = "target" if kind == "edit" else "picture"
        for row in rows:
            instruction, expected, answer = asked = (row["instruction"], row["expected"], row["answer"])
            by_rule = rule(task.scorer, answer, row["drawn"] is not None, expected, instruction, known, "other")
            pictures = (
                None if row["drawn"] is None else picture(row["drawn"], right),
                None if kind == "draw" else picture(row["index"], "picture"),
                picture(row["index"], right) if draws else None,
            )
            place = (task.name, row["index"])
            cases[place] = Case(0, *place, str(row["index"]), kind, *asked, *pictures, by_rule)
    return [cases[row["task"], row["index"]] for row in labelled]


def _save(pixels: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, compress_level=1)
