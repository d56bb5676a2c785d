"""The contract of scorers: a score per sample, within its range, with an error type where it is not full."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.scoring.base import (
    Prediction,
    Score,
    Scorer,
    find_scorer,
    reference_check,
    reference_of,
    scorer_of,
    scores_of,
)
from cnext.tasks.base import Sample, Task, Turn

REFERENCES = (("red",), ("two blue rings", "blue rings"), ("7",), ("the café's door",))
"""Accepted answers of the samples that `check_scorer` makes."""
WRONG = ("", " ", "zebra", "red " * 200, "\u4e2d\u6587 \U0001f600", "[0.1,0.2,0.3,0.4]", "nan")
"""Answers that a scorer must be able to score, whatever they are worth."""


@dataclass(frozen=True)
class Material:
    """What the checks work on: a scorer, a task and its samples."""

    scorer: Scorer
    task: Task
    samples: Sequence[Sample]

    def score(self, predictions: Sequence[Prediction]) -> list[Score]:
        """The scores, whose form is checked."""
        return scores_of(self.scorer, self.task, self.samples, predictions)

    @property
    def right(self) -> list[Prediction]:
        """Each sample's own reference as its answer."""
        return [reference_of(sample, 0) for sample in self.samples]


def takes_every_reference(material: Material) -> None:
    """The check of references finds nothing that keeps a sample from being scored."""
    check = reference_check(material.task) if material.task.scorer else getattr(material.scorer, "flaw", None)
    for sample in material.samples:
        flaw = check(sample) if check else None
        assert flaw is None or flaw.usable, f"the reference {sample.answers!r} is refused: {flaw and flaw.text}"


def prefers_the_reference(material: Material) -> None:
    """Each accepted answer, as an answer, scores above nonsense."""
    wrong = material.score([Prediction("zebra") for _ in material.samples])
    for number in range(max(len(sample.answers) for sample in material.samples)):
        right = material.score([reference_of(sample, number) for sample in material.samples])
        for sample, high, low in zip(material.samples, right, wrong, strict=True):
            accepted = sample.answers[number % len(sample.answers)]
            assert high.strict > low.strict, (
                f"the accepted answer {accepted!r} scores {high.strict}, and 'zebra' {low.strict}; "
                "expected more for the first"
            )


def scores_every_answer(material: Material) -> None:
    """Empty, long, foreign and malformed answers, and images, have a score as well."""
    import numpy

    picture = numpy.zeros((8, 8, 3), numpy.uint8)
    for text in WRONG:
        material.score([Prediction(text) for _ in material.samples])
    material.score([Prediction("red", picture) for _ in material.samples])


def depends_on_its_arguments_alone(material: Material) -> None:
    """The same answers have the same scores again, and the arguments are unchanged."""
    predictions = material.right
    kept = copy.deepcopy((material.samples, [prediction.text for prediction in predictions]))
    one, other = material.score(predictions), material.score(predictions)
    assert one == other, f"the same answers score {one}, and {other} a second time"
    assert kept == (material.samples, [prediction.text for prediction in predictions]), (
        "the scorer changes its arguments"
    )


SCORER_CHECKS: dict[str, Callable[[Material], None]] = {
    check.__name__: check
    for check in (
        takes_every_reference,
        prefers_the_reference,
        scores_every_answer,
        depends_on_its_arguments_alone,
    )
}
"""The checks of `check_scorer` by name: functions of a `Material`."""


def material(
    scorer: str | Callable[..., Any],
    references: Sequence[str | Sequence[str]] = REFERENCES,
    samples: Sequence[Sample] | None = None,
    suite: Path | str = "",
) -> Material:
    """What the checks of a scorer work on. Arguments: as of `check_scorer`."""
    if not samples:
        accepted = [(each,) if isinstance(each, str) else tuple(each) for each in references]
        samples = [
            Sample(str(number), (Turn("What is it?", each[0]),), origin=f"sample {number}", references=each)
            for number, each in enumerate(accepted)
        ]
    reads, writes = ("text",), ("image",) if any(sample.target_image for sample in samples) else ("text",)
    name = scorer if isinstance(scorer, str) else ""
    task = Task("checked", reads, writes, "conversation", name, "train.json", "test.json", folder=str(suite))
    if isinstance(scorer, str):
        return Material(find_scorer(task), task, samples)
    return Material(scorer() if isinstance(scorer, type) else scorer_of(scorer), task, samples)


def check_scorer(
    scorer: str | Callable[..., Any],
    references: Sequence[str | Sequence[str]] = REFERENCES,
    samples: Sequence[Sample] | None = None,
    suite: Path | str = "",
) -> None:
    """Checks that a scorer keeps the contract of scorers. Under a second for a scorer of text.

    It gives one score per sample in order, from 0 to 100 percent, an error type where the score is not full, more for
    an accepted answer than for nonsense, and the same each time, also for empty, long and malformed answers. One
    that gives every answer the same score is thus refused.

    Args:
        scorer: a registered name, "module:function" as in a manifest, or the function itself: one of (answer,
            references), or one of (task, samples, predictions).
        references: accepted answers to try: a string, or several, for each sample. Give some of the kind that the
            scorer is for, such as boxes.
        samples: in place of ``references``; with target images for scorers of images.
        suite: the folder of the suite that "module:function" is in; "": an installed module.

    Raises:
        AssertionError: says what was expected, what came, and what to do; also for an unknown name.

    Example:
        >>> from cnext.testing import check_scorer
        >>> check_scorer(lambda answer, references: answer in references)
    """
    try:
        made = material(scorer, references, samples, suite)
        for check in SCORER_CHECKS.values():
            check(made)
    except UserError as error:
        raise AssertionError(str(error)) from error
