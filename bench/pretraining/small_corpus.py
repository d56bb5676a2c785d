"""Pretraining corpus of the small backbone: pictures of the `pretrain` split, and instructions about them.

As of the tiny backbone: skills in wordings of its own, with the names of two of three things; and then, for a part of
the batch, a part of the wordings of `next-real` on narrower data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from cnext.tasks.generated import DRAW, SHORT, Example
from cnext.tasks.next_real import examples, material, pictures
from cnext.tasks.next_real.examples import Source, digits_of, seen_things
from cnext.tasks.next_real.pictures import GROUNDS, PLACES, SIDE, TINTS, Picture, Scene, article
from cnext.tasks.next_real.wordings import WORDINGS
from cnext.tasks.scenes import split_of

SPLIT = "pretrain"
Item = tuple[str, str, Picture | None, Picture | None]
"""Instruction, answer, input image and output image."""
OWN = (
    "describe short tell thing at how many place of where find x y w h read letters text number draw swap tint shift "
    "copy repeat left right top bottom above below middle on it is and the a an some in to with yes no"
).split()
"""Words of the corpus's own wordings."""


def vocabulary() -> list[str]:
    """All words of the suite and of the corpus: the tokens of the small backbone."""
    texts = [wording for lists in WORDINGS.values() for part in lists for wording in part]
    texts += [SHORT, DRAW, *PLACES, *examples.EXPRESSIONS]
    asked = {word for text in texts for word in re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text.lower()))}
    return sorted({*asked, *OWN, *TINTS, *GROUNDS, *material.things()})


def new_scene(rng: Random, names: tuple[str, ...], fewest: int = 1, most: int = 3, tinted: float = 0.15) -> Scene:
    """A random scene of the `pretrain` split; some of its things in shades of one color."""
    while True:
        scene = pictures.random_scene(rng, SPLIT, names, fewest, most)
        if split_of(scene.content) != SPLIT:
            continue
        for thing in scene.things:
            if rng.random() < tinted:
                scene = scene.swap(thing, replace(thing, tint=rng.choice(list(TINTS))))
        return scene


def new_single(rng: Random, names: tuple[str, ...]) -> Scene:
    """One large thing, of the `pretrain` split."""
    while True:
        scene = pictures.single(rng, SPLIT, names)
        if split_of(scene.content) == SPLIT:
            return scene


def new_captioned(rng: Random, names: tuple[str, ...], most: int = 2) -> Scene:
    """A scene to draw, of the `pretrain` split."""
    while True:
        scene = pictures.captioned(rng, names, most)
        if split_of(pictures.caption_key(scene)) == SPLIT:
            return scene


def new_letters(rng: Random, fewest: int = 3, most: int = 4) -> pictures.Lettering:
    """Random letters in one of the fonts, of the `pretrain` split, and so no word of another."""
    while True:
        text = "".join(rng.choices(material.LETTERS, k=rng.randint(fewest, most)))
        if split_of(text) == SPLIT:
            return pictures.random_lettering(rng, SPLIT, text)


def new_number(rng: Random) -> pictures.Number:
    """A number in handwritten digits of the `pretrain` split."""
    return pictures.random_number(rng, SPLIT, digits_of(SPLIT))


def told(scene: Scene) -> str:
    """What a scene shows, in words: names, tints, places and the background."""
    parts = [f"{article(' '.join(filter(None, (t.tint, t.name))))} {t.place}".strip() for t in scene.things]
    ground = scene.ground.color if not scene.ground.photograph else ""
    return " and ".join(parts) + (f" on {ground}" if ground else "")


def _description(rng: Random) -> Item:
    scene = new_scene(rng, seen_things())
    return "Describe.", " and ".join(f"{t.name} {t.place}" for t in scene.things), scene, None


def _question(rng: Random) -> Item:
    scene = new_scene(rng, seen_things())
    return *examples.about(rng, scene), scene, None


def _name(rng: Random) -> Item:
    scene = new_single(rng, seen_things())
    return rng.choice(("Tell thing", "Short: thing")), scene.things[0].name, scene, None


def _presence(rng: Random) -> Item:
    names = seen_things()
    scene = new_scene(rng, names)
    there = rng.random() < 0.5
    shown = {thing.name for thing in scene.things}
    asked = rng.choice(sorted(shown) if there else [name for name in names if name not in shown])
    return f"Find {asked}: yes or no", "yes" if there else "no", scene, None


def _location(rng: Random) -> Item:
    scene = new_scene(rng, seen_things())
    thing = rng.choice(scene.things)
    x1, y1, x2, y2 = (min(max(round(100 * edge / SIDE), 0), 99) for edge in thing.box)
    asked = rng.choice((thing.name, f"thing {thing.place}"))
    return f"Where is {asked}", f"x {x1:02d} y {y1:02d} x {x2:02d} y {y2:02d}", scene, None


def _spelling(rng: Random) -> Item:
    lettering = new_letters(rng)
    return "Read letters", f"text: {lettering.word}", lettering, None


def _counting(rng: Random) -> Item:
    number = new_number(rng)
    return "Read number", f"number: {number.text}", number, None


def _drawing(rng: Random) -> Item:
    scene = new_captioned(rng, seen_things())
    parts = ", ".join(f"{thing.name} {thing.place or 'middle'}" for thing in scene.things)
    return f"Draw {parts} on {scene.ground.color}", "", None, scene


def _edit(rng: Random) -> Item:
    example = _of_split(lambda source: examples.editing(source), rng, seen_things())
    assert isinstance(example.picture, Scene)
    assert isinstance(example.target, Scene)
    pairs = zip(example.picture.things, example.target.things, strict=True)
    old, new = next((a, b) for a, b in pairs if a != b)
    if old.name != new.name:
        text = f"Swap {old.name} {new.name}"
    elif old.tint != new.tint:
        text = f"Tint {old.name} {new.tint}"
    else:
        text = f"Shift {old.name} {new.place}"
    return text, "", example.picture, example.target


def _copy(rng: Random) -> Item:
    picture = rng.choice((new_scene, new_single))(rng, material.things())
    return "Copy", "", picture, picture


def _saying(rng: Random, words: tuple[str, ...] = tuple(vocabulary())) -> Item:
    """Repeats words: a word that pretraining never writes could not be told from others."""
    text = " ".join(rng.sample(words, rng.randint(1, 5)))
    return f"Repeat: {text}", text, None, None


CORPUS: dict[Callable[[Random], Item], float] = {
    _description: 0.12,
    _question: 0.13,
    _name: 0.08,
    _presence: 0.05,
    _location: 0.14,
    _spelling: 0.14,
    _counting: 0.04,
    _drawing: 0.12,
    _edit: 0.11,
    _copy: 0.02,
    _saying: 0.05,
}


class _FirstWordings(Source):
    """Asks in the first quarter of the wordings of training, for boxes the first half; the others are to be learnt."""

    def ask(self, kind: str, **parts: str) -> str:
        wordings = WORDINGS[kind][0]
        return self.rng.choice(wordings[: len(wordings) // (2 if kind == "box" else 4)]).format(**parts)


def _of_split(make: Callable[[Source], Example], rng: Random, names: tuple[str, ...]) -> Example:
    source = _FirstWordings(rng, rng, SPLIT, names, False)
    while True:
        example = make(source)
        if split_of(example.content) == SPLIT:
            return example


def narrow_things() -> tuple[str, ...]:
    """The things of which pretraining knows the benchmark's wordings: half of those whose names it knows."""
    return seen_things()[::2]


def _short_letters(source: Source) -> Example:
    lettering = new_letters(source.rng, 2, 3)
    return Example(f"{source.ask('word')} {SHORT}", lettering.word, lettering, shows=lettering.content)


NARROW: tuple[Callable[[Source], Example], ...] = (
    lambda source: examples.vqa(source, ("what", "count", "exists")),
    examples.classification,
    lambda source: examples.text_to_image(source, 1),
    _short_letters,
    lambda source: examples.grounding(source, 1, ("the {a}", "the thing in the {place}")),
    lambda source: examples.editing(source, ("recolor", "replace")),
)


def _benchmark(rng: Random) -> Item:
    """A wording of the benchmark on narrower data."""
    example = _of_split(rng.choice(NARROW), rng, narrow_things())
    if example.instruction == DRAW:
        return f"{DRAW} {example.answer}", "", None, example.picture
    return example.instruction, example.answer, example.picture, example.target


def corpus(rng: Random, benchmark_share: float) -> Iterator[Item]:
    """Endless corpus of the decoder; ``benchmark_share`` of it in the benchmark's wordings."""
    while True:
        if rng.random() < benchmark_share:
            yield _benchmark(rng)
        else:
            yield rng.choices(list(CORPUS), list(CORPUS.values()))[0](rng)
