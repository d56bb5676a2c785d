"""Pictures of the suite `next-real`: one to four things, or a word or number, on a plain color or a photograph.

A picture is described by a frozen dataclass, from which it is composed. Photographs, words, handwritten digits and
descriptions each belong to one split (`split_of`), so that no picture and no content occurs in two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import numpy

from cnext.tasks.next_real import material
from cnext.tasks.scenes import split_of

if TYPE_CHECKING:
    from PIL import Image

SIDE = 96
"""Width and height of a picture in pixels."""

TINTS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 230),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 200),
    "orange": (240, 130, 30),
}
"""Colors that a thing can be given, and that words and numbers are written in."""
GROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "gray": (150, 150, 155),
    "pink": (250, 200, 215),
    "sky": (190, 220, 250),
    "mint": (200, 240, 210),
}
"""Plain backgrounds."""
PLACES = {"top left": (24, 24), "top right": (72, 24), "bottom left": (24, 72), "bottom right": (72, 72)}
"""Centers of the four places in pixels."""
SIDES = {"left": (26, 48), "right": (70, 48), "top": (48, 26), "bottom": (48, 70)}
"""Centers of two things of a caption that are beside or above each other."""
WORDS = (
    "ace add age air arm art axe bad bag bay bed bet big bit bow box boy bug bun buy can cap cob cot cub cup cut dad "
    "day den dew dig dip dot dry dug dye ear eel elf end eye fan far fat few fig fin fit fly fog fun fur gap gas gem "
    "get gum guy gym ham hat hen hid hip hit hop hot hug hut ice ink jam jar jaw jet job joy jug kid kit lab lap law "
    "leg lid lie lip log lot low mad man map mat mix mop mud mug nap net new nut oak odd oil old one own pad pan paw "
    "pay pea pen pet pie pin pit pop pot put ran raw red rib rim rip row rub rug run sad saw say sea set shy sit six "
    "sky son sow spa spy sum tag tan tap tax tea ten tie tin tip toe ton top toy try tub two use van vet wax way web "
    "wet wig win wit yes zip able acid aged also area army away baby back ball band bank base bath bean bear beat "
    "bell belt bend best bike bill bird bite blue boat body bold bone book born bowl bulk burn bush busy cafe cage "
    "calm card care cash cave chip city clay club coal coat code cold cook cool copy corn cost crew crop curl dark "
    "data dawn deep deer desk dial dice dish dock door dose down draw drum dusk dust duty each earn east easy edge "
    "even exit face fact fair fall farm fast film find fire fish flag flat foam folk font food foot fork form free "
    "frog fuel full game gate gift girl give glad glue goal goat gold golf good gray grow gulf hair half hall hand "
    "hard harp head heat help herb hero hill hint hole home hook hope horn host huge idea inch iron item join jump "
    "jury keen keep kind king kite knee knot lake lamb lamp land"
).split()
"""Words to read, of three and four letters."""

SOME = frozenset("grapes cherries corn broccoli bread cheese coffee scissors glasses fire".split())


def article(name: str) -> str:
    """A thing's name after "a", "an" or "some"."""
    if name in SOME:
        return f"some {name}"
    return f"{'an' if name[0] in 'aeio' or name.startswith('um') else 'a'} {name}"


@dataclass(frozen=True)
class Ground:
    """What is behind the things: a color of GROUNDS, or the part of a photograph from column x and row y on."""

    color: str = "white"
    photograph: str = ""
    x: int = 0
    y: int = 0


@dataclass(frozen=True)
class Thing:
    """A thing in a drawing style: its center and the side of its square in pixels; tint: "" for its own colors."""

    name: str
    style: str
    x: int
    y: int
    side: int
    place: str = ""
    tint: str = ""

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box (x1, y1, x2, y2) in pixels, of what is visible in the picture."""
        left, top = self.x - self.side // 2, self.y - self.side // 2
        x1, y1, x2, y2 = material.extent(self.name, self.style, self.side)
        return max(left + x1, 0), max(top + y1, 0), min(left + x2, SIDE), min(top + y2, SIDE)


@dataclass(frozen=True)
class Scene:
    """One to four things."""

    things: tuple[Thing, ...]
    ground: Ground = Ground()

    @property
    def content(self) -> str:
        """What it shows, without how: names, styles and places; and of one thing its size and center."""
        alone = len(self.things) == 1
        parts = sorted((t.name, t.style, t.place, *((t.x, t.y, t.side) if alone else ())) for t in self.things)
        return repr(parts)

    def swap(self, thing: Thing, new: Thing) -> Scene:
        """The scene with another thing in the place of one."""
        return replace(self, things=tuple(new if other is thing else other for other in self.things))


@dataclass(frozen=True)
class Lettering:
    """A word in a font. x, y: its left upper corner. scale: of the font's size."""

    word: str
    font: str
    color: str
    ground: Ground
    x: int
    y: int
    scale: float

    @property
    def content(self) -> str:
        """The word."""
        return self.word

    @property
    def symbols(self) -> list[tuple[str, float, float]]:
        """The letters and their centers in pixels."""
        _, centers = material.word(self.word, self.font)
        y = self.y + material.MIDDLE * self.scale
        return [(letter, self.x + x * self.scale, y) for letter, x in zip(self.word, centers, strict=True)]


@dataclass(frozen=True)
class Number:
    """A number in handwritten digits. digits: their indices in the material. x, y: the left upper corner."""

    digits: tuple[int, ...]
    color: str
    ground: Ground
    x: int
    y: int
    side: int

    @property
    def text(self) -> str:
        """The number as it is read."""
        return "".join(material.digit_labels()[index] for index in self.digits)

    @property
    def symbols(self) -> list[tuple[str, float, float]]:
        """The digits and their centers in pixels."""
        half = self.side / 2
        return [(digit, self.x + i * self.side + half, self.y + half) for i, digit in enumerate(self.text)]

    @property
    def content(self) -> str:
        """Its digits: all of one split, see `split_of_digit`."""
        return f"digit/{self.digits[0]}"


Picture = Scene | Lettering | Number


def split_of_digit(index: int) -> str:
    """The split of a handwritten digit."""
    return split_of(f"digit/{index}")


def random_ground(rng: Random, split: str, photographs: float = 0.4) -> Ground:
    """A plain color, or with the given probability a part of a photograph of the split."""
    if rng.random() < photographs:
        name = rng.choice(material.photographs(split))
        return Ground(photograph=name, x=rng.randrange(49), y=rng.randrange(49))
    return Ground(rng.choice(list(GROUNDS)))


def random_thing(rng: Random, name: str, place: str, style: str = "") -> Thing:
    """A thing in one of the four places, with some play."""
    side = rng.randrange(34, 47, 2)
    play = (48 - side) // 2
    x, y = (center + rng.randint(-play, play) for center in PLACES[place])
    return Thing(name, style or rng.choice(material.styles()), x, y, side, place)


def random_scene(rng: Random, split: str, names: tuple[str, ...], fewest: int = 1, most: int = 3) -> Scene:
    """A scene of things that differ, in places that differ."""
    count = rng.randint(fewest, most)
    chosen, places = rng.sample(names, count), rng.sample(list(PLACES), count)
    things = tuple(random_thing(rng, *parts) for parts in zip(chosen, places, strict=True))
    return Scene(things, random_ground(rng, split))


def single(rng: Random, split: str, names: tuple[str, ...]) -> Scene:
    """One large thing."""
    side = rng.randrange(52, 85, 4)
    play = (SIDE - side) // 2
    x, y = (48 + rng.randint(-play, play) for _ in range(2))
    thing = Thing(rng.choice(names), rng.choice(material.styles()), x, y, side)
    return Scene((thing,), random_ground(rng, split, 0.5))


def captioned(rng: Random, names: tuple[str, ...], most: int = 2) -> Scene:
    """A scene that its caption tells exactly: one thing in the middle, or two side by side or one above the other."""
    ground, style = Ground(rng.choice(list(GROUNDS))), material.styles()[0]
    if rng.randint(1, most) == 1:
        return Scene((Thing(rng.choice(names), style, 48, 48, 64),), ground)
    chosen, places = rng.sample(names, 2), rng.choice((("left", "right"), ("top", "bottom")))
    things = tuple(Thing(name, style, *SIDES[place], 42, place) for name, place in zip(chosen, places, strict=True))
    return Scene(things, ground)


def random_lettering(rng: Random, split: str, text: str) -> Lettering:
    """A word in a random font, size, color and place."""
    font, scale = rng.choice(material.fonts()), rng.choice((1.25, 1.5, 1.75, 2.0))
    while (size := scaled(material.word(text, font)[0].size, scale))[0] > SIDE - 2:  # wide fonts
        scale -= 0.25
    width, height = size
    x, y = rng.randint(1, SIDE - 1 - width), rng.randint(0, SIDE - height)
    return Lettering(text, font, *_written(rng, split), x, y, scale)


def random_number(rng: Random, split: str, indices: tuple[int, ...]) -> Number:
    """A number of two or three of the handwritten digits given."""
    digits = tuple(rng.choices(indices, k=rng.choice((2, 3))))
    side = rng.randrange(22, 31, 2)
    x, y = rng.randint(1, SIDE - 1 - side * len(digits)), rng.randint(1, SIDE - 1 - side)
    return Number(digits, *_written(rng, split), x, y, side)


def _written(rng: Random, split: str) -> tuple[str, Ground]:
    """A color to write in, and what is behind; never black on black."""
    ground = random_ground(rng, split, 0.25)
    return rng.choice([*TINTS, *(["white"] if ground.color == "black" else ["black"])]), ground


def _grounded(ground: Ground) -> Image.Image:
    from PIL import Image

    if ground.photograph:
        box = (ground.x, ground.y, ground.x + SIDE, ground.y + SIDE)
        return material.photograph(ground.photograph).crop(box)
    return Image.new("RGB", (SIDE, SIDE), GROUNDS[ground.color])


def _tinted(drawing: Image.Image, tint: str) -> Image.Image:
    """A drawing in shades of one color."""
    from PIL import Image

    pixels = numpy.asarray(drawing).astype(numpy.int32)
    light = (pixels[..., :3] @ numpy.array([299, 587, 114])) // 1000
    shade = (pixels[..., :3] + 3 * numpy.array(TINTS[tint]) * (light[..., None] + 80) // 255) // 4
    mixed = numpy.concatenate([shade.clip(0, 255), pixels[..., 3:]], -1)
    return Image.fromarray(mixed.astype(numpy.uint8), "RGBA")


def draw(picture: Picture) -> numpy.ndarray:
    """The pixels of a picture, (96, 96, 3) uint8."""
    canvas = _grounded(picture.ground)
    if isinstance(picture, Scene):
        for thing in picture.things:
            drawing = material.drawing(thing.name, thing.style, thing.side)
            drawing = _tinted(drawing, thing.tint) if thing.tint else drawing
            canvas.paste(drawing, (thing.x - thing.side // 2, thing.y - thing.side // 2), drawing)
    elif isinstance(picture, Lettering):
        mask, _ = material.word(picture.word, picture.font)
        _write(canvas, mask.resize(scaled(mask.size, picture.scale)), picture.color, picture.x, picture.y)
    else:
        for place, index in enumerate(picture.digits):
            mask = material.digit(index, picture.side)
            _write(canvas, mask, picture.color, picture.x + place * picture.side, picture.y)
    return numpy.asarray(canvas)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Width and height in pixels after scaling."""
    return round(size[0] * scale), round(size[1] * scale)


def _write(canvas: Image.Image, mask: Image.Image, color: str, x: int, y: int) -> None:
    """Writes through a mask in one color."""
    canvas.paste(TINTS[color] if color in TINTS else GROUNDS[color], (x, y, x + mask.width, y + mask.height), mask)


def caption_key(scene: Scene) -> str:
    """What determines the split of a scene to be drawn: its things and where they are."""
    return " ".join(f"{thing.name}/{thing.place}" for thing in scene.things) + f" on {scene.ground.color}"
