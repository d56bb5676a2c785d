"""Typed records of the files that a run writes.

A run folder may come from elsewhere: paths in its files lead inside it, except those of the data set's images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from msgspec import Meta, field

from cnext import records
from cnext.errors import UserError, parse_json, printable
from cnext.records import AnyPath, FileName, Finite, Record, RelativePath
from cnext.regular_files import read_bytes
from cnext.runs import seals
from cnext.scoring.base import ERROR_TYPES, PROFILES

T = TypeVar("T")
ADVICE = "run cnext-run again"
Percent = Annotated[float, Meta(ge=-1e6, le=1e6)]
Row = list[Percent | None]
Matrix = list[Row | None]
"""Scores by stage (rows) and task, None where not evaluated."""


class StageScore(Record):
    """A row of scores.jsonl: the mean scores (percent) on a task after a stage.

    stage: 0 is zero-shot, t the model after the t-th task.  trained: what the stage trained on.  samples: evaluated.
    errors: profile to error type to the percent of the score lost to it.  predictions: SHA-256 of the file of answers;
    None where they are those of zero-shot, or of an earlier version.
    """

    stage: int
    trained: str
    task: str
    scorer: str
    samples: int
    strict: Percent
    paper: Percent
    errors: dict[str, dict[str, Percent]]
    predictions: str | None = None

    def __post_init__(self) -> None:
        for name in (self.trained, self.task):
            if not FileName.fits(name):
                raise ValueError(f"Expected {FileName.__doc__}, got {name!r:.60}")
        missing = [f"{p} {e}" for p in PROFILES for e in ERROR_TYPES if e not in self.errors.get(p, ())]
        if missing:
            raise ValueError(f"Expected errors of every profile and type, got none of {', '.join(missing)}")

    def score(self, profile: str) -> float:
        """The score under one of `PROFILES`."""
        return getattr(self, profile)


class TrainStep(Record, kw_only=True):
    """A row of train.jsonl: one optimizer step. tokens: supervised ones in its batch."""

    stage: int
    task: str = ""
    step: int
    loss: Finite
    text_loss: float | None = None
    image_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None


class Answer(Record, kw_only=True):
    """A row of predictions/<stage>/<task>.jsonl. image: generated, in the run folder; the others: of the data set.

    released_text: what the profile paper scores, where it is not the text.  image_sha256: of the generated image.
    """

    id: str
    instruction: str
    answer: str
    text: str
    image: RelativePath | None
    source_image: AnyPath | None
    target_image: AnyPath | None
    strict: Percent
    paper: Percent = 0.0
    error: str
    released_text: str | None = None
    image_sha256: str | None = None


class HeldOut(Record):
    """Scores on held-out sets, which no task trains.

    scores: a row a stage from zero-shot on, a column a set, None where not evaluated.  before, after: the first row and
    the last, where both are there.
    """

    tasks: list[FileName]
    scores: Matrix
    samples: dict[str, int] = field(default_factory=dict)
    before: Row | None = None
    after: Row | None = None

    def __post_init__(self) -> None:
        if any(row is not None and len(row) != len(self.tasks) for row in self.scores):
            raise ValueError(f"Expected rows of {len(self.tasks)} held-out sets")


SCORES, EXTRA, SEPARABILITY = "scores.jsonl", "extra_scores.jsonl", "separability.json"


class Routed(Record):
    """How well a nearest-centroid router finds the task.

    accuracy: percent of all samples.  confusion: a row a task, how many of its samples are assigned to each.
    """

    accuracy: Percent
    confusion: list[list[int]]


class Separability(Record):
    """separability.json: how separable the tasks are without training. centroids: samples that each is the mean of.

    question, image_and_question: what the router sees. split: of the samples that it assigns.
    """

    tasks: list[FileName]
    split: str
    centroids: list[int]
    question: Routed
    image_and_question: Routed

    def __post_init__(self) -> None:
        size = len(self.tasks)
        rows = [row for one in (self.question, self.image_and_question) for row in [one.confusion, *one.confusion]]
        if len(self.centroids) != size or any(len(row) != size for row in rows):
            raise ValueError(f"Expected centroids and confusions of {size} tasks")


class ProfileScores(Record):
    """The scores of a run under a second profile. zero_shot: stage 0; score_matrix: stages from 1 on.

    before_learnt: of each task right before its own stage, None where not measured.
    """

    score_matrix: Matrix | None = None
    zero_shot: Row | None = None
    metrics: dict[str, Percent | None] = field(default_factory=dict)
    error_matrix: dict[str, Matrix | None] | None = None
    before_learnt: Row | None = None
    held_out: HeldOut | None = None


class Usage(Record):
    """What a stage or a run took, None where it is not known. Times in seconds."""

    trainable_params: Finite | None = None
    stored_bytes: Finite | None = None
    optimizer_steps: Finite | None = None
    supervised_tokens: Finite | None = None
    total_seconds: Finite | None = None
    peak_memory_bytes: Finite | None = None
    peak_device_memory_bytes: Finite | None = None
    energy_joules: Finite | None = None
    train_seconds: Finite | None = None
    evaluate_seconds: Finite | None = None
    steps: Finite | None = None
    tokens: Finite | None = None
    seconds_per_step: Finite | None = None
    tokens_per_second: Finite | None = None


class StageUsage(Usage, kw_only=True):
    """A stage's row of cost.json."""

    task: str


class Cost(Usage):
    """cost.json, and "cost" in results.json."""

    stages: list[StageUsage] = field(default_factory=list)


class BranchBeta(Record):
    """Mean and standard deviation of beta, the share of its old value that a parameter keeps in a moving average."""

    mean: Percent
    std: Percent


class Merge(Record):
    """What the moving averages of one stage did, by branch."""

    task: str
    branches: dict[str, BranchBeta]


class Init(Record):
    """What a run started from, in results.json. tasks: those that it had learnt, which the run did not train."""

    name: str
    kind: str
    sha256: str
    tasks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        after = f", as the state after {', '.join(self.tasks)}" if self.tasks else ""
        return f"{self.name} (SHA-256 {self.sha256[:12]}){after}"


class DataSummary(Record):
    """The data of one task and split, in results.json. sha256: of the digests of the rows."""

    sha256: str
    rows: int


class Results(Record):
    """results.json. tasks: in training order. reads, writes: modalities by task. joint: all tasks trained at once."""

    method: str
    suite: str
    tasks: list[FileName]
    score_matrix: Matrix
    zero_shot: Row | None = None
    metrics: dict[str, Percent | None] = field(default_factory=dict)
    error_matrix: dict[str, Matrix | None] | None = None
    profile: str = "strict"
    profiles: dict[str, ProfileScores] | None = None
    reads: dict[str, list[str]] = field(default_factory=dict)
    writes: dict[str, list[str]] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    averaging: list[Merge] | None = None
    cost: Cost = field(default_factory=Cost)
    versions: dict[str, str | None] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    seed: int = 0
    joint: bool = False
    finished: bool = False
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    backbone: str = ""
    budget: str = ""
    order: str = ""
    split: str = ""
    data: dict[str, dict[str, DataSummary]] | None = None
    init: Init | None = None
    before_learnt: Row | None = None
    held_out: HeldOut | None = None

    def __post_init__(self) -> None:
        """Matrices as wide as there are tasks."""
        width, profiles = len(self.tasks), [self, *(self.profiles or {}).values()]
        matrices = [m for p in profiles for m in (p.score_matrix, *(p.error_matrix or {}).values()) if m is not None]
        rows = [row for matrix in matrices for row in matrix]
        rows += [row for profile in profiles for row in (profile.zero_shot, profile.before_learnt)]
        if not width or len(set(self.tasks)) < width or any(len(matrix) > width for matrix in matrices):
            raise ValueError("Expected distinct tasks, and a row a stage at most")
        merged = {merge.task for merge in self.averaging or []}
        if any(row is not None and len(row) != width for row in rows) or not merged <= {*self.tasks, "joint"}:
            raise ValueError(f"Expected rows and averages of its {width} tasks")


class ResolvedRecipe(Record):
    """The recipe in config.json, as far as it is read back. by_task: task to field to value."""

    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainable: str = "branches"


class Config(Record):
    """config.json: what decides a run's numbers, resolved. As far as it is read back."""

    method: str = ""
    suite: str = ""
    seed: int | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    backbone_options: dict[str, Any] = field(default_factory=dict)
    recipe: ResolvedRecipe = field(default_factory=ResolvedRecipe)


class LeftOutRows(Record):
    """Rows of the data that a run left out for one reason, in left_out.json. rows: the first of them."""

    count: int
    rows: list[str]


class Environment(Record):
    """environment.json: the machine and the versions of libraries, None where one is not installed."""

    versions: dict[str, str | None] = field(default_factory=dict)


class Estimate(Record):
    """An estimated average (percent) and the ends of its 95% interval."""

    estimate: Percent
    low: Percent
    high: Percent


class JudgeTable(Record, kw_only=True):
    """judge/<name>.json: averages of error types by a judge. unjudged: errors without a verdict.  estimates: by metric,
    where only a sample of the errors was judged.  predictions, sha256: see `runs.judge_tables`."""

    judge: str
    model: str | None = None
    prompts: str | None = None
    prompts_sha256: str | None = None
    profile: str | None = None
    complete: bool
    unjudged: int
    metrics: dict[str, Percent | None]
    estimates: dict[str, Estimate] | None = None
    predictions: dict[str, str] = field(default_factory=dict)
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.estimates and (missing := {"avg_hal", "avg_iuf", "avg_oth"} - self.estimates.keys()):
            raise ValueError(f"Expected estimates of every error type, got none of {', '.join(sorted(missing))}")

    @property
    def name(self) -> str:
        """The judge's model and prompts."""
        prompts = f", prompts {self.prompts} ({(self.prompts_sha256 or '')[:8]})" if self.prompts else ""
        return printable(f"{self.model or self.judge}{prompts}")


def convert(value: Any, kind: type[T], where: str | Path) -> T:
    """`records.convert` of something that a run wrote."""
    return records.convert(value, kind, where, ADVICE)


def read(path: Path, kind: type[T]) -> T:
    """`records.read` of a file that a run wrote. Raises UserError also where it was changed, see `seals.opened`."""
    anything: Any = Any
    cure = "restore it, or delete it: that section is then left out" if path.name == SEPARABILITY else seals.AGAIN
    return convert(seals.opened(records.read(path, anything, ADVICE), path, cure=cure), kind, path)


def read_object(path: Path, kind: type[Record]) -> dict[str, Any]:
    """The object in a JSON file with all of its keys, checked as a record. Raises UserError as `read`."""
    value = read(path, dict[str, Any])
    convert(value, kind, path)
    return value


def read_rows(path: Path, kind: type[T], advice: str = ADVICE) -> list[T]:
    """The rows of a JSONL file, none where it is missing; an unfinished last line is left out.

    Raises: UserError naming the file, the line and what in it is of another type.
    """
    try:
        *lines, _unfinished = read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            rows.append(records.convert(parse_json(line), kind, where, advice))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{where}: expected a JSON object ({error}); {advice}") from error
    return rows


def read_log(path: Path, kind: type[T]) -> list[T]:
    """`read_rows` of a log of a run. Raises UserError also for the first row that was changed, or is of another run."""
    rows = read_rows(path, kind)
    if rows:
        lines = path.read_bytes().split(b"\n")[:-1]
        whole = len(seals.intact(lines, seals.Chain(path.name, seals.run_of(path.parent))))
        if whole < len(lines):
            raise seals.Changed(
                f"{path}:{whole + 1} was changed since it was written, or is of another run; restore the file, or run "
                "the same command again, which says what it can measure anew"
            )
    return rows


def check_predictions(path: Path, sha256: str | None) -> None:
    """Raises UserError where a file of answers is not the one that was scored.

    Args: sha256: `StageScore.predictions`; None where it is not known.
    """
    if sha256 is None or (path.is_file() and seals.file_digest(path) == sha256):
        return
    what = "has changed since it was scored" if path.is_file() else "is missing, though scores.jsonl has its score"
    where = path.parents[1]
    if path.is_file() or where.is_dir():
        raise seals.Changed(f"{path} {what}; restore it, or delete {where}: the samples are then left out")


def check_image(path: Path, row: Answer) -> None:
    """Raises UserError where a generated image is not the one that was scored."""
    if row.image_sha256 is not None and not (path.is_file() and seals.file_digest(path) == row.image_sha256):
        what = "has changed since it was scored" if path.is_file() else "is missing"
        raise seals.Changed(f"{path} {what}; restore it, or delete {path.parents[2]}: the samples are then left out")
