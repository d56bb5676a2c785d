"""Pretraining corpus of the tiny backbone: generated images of the `pretrain` split, and instructions about them.

The decoder's corpus has two parts: skills in templates of its own, and the benchmark's templates on narrower data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import TypeVar

from cnext.tasks import scenes, synthetic
from cnext.tasks.scenes import COLORS, ICONS, SHAPES, Icon, Lettering, Scene
from cnext.tasks.synthetic import Example

WORDS = [*COLORS, *SHAPES, *ICONS]
T = TypeVar("T")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _of_split(sample: Callable[[], T], key: Callable[[T], str]) -> T:
    """Samples until the result belongs to the `pretrain` split."""
    while True:
        value = sample()
        if scenes.split_of(key(value)) == "pretrain":
            return value


def new_scene(rng: Random, fewest: int = 1, most: int = 3) -> Scene:
    """A random scene of ``fewest`` to ``most`` shapes, of the `pretrain` split."""
    return _of_split(lambda: scenes.random_scene(rng, fewest, most), scenes.key)


def new_letters(rng: Random, fewest: int = 3, most: int = 3) -> Lettering:
    """A random string of ``fewest`` to ``most`` letters as an image, of the `pretrain` split."""

    def make() -> Lettering:
        return scenes.random_lettering(rng, "".join(rng.choices(LETTERS, k=rng.randint(fewest, most))))

    return _of_split(make, scenes.key)


def new_icon(rng: Random) -> Icon:
    """A random icon, of the `pretrain` split."""
    return _of_split(lambda: scenes.random_icon(rng), scenes.key)


Picture = Scene | Icon | Lettering
Item = tuple[str, str, Picture | None, Picture | None]
"""Instruction, answer, input image and output image."""


def _caption(rng: Random) -> Item:
    scene = new_scene(rng)
    return "Describe the picture.", scene.caption, scene, None


def _question(rng: Random) -> Item:
    scene = new_scene(rng)
    return *synthetic.about(rng, scene), scene, None


def _location(rng: Random) -> Item:
    scene = new_scene(rng)
    thing = rng.choice(scene.things)
    asked = rng.choice((thing.shape, thing.color, f"{thing.color} {thing.shape}"))
    x1, y1, x2, y2 = (min(max(round(100 * edge / scenes.SIZE), 0), 99) for edge in thing.box)
    if rng.random() < 0.4:
        return f"Find {asked}", f"at {(x1 + x2) // 2:02d} {(y1 + y2) // 2:02d}", scene, None
    return f"Where is {asked}", f"x {x1:02d} y {y1:02d} x {x2:02d} y {y2:02d}", scene, None


def _spelling(rng: Random) -> Item:
    lettering = new_letters(rng)
    return "Read letters", f"text: {lettering.word}", lettering, None


def _drawing(rng: Random) -> Item:
    scene = new_scene(rng, 1, 2)
    return "Draw " + "; ".join(f"{t.color} {t.shape} {t.place}" for t in scene.things), "", None, scene


def _edit(rng: Random) -> Item:
    def make() -> tuple[str, Example]:
        kind = rng.choice(("color", "shape", "remove", "add"))
        return kind, synthetic.editing(rng, (kind,))

    kind, example = _of_split(make, lambda made: made[1].content)
    # Phrased otherwise than in the benchmark, whose phrasing is left to be learned.
    words = [word for word in example.instruction.lower().rstrip(".").split() if word in {*COLORS, *SHAPES}]
    verb = {"color": "recolor", "shape": "morph", "remove": "erase", "add": "paint"}[kind]
    place = f" {example.target.things[-1].place}" if kind == "add" and example.target else ""
    return f"{verb} {' '.join(words)}{place}", "", example.picture, example.target


def _copy(rng: Random) -> Item:
    picture = rng.choice((new_scene, new_icon))(rng)
    return "Copy picture", "", picture, picture


def _saying(rng: Random) -> Item:
    """Repeats words: a word that pretraining never writes could not be distinguished from others of its kind."""
    words = " ".join(rng.sample(WORDS, rng.randint(1, 4)))
    return f"Say: {words}", words, None, None


CORPUS: dict[Callable[[Random], Item], float] = {
    _caption: 0.15,
    _question: 0.21,
    _location: 0.19,
    _spelling: 0.15,
    _drawing: 0.12,
    _edit: 0.12,
    _copy: 0.02,
    _saying: 0.04,
}
SEEN_ICONS = ("house", "fish", "cup", "face")


def _reading_letters(rng: Random) -> Example:
    lettering = new_letters(rng, 2, 2)
    return Example(synthetic.reading(rng).instruction, lettering.word, lettering)


NARROW: tuple[Callable[[Random], Example], ...] = (
    lambda rng: synthetic.vqa(rng, ("color", "shape", "count")),
    lambda rng: synthetic.classification(rng, SEEN_ICONS),
    lambda rng: synthetic.text_to_image(rng, 1),
    _reading_letters,
    lambda rng: synthetic.grounding(rng, 1),
    lambda rng: synthetic.editing(rng, ("color", "remove")),
)


def _benchmark(rng: Random) -> Item:
    """A template of the benchmark on narrower data."""
    make = rng.choice(NARROW)
    example = _of_split(lambda: make(rng), lambda made: made.content)
    if example.instruction == synthetic.DRAW:
        return f"{example.instruction} {example.answer}", "", None, example.picture
    return example.instruction, example.answer, example.picture, example.target


def corpus(seed: int, benchmark_share: float) -> Iterator[Item]:
    """Endless pretraining corpus of the decoder; ``benchmark_share`` of it in the benchmark's templates."""
    rng = Random(f"pretrain/{seed}/{benchmark_share}")
    while True:
        if rng.random() < benchmark_share:
            yield _benchmark(rng)
        else:
            yield rng.choices(list(CORPUS), list(CORPUS.values()))[0](rng)
