"""Base types of scoring: a model's prediction, its score, and scorers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

from cnext.errors import UserError
from cnext.image_files import open_image
from cnext.registry import Registry
from cnext.scoring.names import OWN, SHORT_ANSWERS

if TYPE_CHECKING:
    import numpy

    from cnext.tasks.base import Sample, Task

PROFILES = ("strict", "paper")
"""strict (default): each score as it is defined. paper: the released evaluators, including their errors."""

ERROR_TYPES = ("hallucination", "instruction_unfollowing", "other")


@dataclass(frozen=True)
class Prediction:
    """A model's answer.

    text: decoded, without image tokens.  image: (H, W, 3) uint8, or None if none was generated.
    released_text: as the paper's code decodes it, where that is another text; by it the paper's evaluators score.
    """

    text: str
    image: numpy.ndarray | None = None
    released_text: str | None = None

    @property
    def as_released(self) -> str:
        """The text that the paper's evaluators see."""
        return self.text if self.released_text is None else self.released_text


@dataclass(frozen=True)
class Score:
    """One answer's score in percent under each profile, and its error type.

    strict: 0 to 100. paper: finite; may be negative, where a released evaluator takes a cosine as it is.
    error: one of ERROR_TYPES, or "" where the strict score is 100.
    """

    strict: float
    paper: float
    error: str = ""


Scorer = Callable[["Task", Sequence["Sample"], Sequence[Prediction]], list[Score]]
"""Scores a task's whole list of answers at once, in order; one Score per sample."""


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a sample's reference. usable: whether a run may start, with scores that the text explains."""

    text: str
    usable: bool = False


REFERENCE_CHECKS = Registry(
    "check of references",
    "cnext.reference_checks",
    {
        **dict.fromkeys((*SHORT_ANSWERS, "cider"), "cnext.scoring.text:content_flaw"),
        "box": "cnext.scoring.boxes:reference_flaw",
        "clip_image": "cnext.scoring.images:target_flaw",
        "coin_grounding": "cnext.scoring.boxes:reference_flaw",
        "coin_scienceqa": "cnext.scoring.coin:option_flaw",
        "coin_textvqa": "cnext.scoring.coin:annotators_flaw",
        "mllm_cl_ocr": "cnext.scoring.mllm_cl:category_flaw",
    },
)
"""By the name of a scorer: a function from `Sample` to `Flaw` or None.

Another package adds one by an entry point of the group ``cnext.reference_checks``: ``scorer = "module:function"``.
"""


def reference_check(task: Task) -> Callable[[Sample], Flaw | None]:
    """The check of a task's test samples: what keeps a reference from being scored as the task's scorer needs it."""
    if task.scorer in REFERENCE_CHECKS:
        return REFERENCE_CHECKS[task.scorer]
    scorer = None if task.scorer in OWN else find_scorer(task)
    return scorer.flaw if isinstance(scorer, AnswerScorer) else lambda sample: None


AnswerFunction = Callable[[str, list[str]], float]
"""A scorer in its simple form: an answer and its accepted answers to a score from 0 to 1."""


class AnswerScorer:
    """A `Scorer` that asks a function ``(answer, references)`` about one answer after another.

    Both profiles are 100 times what the function returns. The error type is "" for 1, "instruction_unfollowing" for an
    empty answer, and "other" for the rest. The function sees no image.

    Args:
        function: gets the text of an answer and the list of accepted answers; returns a number from 0 to 1, or a bool.

    Example:
        >>> AnswerScorer(lambda answer, references: answer in references)(task, samples, predictions)
    """

    def __init__(self, function: AnswerFunction) -> None:
        self.function = function

    def __call__(self, task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
        return [self._score(sample, prediction.text) for sample, prediction in zip(samples, predictions, strict=True)]

    def flaw(self, sample: Sample) -> Flaw | None:
        """What is wrong with a reference: the function refuses it, or gives it 0 as an answer to itself."""
        try:
            highest = max(self._score(sample, answer).strict for answer in sample.answers)
        except UserError as error:
            return Flaw(str(error).removeprefix(f"{sample.origin}: "))
        if highest:
            return None
        return Flaw(f"expected a reference that scores above 0 as an answer, {self._name} gives it 0", usable=True)

    @property
    def _name(self) -> str:
        return _called(self.function)

    def _score(self, sample: Sample, answer: str) -> Score:
        where, said = sample.origin or sample.id, f"the answer {answer[:80]!r}"
        try:
            value: Any = self.function(answer, list(sample.answers))
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: the scorer {self._name} raises {what}, for {said}; correct it") from error
        number = _number(value)
        if number is None or not 0 <= number <= 1:
            expected = f"expected a number from 0 to 1 of the scorer {self._name}"
            raise UserError(f"{where}: {expected}, got {value!r} for {said}; correct it")
        percent = 100.0 * number
        error = "" if percent == 100.0 else "other" if answer.strip() else "instruction_unfollowing"
        return Score(percent, percent, error)


def _called(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _number(value: Any) -> float | None:
    """A number, also one of numpy or torch; None for anything else."""
    value = value.item() if getattr(value, "shape", None) == () else value
    return float(value) if isinstance(value, Real) else None


def scores_of(scorer: Scorer, task: Task, samples: Sequence[Sample], predictions: Sequence[Prediction]) -> list[Score]:
    """What a scorer of another package or of a suite's folder returns, if it is one sound `Score` per sample.

    Raises:
        UserError: names the scorer, and what it raises or returns.
    """
    name = f"the scorer {task.scorer or _called(scorer)}"
    try:
        found: Any = scorer(task, samples, predictions)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{name} raises {type(error).__name__}: {error}"
        raise UserError(f"{said}; it is called with (task, samples, predictions), correct it") from error
    if not isinstance(found, list) or len(found) != len(samples):
        got = f"{len(found)}" if isinstance(found, list) else f"{found!r:.200}"
        raise UserError(f"expected a list of {len(samples)} scores, one per sample, of {name}, got {got}; correct it")
    return [_sound(name, score, prediction) for score, prediction in zip(found, predictions, strict=True)]


def _sound(name: str, score: Any, prediction: Prediction) -> Score:
    """The score, with plain numbers. Raises UserError where it is not as `Score` says."""
    said = f"for the answer {prediction.text[:80]!r}; correct it"
    if not isinstance(score, Score):
        raise UserError(f"expected a cnext.scoring.base.Score of {name}, got {score!r:.200} {said}")
    strict, paper = _number(score.strict), _number(score.paper)
    if strict is None or not 0 <= strict <= 100:
        raise UserError(f"expected a strict score from 0 to 100 percent of {name}, got {score.strict!r} {said}")
    if paper is None or not isfinite(paper):
        raise UserError(f"expected a finite paper score of {name}, got {score.paper!r} {said}")
    if score.error not in ([""] if strict == 100 else ERROR_TYPES):
        expected = "no error type" if strict == 100 else f"an error type of {', '.join(ERROR_TYPES)}"
        raise UserError(f"expected {expected} of {name}, got {score.error!r} with a strict score of {strict} {said}")
    return Score(strict, paper, score.error)


TRIED = 8
"""Samples that `try_scorer` needs at most."""


def try_scorer(task: Task, samples: Sequence[Sample]) -> None:
    """Calls a scorer of (task, samples, predictions) that is not cnext's, with the samples' references as the answers.

    Raises:
        UserError: as `scores_of`.
    """
    if task.scorer in OWN or not samples or isinstance(scorer := find_scorer(task), AnswerScorer):
        return
    scorer(task, samples, [reference_of(sample) for sample in samples])


def reference_of(sample: Sample, number: int = 0) -> Prediction:
    """An accepted answer of a sample, and its target image, as a prediction."""
    import numpy

    image = None if sample.target_image is None else numpy.asarray(open_image(sample.target_image))
    return Prediction(sample.answers[number % len(sample.answers)], image)


def scorer_of(found: Any) -> Scorer:
    """The scorer that another package or a suite's folder has: a `Scorer`, or an `AnswerFunction`.

    Raises:
        UserError: it takes neither two nor three arguments.
    """
    try:
        taken = [
            parameter
            for parameter in inspect.signature(found).parameters.values()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"expected a function as a scorer, got {found!r}: {error}") from error
    if len(taken) == 2:
        return AnswerScorer(found)
    if len(taken) == 3:
        return found
    given = ", ".join(str(parameter) for parameter in taken) or "none"
    raise UserError(
        f"expected a scorer of (answer, references) or of (task, samples, predictions), {found!r} takes {given}"
    )


def make_scorers(clip: str = "tiny", device: str = "cpu") -> Registry:
    """The scorers by name: functions of the type `cnext.scoring.base.Scorer`, imported when they are used.

    A scorer that is registered as a class is constructed with ``(clip, device)``. One of another package, or of a
    suite's folder, may be an `AnswerFunction`.

    Args:
        clip: a name that ``cnext.scoring.clip.load_clip`` accepts: "tiny", "<tag>/<model>" of open_clip (the benchmark
            uses "openai/ViT-B-32"), or a folder. Call that first to fail before a run and not during it.
        device: where the CLIP model runs.

    Example:
        >>> make_scorers()["short_answer"](task, samples, predictions)
    """
    return Registry(
        "scorer",
        "cnext.scorers",
        OWN,
        lambda found: found(clip, device) if isinstance(found, type) else scorer_of(found),
    )


def find_scorer(task: Task, scorers: Registry | None = None) -> Scorer:
    """The scorer that a task names.

    Raises:
        UserError: there is none of that name, it cannot be imported, or it is a function of text and the task writes
            images.
    """
    scorer = (scorers or make_scorers()).named(task.scorer, task.folder, f"scorer of task {task.name}")
    if isinstance(scorer, AnswerScorer) and "image" in task.writes:
        raise UserError(
            f"task {task.name} writes images, and its scorer {task.scorer} takes (answer, references), which are text; "
            "expected a scorer of (task, samples, predictions)"
        )
    return scorer if task.scorer in OWN or isinstance(scorer, AnswerScorer) else partial(scores_of, scorer)
