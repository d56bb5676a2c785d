"""Generates the data of the synthetic suite `next-tiny`: six small tasks in the paper's file formats, from a seed,
and a held-out set of what the tiny backbone was pretrained on.

Layout of the folder: ``<task>/annotations/train_001.jsonl``, ``<task>/questions/{test,validation}.json`` and
``<task>/images/{train,test,validation}/*.png`` (HQEdit: ``images/{source,target}_images/``).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from cnext.tasks import cached_folders, scenes
from cnext.tasks.scenes import COLORS, ICONS, PLACES, SHAPES, SIZE, WORDS, Icon, Lettering, Scene, Thing, article

SHORT = "Answer the question using a single word or phrase."
DRAW = "Please generate the image:"
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes:"
FORMAT_VERSION = 1
"""Increased when the same seed gives other examples."""
FOLDER_VERSION = f"{FORMAT_VERSION}.1"
"""Changed when a folder has other files, so that old ones are not reused."""


@dataclass(frozen=True)
class Example:
    """One item before it is written. content: determines its split, see `scenes.split_of`."""

    instruction: str
    answer: str
    picture: Scene | Icon | Lettering | None
    target: Scene | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def content(self) -> str:
        return self.answer if self.instruction == DRAW or self.picture is None else scenes.key(self.picture)


def vqa(rng: Random, kinds: tuple[str, ...] = ("color", "shape", "count", "place", "exists")) -> Example:
    scene = scenes.random_scene(rng)
    thing = rng.choice(scene.things)
    kind = rng.choice(kinds)
    if kind == "color":
        question, answer = f"What color is the {thing.shape}?", thing.color
    elif kind == "shape":
        question, answer = f"What shape is the {thing.color} object?", thing.shape
    elif kind == "count":
        question, answer = "How many objects are there?", str(len(scene.things))
    elif kind == "place":
        question, answer = f"What object is in the {thing.place}?", thing.shape
    else:
        asked = thing if rng.random() < 0.5 else replace(thing, color=rng.choice(list(COLORS)))
        question = f"Is there {article(asked.color)} {asked.shape}?"
        answer = "yes" if asked.color == thing.color else "no"
    return Example(f"{question} {SHORT}", answer, scene)


def classification(rng: Random, names: tuple[str, ...] = tuple(ICONS)) -> Example:
    icon = scenes.random_icon(rng, names)
    return Example(f"What is the object in the image? {SHORT}", icon.name, icon)


def text_to_image(rng: Random, most: int = 2) -> Example:
    scene = scenes.random_scene(rng, 1, most)
    return Example(DRAW, scene.caption, scene)


def reading(rng: Random, words: tuple[str, ...] = tuple(WORDS)) -> Example:
    word = rng.choice(words)
    return Example(f"What word is written in the image? {SHORT}", word, scenes.random_lettering(rng, word))


def box_text(thing: Thing) -> str:
    """An object's box in the benchmark's format: "[x1,y1,x2,y2]", relative to the image's side, with two decimals."""
    return "[" + ",".join(f"{min(max(edge / SIZE, 0.0), 0.99):.2f}" for edge in thing.box) + "]"


def grounding(rng: Random, most: int = 3) -> Example:
    scene = scenes.random_scene(rng, 1, most)
    thing = rng.choice(scene.things)
    expression = rng.choice(
        (
            f"the {thing.color} {thing.shape}",
            f"the {thing.shape}",
            f"the {thing.color} object",
            f"the object in the {thing.place}",
        )
    )
    return Example(f"{LOCATE} {expression}.", box_text(thing), scene, box=thing.box)


def editing(rng: Random, kinds: tuple[str, ...] = ("color", "shape", "remove", "add")) -> Example:
    kind = rng.choice(kinds)
    scene = scenes.random_scene(rng, 2 if kind == "remove" else 1, 2 if kind == "add" else 3)
    thing = rng.choice(scene.things)
    taken = [{getattr(t, name) for t in scene.things} for name in ("shape", "color", "place")]
    shape, color, place = (
        rng.choice([name for name in pool if name not in used])
        for pool, used in zip((SHAPES, COLORS, PLACES), taken, strict=True)
    )
    if kind == "color":
        text, target = (
            f"Change the color of the {thing.shape} to {color}.",
            scene.swap(thing, replace(thing, color=color)),
        )
    elif kind == "shape":
        text, target = f"Turn the {thing.shape} into a {shape}.", scene.swap(thing, replace(thing, shape=shape))
    elif kind == "remove":
        text, target = f"Remove the {thing.shape}.", scene.without(thing)
    else:
        new = scenes.random_thing(rng, shape, color, place)
        text, target = f"Add {article(color)} {shape} in the {place}.", replace(scene, things=(*scene.things, new))
    return Example(text, "", scene, target)


def skill(rng: Random) -> Example:
    """What the tiny backbone was pretrained on, in the wordings of that, which no task has.

    Questions about a scene (two of four), letters to read, and words to repeat.
    """
    kind = rng.choice(("question", "question", "letters", "words"))
    if kind == "letters":
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3))
        return Example("Read letters", f"text: {word}", scenes.random_lettering(rng, word))
    if kind == "words":
        words = " ".join(rng.sample([*COLORS, *SHAPES, *ICONS], rng.randint(1, 4)))
        return Example(f"Say: {words}", words, None)
    scene = scenes.random_scene(rng)
    return Example(*about(rng, scene), scene)


def about(rng: Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene, in the wording of the pretraining, and its answer."""
    thing = rng.choice(scene.things)
    asked, answer = rng.choice(
        (
            (f"color of {thing.shape}", thing.color),
            (f"shape of {thing.color}", thing.shape),
            (f"shape at {thing.place}", thing.shape),
            (f"color at {thing.place}", thing.color),
            ("how many", str(len(scene.things))),
        )
    )
    if rng.random() < 0.5:
        return f"Short: {asked}", answer
    return f"Tell me {asked}", f"it is {answer}"


EXAMPLES: dict[str, Callable[[Random], Example]] = {
    "VQAv2": vqa,
    "ImageNet": classification,
    "Flickr30k": text_to_image,
    "OCRVQA": reading,
    "RefCOCO": grounding,
    "HQEdit": editing,
}
HELD_OUT: dict[str, Callable[[Random], Example]] = {"Skills": skill}
"""What no task trains."""


def examples(task: str, split: str, seed: int = 0) -> Iterator[Example]:
    """An endless, deterministic stream of a task's examples of one split."""
    rng = Random(f"next-tiny/{FORMAT_VERSION}/{seed}/{task}/{split}")
    while True:
        example = (EXAMPLES | HELD_OUT)[task](rng)
        if scenes.split_of(example.content) == split:
            yield example


def _save(pixels: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, compress_level=1)


def _write_task(folder: Path, task: str, split: str, count: int, seed: int) -> None:
    edit = task == "HQEdit"
    roots = [folder / "images" / name / split for name in (("source_images", "target_images") if edit else ("",))]
    for root in roots:
        root.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for index, example in zip(range(count), examples(task, split, seed), strict=False):
        name = f"{split}/{index:05d}.png"
        if example.picture is not None:
            _save(scenes.draw(example.picture), roots[0] / f"{index:05d}.png")
        if edit:
            assert example.target is not None
            _save(scenes.draw(example.target), roots[1] / f"{index:05d}.png")
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
                row["size"] = [SIZE, SIZE]
                row["origin_answer_bbox"] = f"[{x1:.2f},{y1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}]"
                row["answer_bbox"] = example.answer
            elif task == "Flickr30k":
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


def write_next_tiny(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Writes the suite's six tasks and its held-out set to ``folder`` atomically, unless they are there unchanged.

    Args:
        train, test: samples per task; validation has as many as test.

    Returns:
        The folder.
    """
    if cached_folders.intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for task in EXAMPLES:
            for split, count in (("train", train), ("test", test), ("validation", test)):
                _write_task(unfinished / task, task, split, count, seed)
        for name in HELD_OUT:
            for split in ("test", "validation"):
                _write_task(unfinished / name, name, split, test, seed)
        cached_folders.seal(unfinished)
        cached_folders.place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


GENERATORS: dict[str, Callable[[Path, int, int], Path]] = {"next-tiny": write_next_tiny}
"""Generators that a suite's ``synthetic`` may name: functions of (folder, training samples, test samples) per task."""
