"""Suites whose data are generated from a seed: their items, and the files that these are written to.

Layout of the folder, as of the paper's data: ``<task>/annotations/train_001.jsonl``, ``<task>/questions/<split>.json``
and ``<task>/images/<split>/*.png`` (HQEdit: ``images/{source,target}_images/``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from cnext.errors import UserError, unknown
from cnext.tasks import cached_folders, croissant
from cnext.tasks.base import Suite

SHORT = "Answer the question using a single word or phrase."
DRAW = "Please generate the image:"
GENERATORS = {"next-tiny": "cnext.tasks.synthetic", "next-real": "cnext.tasks.next_real.examples"}
"""Generators that a suite's ``synthetic`` may name, and the modules that have them as ``GENERATOR``."""


@dataclass(frozen=True)
class Example:
    """One item before it is written.

    picture, target: descriptions of the images read and written, which the generator draws. Of `DRAW`, picture is what
        is to be drawn, and answer its caption.
    box: (x1, y1, x2, y2) in pixels.
    shows: what determines its split; "": the whole description of its picture, or its answer where it has none.
    """

    instruction: str
    answer: str
    picture: Any | None
    target: Any | None = None
    box: tuple[float, float, float, float] | None = None
    shows: str = ""

    @property
    def content(self) -> str:
        """What determines its split."""
        return self.shows or (self.answer if self.picture is None else repr(self.picture))


def box_text(box: tuple[float, float, float, float], side: int) -> str:
    """A box in the benchmark's format: "[x1,y1,x2,y2]", relative to the image's side, with two decimals."""
    return "[" + ",".join(f"{min(max(edge / side, 0.0), 0.99):.2f}" for edge in box) + "]"


@dataclass(frozen=True)
class Generator:
    """What makes the items of a suite.

    version: changed when the same seed gives other items.
    side: width and height of its images in pixels.
    tasks, held_out: names.  splits: those to evaluate.
    examples: an endless, deterministic stream of the items of a task and split, from a seed.
    draw: the pixels of a description, (side, side, 3) uint8.
    """

    name: str
    version: str
    side: int
    tasks: tuple[str, ...]
    held_out: tuple[str, ...]
    splits: tuple[str, ...]
    examples: Callable[[str, str, int], Iterator[Example]]
    draw: Callable[[Any], Any]

    def write(self, folder: Path, train: int, test: int, seed: int = 0) -> Path:
        """Writes the suite's tasks and held-out sets to ``folder`` atomically, unless they are there unchanged.

        Args:
            train, test: samples per task; each split that is evaluated has as many as test.

        Returns:
            The folder.
        """
        if cached_folders.intact(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for task in (*self.tasks, *self.held_out):
                splits = {**({"train": train} if task in self.tasks else {}), **dict.fromkeys(self.splits, test)}
                for split, count in splits.items():
                    if split != "reworded" or task in self.tasks:
                        self._write_task(unfinished / task, task, split, count, seed)
            cached_folders.seal(unfinished)
            cached_folders.place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return folder

    def _write_task(self, folder: Path, task: str, split: str, count: int, seed: int) -> None:
        edit, fresh = task == "HQEdit", split != "reworded"  # whose pictures are those of test
        shown = split if fresh else "test"
        roots = [folder / "images" / name / shown for name in (("source_images", "target_images") if edit else ("",))]
        for root in roots:
            root.mkdir(parents=True, exist_ok=not fresh)
        rows: list[dict[str, Any]] = []
        for index, example in enumerate(islice(self.examples(task, split, seed), count)):
            name = f"{shown}/{index:05d}.png"
            for root, picture in zip(roots, (example.picture, example.target), strict=False):
                if fresh and picture is not None:
                    save(self.draw(picture), root / f"{index:05d}.png")
            if edit:
                row: dict[str, Any] = {
                    "source_image": f"source_images/{name}",
                    "target_image": f"target_images/{name}",
                    "instruction": example.instruction,
                }
            elif split == "train":
                row = {"image": name, "data": [example.instruction, example.answer]}
            else:
                row = {"question_id": f"{task}-{split}-{index:05d}", "image": name, "text": example.instruction}
                row |= {} if example.picture else {"image": None}
                if example.box is not None:
                    x1, y1, x2, y2 = example.box
                    row["size"] = [self.side, self.side]
                    row["origin_answer_bbox"] = f"[{x1:.2f},{y1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}]"
                    row["answer_bbox"] = example.answer
                elif example.instruction == DRAW:
                    row["text"] = f"{example.instruction} {example.answer}"
                else:
                    row["answer"] = example.answer
            rows.append(row)
        if split == "train":
            path = folder / "annotations" / "train_001.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            path = folder / "questions" / f"{split}.json"
            text = json.dumps(rows, indent=1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def save(pixels: Any, path: Path) -> None:
    """Writes an image as PNG, quickly."""
    from PIL import Image

    Image.fromarray(pixels).save(path, compress_level=1)


def generator(name: str) -> Generator:
    """The generator of that name, one of `GENERATORS`."""
    return import_module(GENERATORS[name]).GENERATOR


def write_folder(suite: Suite, preset: str, folder: Path, seed: int = 0) -> Path:
    """Writes the files of a generated suite to a new folder, with Croissant metadata, ``croissant.json``.

    Args:
        preset: name of training settings, whose numbers of items are written.

    Returns:
        The folder.

    Raises:
        UserError: the suite is not generated, the preset is unknown, or the folder exists.
    """
    if suite.synthetic not in GENERATORS:
        raise unknown("generated suite", suite.name, list(GENERATORS))
    if preset not in suite.budgets:
        raise unknown("preset", preset, list(suite.budgets))
    if folder.exists():
        raise UserError(f"expected a folder that does not exist, {folder} does; give another --out")
    made, recipe = generator(suite.synthetic), suite.budgets[preset]
    made.write(folder, recipe.train_samples, recipe.test_samples, seed)
    text = json.dumps(croissant.metadata(suite, folder, made.version), indent=1, ensure_ascii=False)
    (folder / croissant.FILE).write_text(text + "\n", encoding="utf-8")
    return folder
