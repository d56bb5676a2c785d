"""``cnext judge validate``: agreement of a judge with errors of known type."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from cnext import durable
from cnext.judging import output
from cnext.judging.cases import Case, asked_by, rule
from cnext.judging.run import JudgeConfig, judge_cases
from cnext.judging.statistics import agreement
from cnext.runs.checkpoint import write_json
from cnext.scoring import BOXES
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.matrix_file import read_json
from cnext.tasks import generated, scenes, suites, synthetic

FOLDER = Path(__file__).with_name("labelled")
SETS = {
    "made": "errors on next-tiny made by a program, of a type that is known from how",
    "edited": "right answers to questions about photographs, edited by a program until they are wrong",
    "read": "wrong answers of runs on next-tiny, labelled by hand; the rules were completed with these three",
    "read-later": "as read, of other methods, labelled after the rules were final",
}
"""The labelled sets: files of `FOLDER`, and what is in them."""
WITHOUT_PICTURES = ("edited",)


def validate(config: JudgeConfig, folder: Path) -> dict[str, Any] | None:
    """Judges the labelled errors; prints, saves and returns the agreement by set.

    A model judges the sets with pictures.

    Args:
        folder: gets the verdicts, as ``<name>.jsonl``, and the result, as ``<name>.json``.

    Returns:
        ``sets`` {name: as `statistics.agreement`}, ``reasons`` {why: how many are not judged}, and the judge; None
        after a dry run.

    Raises:
        UserError: as `judge_cases`, or judging ended early; verdicts so far are saved.
    """
    names = [name for name in SETS if config.kind == "rules" or name not in WITHOUT_PICTURES]
    labelled = {name: read_json(FOLDER / f"{name}.json") for name in names}
    with tempfile.TemporaryDirectory() as pictures:
        draw = config.kind != "rules"
        cases = {
            name: _without_pictures(place, rows)
            if name in WITHOUT_PICTURES
            else _cases(place, rows, Path(pictures), draw)
            for place, (name, rows) in enumerate(labelled.items())
        }
        outcome = judge_cases([case for each in cases.values() for case in each], config, folder)
    if outcome is None:
        return None
    if outcome.stopped is not None:
        raise outcome.stopped
    sets = {
        name: agreement([row["error"] for row in rows], [outcome.labels.get(case) for case in cases[name]])
        for name, rows in labelled.items()
    }
    found = {**outcome.judge, "sets": sets, "reasons": dict(outcome.reasons)}
    file = folder / f"{config.file_name}.json"
    if config.kind == "openai":
        found["usage"] = output.usage(file, found, outcome.usage)
    durable.make_folder(folder)
    write_json(file, found)
    print(text(found))
    print(file)
    return found


def text(found: dict[str, Any]) -> str:
    """The result of `validate` as text."""
    lines = []
    for name, each in found["sets"].items():
        values = [f"{figure} {_figure(each[figure], 3)}" for figure in ("accuracy", "kappa")]
        lines += [
            f"{name}: {SETS[name]}",
            "  ".join([*values, f"judged {each['judged']}", f"unjudged {each['unjudged']}"]),
        ]
        lines.append(f"{'known, judged as':<26}" + "".join(f"{kind:>26}" for kind in (*ERROR_TYPES, "recall")))
        for label, row in each["confusion"].items():
            recall = _figure(each["types"][label]["recall"], 2)
            lines.append(f"{label:<26}" + "".join(f"{value:>26}" for value in (*row.values(), recall)))
        precision = [_figure(each["types"][kind]["precision"], 2) for kind in ERROR_TYPES]
        lines += [f"{'precision':<26}" + "".join(f"{value:>26}" for value in precision), ""]
    return "\n".join(
        [*lines, *(f"not judged: {count}, {reason}" for reason, count in found["reasons"].items())]
    ).rstrip()


def _figure(value: float | None, digits: int) -> str:
    return "undefined" if value is None else f"{value:.{digits}f}"


def _without_pictures(place: int, rows: list[dict[str, Any]]) -> list[Case]:
    """Labelled errors that rules alone judge."""
    asked = asked_by("short_answer", ((row["instruction"], row["expected"]) for row in rows))
    cases = []
    for index, row in enumerate(rows):
        instruction, expected, answer = row["instruction"], row["expected"], row["answer"]
        by_rule = rule("short_answer", answer, False, expected, instruction, asked, "other")
        said = (instruction, expected, answer)
        cases.append(Case(place, row["task"], index, str(index), "text", *said, None, None, None, by_rule))
    return cases


def _cases(place: int, labelled: list[dict[str, Any]], folder: Path, draw: bool) -> list[Case]:
    """Labelled errors on next-tiny as a judge sees them.

    place: of the set among the sets.  draw: whether to write their images, which rules do not need.
    """
    suite = suites.load("next-tiny")
    cases = {}
    for task in suite.tasks:
        rows = [(number, row) for number, row in enumerate(labelled) if row["task"] == task.name]
        if not rows:
            continue
        asked = asked_by(task.scorer, ((row["instruction"], row["expected"]) for _, row in rows))
        last = max(max(row["index"], row["drawn"] or 0) for _, row in rows)
        examples = list(islice(synthetic.examples(task.name, "test"), last + 1))

        def picture(index: int, name: str, task: str = task.name, examples: list = examples) -> Path:
            path = folder / f"{task}-{index}-{name}.png"
            if draw and not path.exists():
                generated.save(scenes.draw(getattr(examples[index], name)), path)
            return path

        draws = "image" in task.writes
        kind = ("edit" if "image" in task.reads else "draw") if draws else "box" if task.scorer in BOXES else "text"
        right = "target" if kind == "edit" else "picture"
        for number, row in rows:
            instruction, expected, answer = said = (row["instruction"], row["expected"], row["answer"])
            by_rule = rule(task.scorer, answer, row["drawn"] is not None, expected, instruction, asked, "other")
            pictures = (
                None if row["drawn"] is None else picture(row["drawn"], right),
                None if kind == "draw" else picture(row["index"], "picture"),
                picture(row["index"], right) if draws else None,
            )
            cases[number] = Case(place, task.name, number, str(row["index"]), kind, *said, *pictures, by_rule)
    return [cases[number] for number in range(len(labelled))]
