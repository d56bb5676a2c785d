"""The items of the suite `next-tiny`: six small tasks in the paper's file formats, from a seed, and a held-out set of
what the tiny backbone was pretrained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from cnext.tasks import scenes
from cnext.tasks.generated import DRAW, SHORT, Example, Generator, box_text
from cnext.tasks.scenes import COLORS, ICONS, PLACES, SHAPES, SIZE, WORDS, Scene, article

LOCATE = "Please provide the bounding box coordinate of the region this sentence describes:"
FORMAT_VERSION = 1
"""Increased when the same seed gives other examples."""


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
    return Example(DRAW, scene.caption, scene, shows=scene.caption)


def reading(rng: Random, words: tuple[str, ...] = tuple(WORDS)) -> Example:
    word = rng.choice(words)
    return Example(f"What word is written in the image? {SHORT}", word, scenes.random_lettering(rng, word))


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
    return Example(f"{LOCATE} {expression}.", box_text(thing.box, SIZE), scene, box=thing.box)


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


GENERATOR = Generator(
    name="next-tiny",
    version=f"{FORMAT_VERSION}.1",
    side=SIZE,
    tasks=tuple(EXAMPLES),
    held_out=tuple(HELD_OUT),
    splits=("test", "validation"),
    examples=examples,
    draw=scenes.draw,
)


def write_next_tiny(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Writes the suite's data to ``folder``, as `Generator.write` does."""
    return GENERATOR.write(folder, train, test, seed)
