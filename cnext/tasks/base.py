"""Base types of tasks: a Sample, a Task (what it reads and writes), and a Suite of tasks in an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnext.errors import UserError, unknown


class DataError(UserError):
    """Malformed data; the message names every offending file, line and reason."""


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation: an instruction and the answer expected to it ("" where an image is asked)."""

    instruction: str
    answer: str = ""


@dataclass(frozen=True)
class Sample:
    """One training or test item, as read from a file.

    image: the image that is read, or None.  target_image: the image that should be written, or None.
    size: width and height in pixels of the original image, where boxes are given relative to it.
    origin: "file:line" (JSONL) or "file#index" (JSON), for error messages.
    """

    id: str
    turns: tuple[Turn, ...]
    image: Path | None = None
    target_image: Path | None = None
    size: tuple[int, int] | None = None
    origin: str = ""


@dataclass(frozen=True)
class Task:
    """One task: the modalities it reads and writes, where its files are, and how answers are scored.

    format: the reader of its files, a key of ``cnext.tasks.formats.READERS``.
    scorer: a name that ``cnext.scoring.make_scorers`` gives.
    train, test, validation: paths or glob patterns relative to the data folder.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    format: str
    scorer: str
    train: str
    test: str
    train_images: str
    test_images: str
    validation: str = ""
    max_new_tokens: int = 32
    description: str = ""


def joined(tasks: Sequence[Task]) -> Task:
    """Several tasks as one that reads and writes whatever any of them does, for joint training."""
    reads, writes = (tuple(dict.fromkeys(m for t in tasks for m in getattr(t, side))) for side in ("reads", "writes"))
    return replace(tasks[0], name="joint", reads=reads, writes=writes)


@dataclass(frozen=True)
class Recipe:
    """How a suite's tasks are trained on one budget.

    steps: optimizer steps per task.  train_samples, test_samples: samples per task (0 = all).
    """

    steps: dict[str, int]
    train_samples: int = 0
    test_samples: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-4
    min_learning_rate_ratio: float = 0.05
    warmup_steps: int = 8
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Suite:
    """A list of tasks, their named orders, and one training recipe per budget.

    synthetic: name of the generator that writes the data folder, "" where the user supplies it.
    clip: the CLIP model that scores pictures, as ``cnext.scoring.make_scorers`` takes it.
    """

    name: str
    description: str
    tasks: tuple[Task, ...]
    orders: dict[str, tuple[str, ...]]
    budgets: dict[str, Recipe]
    synthetic: str = ""
    clip: str = "openai/ViT-B-32"

    def task(self, name: str) -> Task:
        """The task of that name. Raises UserError with the valid names."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise unknown("task", name, [task.name for task in self.tasks])
