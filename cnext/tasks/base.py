"""Data classes of tasks: Sample, Task, Recipe and Suite."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from cnext.errors import UserError, unknown
from cnext.records import Count, Fraction

IMAGE_POSITIONS = ("first", "random")
PROMPTS = ("released", "consistent")
IMAGE_FILTERS = ("none", "released")
TRAINABLE = ("branches", "connections", "released")
PRECISIONS = ("float32", "bfloat16", "float16")
LOSS_MEANS = ("batch", "micro-batch")
DRAWS = ("sample", "epoch")
BY_TASK = ("batch_size", "micro_batch_size", "learning_rate", "warmup_steps")
"""Fields of a `Recipe` that may differ from task to task."""
LEARNING_RATES = (1e-12, 100.0)
"""The least and the greatest learning rate."""
LARGEST_BATCH = 2**20
Beta = Annotated[float, Meta(ge=0, lt=1)]
Batch = Annotated[int, Meta(ge=1, le=LARGEST_BATCH)]
Steps = Annotated[int, Meta(ge=0, le=10**9)]
_DRAW = re.compile(r"\A\s*please generate the image\s*[:.]\s*", re.IGNORECASE)


def caption_of(instruction: str) -> str:
    """The instruction without a leading "Please generate the image:" (or with a period): the caption."""
    return _DRAW.sub("", instruction)


class DataError(UserError):
    """Malformed data files; the message names every file, line and reason."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: an instruction and its reference answer, "" where an image is expected."""

    instruction: str
    answer: str = ""


@dataclass(frozen=True)
class Sample:
    """One training or test item.

    image: path of the image that is read, or None.  target_image: of the image to write, or None.
    size: width and height of the original image in pixels, for boxes.
    origin: "file:line" (JSONL) or "file#index" (JSON), for error messages.
    image_first: whether the image that is read comes before the first instruction, or after it.
    tiled: whether a backbone that splits images into tiles may split it; as released, not where an image is written.
    prompt: the instruction in tests, if it differs from the first turn's, by which the answer is scored; otherwise "".
    references: all accepted answers to the first instruction, if there are several.
    category: the row's "answer_type", the kind of question; "" if it has none.
    media: paths of what is read in modalities other than text and image, by modality.
    asks_image: whether an image is to be written that is not known, as in a question to answer.
    draw: what a phrase that announces an image in training is drawn by: "" for the id, None where none is, as the first
        turn's answer is the phrase even if it is empty.
    redraws: what is drawn anew in every epoch of training, see `drawn`: "image_first", "phrase".
    """

    id: str
    turns: tuple[Turn, ...]
    image: Path | None = None
    target_image: Path | None = None
    size: tuple[int, int] | None = None
    origin: str = ""
    image_first: bool = True
    tiled: bool = True
    prompt: str = ""
    references: tuple[str, ...] = ()
    category: str = ""
    media: Mapping[str, Path] = field(default_factory=dict, hash=False)
    asks_image: bool = False
    draw: str | None = ""
    redraws: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        """Whether an image is to be written, known or not."""
        return self.asks_image or self.target_image is not None

    @property
    def images(self) -> list[Path]:
        """Paths of the images to read and to write, without repetition."""
        return sorted({path for path in (self.image, self.target_image) if path is not None})

    @property
    def answers(self) -> tuple[str, ...]:
        """The accepted answers to the first instruction, at least one."""
        return self.references or (self.turns[0].answer,)

    def drawn(self, key: str) -> Sample:
        """The sample with what ``redraws`` names drawn by a key: the seed and the number of the epoch."""
        key = f"{key}/{self.id}"
        place = hashlib.sha256(f"place/{key}".encode()).digest()[0] & 1
        return replace(
            self,
            image_first=bool(place) if "image_first" in self.redraws else self.image_first,
            draw=key if "phrase" in self.redraws else self.draw,
            redraws=(),
        )


@dataclass(frozen=True)
class Task:
    """A task: the modalities it reads and writes, its files, and how its answers are scored.

    reads, writes: modalities of the suite: "text", "image" or both, unless the suite declares others.
    format: name of a reader in ``cnext.tasks.readers.READERS``, or "module:function".
    scorer: name of a scorer in ``cnext.scoring.make_scorers()``, or "module:function".
    train, test, validation, reworded: paths or glob patterns relative to the data folder. reworded: the items of test
        in wordings that training does not have.
    train_images, test_images: image folders relative to the data folder, or absolute; "": the data folder.
    max_new_tokens: most text tokens of an answer.
    references: a file with several answers per test item. In COCO's format, captions of item k have image_id k, from 1;
        in TextVQA's, answers have the item's question_id. A row's own list of answers serves where the file is missing.
    image_position: "first", or "random" for before or after the first instruction of a training sample, by a hash of
        its id. Always "first" in tests.
    prompts: of tasks that write images. "released" keeps the files' wording, which differs between training and test;
        "consistent" begins all instructions alike and ignores test_prefix.
    image_filter: "none", or "released" to leave out training samples by the size of the image that is read, as the
        paper's code does for editing, see ``cnext.tasks.images.unfit``.
    length_filter: training samples of so many tokens or more are left out, as by the paper's code, where the backbone
        counts as that does (seed-x); 0: none.
    test_prefix: what the released evaluation prepends to the instruction of a test item.
    train_count, test_count: published numbers of rows, 0 if unknown.  source: where the images come from.
    folder: of the suite, with the modules that format and scorer name; no field of a manifest.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    format: str
    scorer: str
    train: str
    test: str
    train_images: str = ""
    test_images: str = ""
    validation: str = ""
    reworded: str = ""
    max_new_tokens: Annotated[int, Meta(ge=1, le=2**20)] = 32
    description: str = ""
    references: str = ""
    image_position: str = "first"
    prompts: str = "released"
    image_filter: str = "none"
    length_filter: Count = 0
    test_prefix: str = ""
    train_count: Count = 0
    test_count: Count = 0
    source: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        named = {"image_position": IMAGE_POSITIONS, "prompts": PROMPTS, "image_filter": IMAGE_FILTERS}
        for name, valid in named.items():
            if getattr(self, name) not in valid:
                raise unknown(f"{name} of task {self.name}", getattr(self, name), valid)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the task has files for."""
        return tuple(split for split in ("train", "test", "validation", "reworded") if getattr(self, split))

    def image_folder(self, split: str) -> str:
        """The image folder of a split, relative to the data folder or absolute."""
        return self.train_images if split == "train" else self.test_images


ImageNeed = Callable[[tuple[int, int]], str]
"""Why a backbone cannot read an image of this width and height, "" if it can."""


def any_size(size: tuple[int, int]) -> str:
    """The `ImageNeed` of a backbone that reads every image."""
    return ""


def joined(tasks: Sequence[Task]) -> Task:
    """Several tasks as one that reads and writes the modalities of all of them, for joint training."""
    reads, writes = (tuple(dict.fromkeys(m for t in tasks for m in getattr(t, side))) for side in ("reads", "writes"))
    return replace(tasks[0], name="joint", reads=reads, writes=writes)


@dataclass(frozen=True)
class Recipe:
    """How a suite's tasks are trained on one budget.

    steps: optimizer steps per task.  train_samples, test_samples: samples per task (0: all).
    batch_size: samples of an optimizer step, over all processes.  micro_batch_size: samples per forward pass in each
        process; gradients are accumulated (0: all of a process's samples at once).
    learning_rate, betas, eps, weight_decay, max_grad_norm: of AdamW, and of gradient clipping.
    schedule: name of a learning-rate schedule: ``warmup_steps`` up, then down to ``min_learning_rate_ratio``.
    trainable: what is trained beside the method's own parameters: "branches" (nothing), "connections" (the layers
        between visual parts and language model) or "released" (these, embeddings, output head and norms).
    precision: of the frozen model and of its forward pass. What is trained is kept in float32. "float16" is for runs
        that train nothing, as the authors' evaluation has it.
    loss_mean: "batch": the mean over the supervised tokens and pictures of the whole batch, however it is divided; or
        "micro-batch": the mean of the micro-batches' means, as gradient accumulation usually has it.
    decay_frozen: whether weight decay also shrinks the method's parameters that the task freezes, and those that a step
        does not use: as released, where the optimizer has all of them in one flat tensor.
    checkpointing: activation checkpointing: recompute activations in the backward pass, to save memory.
    draws: whether the place of an image beside a question, and the phrase before an image to write, where these are
        drawn, are so once per "sample", or in every "epoch", as by the paper's code.
    by_task: values that differ for a task: its name to fields of this class.
    hyperparameters: of methods, where their defaults here are others than the method's own: its name to values.
    """

    steps: dict[str, Steps]
    train_samples: Count = 0
    test_samples: Count = 0
    batch_size: Batch = 16
    learning_rate: Annotated[float, Meta(ge=LEARNING_RATES[0], le=LEARNING_RATES[1])] = 1e-4
    min_learning_rate_ratio: Fraction = 0.05
    warmup_steps: Steps = 8
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Meta(ge=1e-30, le=1)] = 1e-6
    weight_decay: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    max_grad_norm: Annotated[float, Meta(ge=1e-9, le=1e30)] = 1.0
    micro_batch_size: Annotated[int, Meta(ge=0, le=LARGEST_BATCH)] = 0
    schedule: str = "cosine"
    trainable: str = "branches"
    precision: str = "float32"
    checkpointing: bool = False
    loss_mean: str = "batch"
    decay_frozen: bool = False
    draws: str = "sample"
    by_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    hyperparameters: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {"trainable": TRAINABLE, "precision": PRECISIONS, "loss_mean": LOSS_MEANS, "draws": DRAWS}
        for name, valid in names.items():
            if getattr(self, name) not in valid:
                raise unknown(f"{name} of the budget", getattr(self, name), valid)
        for name, least in (("batch_size", 1), ("micro_batch_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for task, different in self.by_task.items():
            for name in different:
                if name not in BY_TASK:
                    raise unknown(f"field of the budget for {task}", name, BY_TASK)

    def of(self, task: str) -> Recipe:
        """The recipe of one task, with the values of ``by_task``."""
        return replace(self, **self.by_task.get(task, {}), by_task={})


@dataclass(frozen=True)
class Suite:
    """A list of tasks, their named orders, and one training recipe per budget.

    synthetic: name of the generator of the data folder, "" if the user supplies the data.
    clip: the CLIP model that scores images, see ``cnext.scoring.make_scorers``.
    backbone: the one that is trained where none is named.
    modalities: what its tasks may read and write, see ``cnext.adapters.branch_roles``.
    held_out: sets that no task trains, scored at every stage: how much of its general ability the model keeps.
    source, license: of the annotations; "" if unknown.
    """

    name: str
    description: str
    tasks: tuple[Task, ...]
    orders: dict[str, tuple[str, ...]]
    budgets: dict[str, Recipe]
    synthetic: str = ""
    clip: str = "openai/ViT-B-32"
    backbone: str = "tiny"
    modalities: tuple[str, ...] = ("text", "image")
    source: str = ""
    license: str = ""
    held_out: tuple[Task, ...] = ()

    @property
    def sets(self) -> tuple[Task, ...]:
        """The tasks, and the held-out sets."""
        return self.tasks + self.held_out

    def task(self, name: str) -> Task:
        """The task or held-out set of that name. Raises UserError with the tasks' names."""
        for task in self.sets:
            if task.name == name:
                return task
        raise unknown("task", name, [task.name for task in self.tasks])


def stand_in(name: str) -> Task:
    """A task with a name and nothing else: methods attach branches by the number and names of tasks."""
    return Task(name, (), (), format="", scorer="", train="", test="", train_images="", test_images="")
