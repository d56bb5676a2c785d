"""The items of the suite `next-real`: six tasks and a held-out set, from a seed.

What an item shows and how it asks are drawn from two streams: the splits ``test`` and ``reworded`` have the same
pictures and answers, in other wordings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from random import Random

from cnext.tasks.generated import DRAW, SHORT, Example, Generator, box_text
from cnext.tasks.next_real import material, pictures
from cnext.tasks.next_real.pictures import GROUNDS, PLACES, SIDE, TINTS, WORDS, Scene, Thing, article
from cnext.tasks.next_real.wordings import WORDINGS
from cnext.tasks.scenes import split_of

VERSION = 1
"""Increased when the same seed gives other items."""
EXPRESSIONS = ("the {a}", "the thing in the {place}", "the {a} in the {place}", "the thing to the {side} of the {a}")
"""What is to be found, for `grounding`."""


class Source:
    """What items are drawn from.

    content, wording: streams of random numbers, of what is shown and of how it is asked.
    split: whose photographs, words and handwritten digits are shown.
    names: the things.
    reworded: whether to ask in wordings that training does not have.
    """

    def __init__(self, content: Random, wording: Random, split: str, names: tuple[str, ...], reworded: bool) -> None:
        self.rng, self.split, self.names = content, split, names
        self._wording, self._reworded = wording, reworded

    def ask(self, kind: str, **parts: str) -> str:
        """A question of a kind, in one of its wordings."""
        return self._wording.choice(WORDINGS[kind][self._reworded]).format(**parts)


def vqa(source: Source, kinds: tuple[str, ...] = ("what", "count", "side", "which", "exists")) -> Example:
    """Which thing is where, how many there are, which is left or right of which, whether there is one."""
    rng = source.rng
    kind = rng.choice(kinds)
    if kind in ("side", "which"):
        scene = _side_by_side(source)
        left, right = scene.things[:2]
        place = rng.choice(("left", "right"))
        there, other = (left, right) if place == "left" else (right, left)
        if kind == "side":
            return Example(
                f"{source.ask(kind, place=place, a=other.name)} {SHORT}", there.name, scene, shows=scene.content
            )
        first, second = rng.sample((there.name, other.name), 2)
        return Example(
            f"{source.ask(kind, place=place, a=first, b=second)} {SHORT}", there.name, scene, shows=scene.content
        )
    scene = pictures.random_scene(rng, source.split, source.names, 1, 4 if kind == "count" else 3)
    thing = rng.choice(scene.things)
    if kind == "what":
        question, answer = source.ask(kind, place=thing.place), thing.name
    elif kind == "count":
        question, answer = source.ask(kind), str(len(scene.things))
    else:
        absent = rng.choice([name for name in source.names if name not in {one.name for one in scene.things}])
        there = rng.random() < 0.5
        question, answer = source.ask(kind, a=article(thing.name if there else absent)), "yes" if there else "no"
    return Example(f"{question} {SHORT}", answer, scene, shows=scene.content)


def _side_by_side(source: Source) -> Scene:
    """A scene whose first two things are beside each other, the left one first."""
    rng = source.rng
    row = rng.choice(("top", "bottom"))
    names = rng.sample(source.names, 2)
    things = tuple(
        pictures.random_thing(rng, name, f"{row} {side}") for name, side in zip(names, ("left", "right"), strict=True)
    )
    return Scene(things, pictures.random_ground(rng, source.split))


def classification(source: Source) -> Example:
    """Which of the things."""
    scene = pictures.single(source.rng, source.split, source.names)
    return Example(f"{source.ask('class')} {SHORT}", scene.things[0].name, scene, shows=scene.content)


def text_to_image(source: Source, most: int = 2) -> Example:
    """One thing or two, drawn from a caption."""
    scene = pictures.captioned(source.rng, source.names, most)
    return Example(DRAW, caption(source, scene), scene, shows=pictures.caption_key(scene))


def caption(source: Source, scene: Scene) -> str:
    """What a scene of `pictures.captioned` shows, in words. White backgrounds are not named."""
    names = [article(thing.name) for thing in scene.things]
    kind = "one" if len(names) == 1 else "beside" if scene.things[0].place == "left" else "above"
    text = source.ask(kind, **dict(zip("ab", names, strict=False)))
    return text if scene.ground.color == "white" else f"{text}, on {scene.ground.color}"


@cache
def words_of(split: str) -> tuple[str, ...]:
    """The words to read of a split."""
    return tuple(word for word in WORDS if split_of(word) == split)


@cache
def digits_of(split: str) -> tuple[int, ...]:
    """The indices of the handwritten digits of a split."""
    return tuple(i for i in range(len(material.digit_labels())) if pictures.split_of_digit(i) == split)


def reading(source: Source) -> Example:
    """A word in one of eight fonts, or a number in handwritten digits."""
    rng, split = source.rng, source.split
    if rng.random() < 0.7:
        lettering = pictures.random_lettering(rng, split, rng.choice(words_of(split)))
        return Example(f"{source.ask('word')} {SHORT}", lettering.word, lettering, shows=lettering.content)
    number = pictures.random_number(rng, split, digits_of(split))
    return Example(f"{source.ask('number')} {SHORT}", number.text, number, shows=number.content)


def grounding(source: Source, most: int = 3, expressions: tuple[str, ...] = EXPRESSIONS) -> Example:
    """The box of the thing that is named."""
    rng = source.rng
    expression = rng.choice(expressions)
    if "{side}" in expression:
        scene = _side_by_side(source)
        thing, other = rng.sample(scene.things[:2], 2)
        side = "left" if thing is scene.things[0] else "right"
        text = expression.format(side=side, a=other.name)
    else:
        scene = pictures.random_scene(rng, source.split, source.names, 1, most)
        thing = rng.choice(scene.things)
        text = expression.format(a=thing.name, place=thing.place)
    return Example(source.ask("box", a=text), box_text(thing.box, SIDE), scene, box=thing.box, shows=scene.content)


def editing(source: Source, kinds: tuple[str, ...] = ("replace", "recolor", "move")) -> Example:
    """A thing replaced, recolored, or moved to a free place."""
    rng = source.rng
    kind = rng.choice(kinds)
    scene = pictures.random_scene(rng, source.split, source.names, 1, 3)
    thing = rng.choice(scene.things)
    if kind == "replace":
        name = rng.choice([name for name in source.names if name not in {one.name for one in scene.things}])
        text, new = source.ask(kind, a=thing.name, b=article(name)), replace(thing, name=name)
    elif kind == "recolor":
        tint = rng.choice(list(TINTS))
        text, new = source.ask(kind, a=thing.name, b=tint), replace(thing, tint=tint)
    else:
        place = rng.choice([place for place in PLACES if place not in {one.place for one in scene.things}])
        (x, y), (old_x, old_y) = PLACES[place], PLACES[thing.place]
        moved = {"x": x + thing.x - old_x, "y": y + thing.y - old_y, "place": place}
        text, new = source.ask(kind, a=thing.name, place=place), replace(thing, **moved)
    return Example(text, "", scene, scene.swap(thing, new), shows=scene.content)


def skill(source: Source) -> Example:
    """What the small backbone was pretrained on, in the wordings of that, which no task has: a question about a
    scene, letters to read, or words to repeat."""
    rng = source.rng
    kind = rng.choice(("question", "question", "letters", "words"))
    if kind == "letters":
        text = "".join(rng.choices(material.LETTERS, k=3))
        return Example("Read letters", f"text: {text}", pictures.random_lettering(rng, source.split, text))
    if kind == "words":
        words = " ".join(rng.sample([*material.things(), *TINTS, *GROUNDS], rng.randint(1, 4)))
        return Example(f"Repeat: {words}", words, None)
    scene = pictures.random_scene(rng, source.split, seen_things())
    return Example(*about(rng, scene), scene, shows=scene.content)


@cache
def seen_things() -> tuple[str, ...]:
    """The things whose names the small backbone has learnt in pretraining: two of three."""
    return tuple(name for index, name in enumerate(material.things()) if index % 3 != 2)


def about(rng: Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene, in the wording of the pretraining, and its answer."""
    thing: Thing = rng.choice(scene.things)
    asked, answer = rng.choice(
        (
            (f"thing at {thing.place}", thing.name),
            ("how many", str(len(scene.things))),
            (f"place of {thing.name}", thing.place),
        )
    )
    if rng.random() < 0.5:
        return f"Short: {asked}", answer
    return f"Tell {asked}", f"it is {answer}"


TASKS: dict[str, Callable[[Source], Example]] = {
    "VQAv2": vqa,
    "ImageNet": classification,
    "Flickr30k": text_to_image,
    "OCRVQA": reading,
    "RefCOCO": grounding,
    "HQEdit": editing,
}
HELD_OUT: dict[str, Callable[[Source], Example]] = {"Skills": skill}


def examples(task: str, split: str, seed: int = 0) -> Iterator[Example]:
    """An endless, deterministic stream of a task's items of one split."""
    shown = "test" if split == "reworded" else split
    content, wording = (Random(f"next-real/{VERSION}/{seed}/{task}/{name}") for name in (shown, f"{split}/wording"))
    source = Source(content, wording, shown, material.things(), split == "reworded")
    while True:
        example = (TASKS | HELD_OUT)[task](source)
        if split_of(example.content) == shown:
            yield example


GENERATOR = Generator(
    name="next-real",
    version=str(VERSION),
    side=SIDE,
    tasks=tuple(TASKS),
    held_out=tuple(HELD_OUT),
    splits=("test", "validation", "reworded"),
    examples=examples,
    draw=pictures.draw,
)
