"""Images of the synthetic suite: random scenes of colored shapes, icons and words.

An image is described by a frozen dataclass, from which it is rendered. The description's ``key`` determines the split
it belongs to (``split_of``), so that no image occurs in two splits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from random import Random

import numpy

SIZE = 48
"""Width and height of an image in pixels."""

COLORS = {
    "red": (225, 50, 50),
    "green": (60, 190, 70),
    "blue": (60, 95, 240),
    "yellow": (240, 220, 60),
    "purple": (155, 65, 200),
    "orange": (245, 145, 40),
    "cyan": (60, 215, 225),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
WORDS = [
    "ant",
    "arm",
    "axe",
    "bag",
    "bat",
    "bee",
    "bib",
    "bow",
    "bud",
    "bug",
    "bun",
    "cab",
    "cap",
    "cat",
    "cob",
    "cow",
    "cub",
    "dad",
    "dog",
    "dot",
    "ear",
    "egg",
    "elf",
    "fan",
    "fig",
    "fin",
    "fog",
    "fox",
    "gem",
    "gum",
    "hat",
    "hen",
    "hog",
    "hut",
    "ice",
    "ink",
    "jam",
    "jar",
    "jaw",
    "jet",
    "jug",
    "key",
    "kid",
    "kit",
    "leg",
    "lid",
    "lip",
    "log",
    "map",
    "mop",
    "mud",
    "net",
    "nut",
    "oak",
    "oil",
    "owl",
    "pan",
    "paw",
    "pea",
    "pen",
    "pig",
    "pot",
    "rat",
    "rug",
    "toy",
    "van",
    "wig",
    "zip",
]

# Primitives in drawing order, in units of the icon's half width: kind, coordinates, index of the icon's two colors.
ICONS = {
    "house": [("polygon", (-0.9, 0, 0, -0.9, 0.9, 0), 1), ("rectangle", (-0.7, 0, 0.7, 0.9), 0)],
    "tree": [("rectangle", (-0.15, 0.2, 0.15, 0.95), 1), ("ellipse", (-0.75, -0.95, 0.75, 0.4), 0)],
    "boat": [
        ("polygon", (-0.95, 0.25, 0.95, 0.25, 0.6, 0.8, -0.6, 0.8), 0),
        ("polygon", (-0.05, 0.15, -0.05, -0.95, 0.7, 0.15), 1),
    ],
    "fish": [
        ("polygon", (0.3, 0, 0.95, -0.55, 0.95, 0.55), 1),
        ("ellipse", (-0.95, -0.5, 0.5, 0.5), 0),
        ("ellipse", (-0.7, -0.2, -0.45, 0.05), 1),
    ],
    "sun": [
        *(
            (
                "polygon",
                (a * 0.98, b * 0.98, b * 0.2 + a * 0.4, -a * 0.2 + b * 0.4, -b * 0.2 + a * 0.4, a * 0.2 + b * 0.4),
                1,
            )
            for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
        ),
        ("ellipse", (-0.5, -0.5, 0.5, 0.5), 0),
    ],
    "flower": [
        ("rectangle", (-0.07, 0, 0.07, 0.98), 1),
        *(
            ("ellipse", (a - 0.32, b - 0.62, a + 0.32, b + 0.02), 0)
            for a, b in ((-0.4, 0), (0.4, 0), (0, -0.35), (0, 0.3))
        ),
        ("ellipse", (-0.2, -0.5, 0.2, -0.1), 1),
    ],
    "cup": [
        ("ellipse", (0.2, -0.3, 0.95, 0.45), 1),
        ("ellipse", (0.4, -0.12, 0.75, 0.27), 2),
        ("polygon", (-0.8, -0.6, 0.5, -0.6, 0.35, 0.8, -0.65, 0.8), 0),
    ],
    "flag": [("rectangle", (-0.75, -0.95, -0.6, 0.95), 1), ("polygon", (-0.6, -0.9, 0.9, -0.5, -0.6, 0), 0)],
    "car": [
        ("polygon", (-0.5, -0.1, -0.3, -0.55, 0.35, -0.55, 0.6, -0.1), 1),
        ("rectangle", (-0.95, -0.1, 0.95, 0.4), 0),
        ("ellipse", (-0.7, 0.15, -0.2, 0.65), 1),
        ("ellipse", (0.2, 0.15, 0.7, 0.65), 1),
    ],
    "face": [
        ("ellipse", (-0.9, -0.9, 0.9, 0.9), 0),
        ("ellipse", (-0.5, -0.45, -0.2, -0.1), 1),
        ("ellipse", (0.2, -0.45, 0.5, -0.1), 1),
        ("rectangle", (-0.45, 0.3, 0.45, 0.5), 1),
    ],
    "snowman": [
        ("ellipse", (-0.6, 0, 0.6, 0.98), 0),
        ("ellipse", (-0.4, -0.65, 0.4, 0.15), 0),
        ("rectangle", (-0.35, -0.95, 0.35, -0.55), 1),
    ],
    "mushroom": [("rectangle", (-0.25, 0, 0.25, 0.9), 1), ("chord", (-0.95, -0.85, 0.95, 0.75), 0)],
}


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Thing:
    """One colored shape: center and radius in pixels."""

    shape: str
    color: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (x1, y1, x2, y2) in pixels."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


@dataclass(frozen=True)
class Scene:
    """One to four shapes, distinct in shape, color and place, on a dark background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def without(self, thing: Thing) -> Scene:
        return replace(self, things=tuple(other for other in self.things if other is not thing))

    def swap(self, thing: Thing, new: Thing) -> Scene:
        return replace(self, things=tuple(new if other is thing else other for other in self.things))

    @property
    def caption(self) -> str:
        return " and ".join(f"{article(thing.color)} {thing.shape} in the {thing.place}" for thing in self.things)


@dataclass(frozen=True)
class Icon:
    """One of ICONS in two colors."""

    name: str
    colors: tuple[str, str]
    background: tuple[int, int, int]
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Lettering:
    """A short word in one color."""

    word: str
    color: str
    background: tuple[int, int, int]
    x: int
    y: int
    points: int


def key(value: object) -> str:
    """The text that identifies an image when it is assigned to a split."""
    return repr(value)


def split_of(content: str) -> str:
    """The split of some content, by its hash: test 15%, validation 15%, train 45%, pretrain 25%."""
    bucket = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big") % 100
    return "test" if bucket < 15 else "validation" if bucket < 30 else "train" if bucket < 75 else "pretrain"


def random_background(rng: Random) -> tuple[int, int, int]:
    return (rng.randrange(8, 40), rng.randrange(8, 40), rng.randrange(8, 40))


def random_thing(rng: Random, shape: str, color: str, place: str) -> Thing:
    column, row = PLACES[place]
    radius = round(rng.uniform(6.0, 9.5), 2)
    x, y = (round(12 + 24 * cell + rng.uniform(-1, 1) * (11.5 - radius), 2) for cell in (column, row))
    return Thing(shape, color, place, x, y, radius)


def random_scene(rng: Random, fewest: int = 1, most: int = 3) -> Scene:
    count = rng.randint(fewest, most)
    shapes, colors, places = (rng.sample(list(pool), count) for pool in (SHAPES, COLORS, PLACES))
    things = tuple(random_thing(rng, *parts) for parts in zip(shapes, colors, places, strict=True))
    return Scene(things, random_background(rng))


def random_icon(rng: Random, names: tuple[str, ...] = tuple(ICONS)) -> Icon:
    radius = round(rng.uniform(13.0, 20.0), 2)
    x, y = (round(24 + rng.uniform(-1, 1) * (23 - radius), 2) for _ in range(2))
    first, second = rng.sample(list(COLORS), 2)
    return Icon(rng.choice(names), (first, second), random_background(rng), x, y, radius)


def random_lettering(rng: Random, word: str) -> Lettering:
    points = rng.choice((15, 17))
    return Lettering(
        word, rng.choice(list(COLORS)), random_background(rng), rng.randint(2, 8), rng.randint(6, 24), points
    )


def _distance(shape: str, x: numpy.ndarray, y: numpy.ndarray, radius: float) -> numpy.ndarray:
    """Signed distance in pixels to the outline of a shape at the origin (negative inside)."""
    if shape == "circle":
        return numpy.hypot(x, y) - radius
    if shape == "square":
        return numpy.maximum(abs(x), abs(y)) - 0.85 * radius
    if shape == "diamond":
        return (abs(x) + abs(y) - radius) / 2**0.5
    if shape == "triangle":
        return numpy.maximum((2 * abs(x) - y - radius) / 5**0.5, y - 0.9 * radius)
    if shape == "cross":
        long, wide = radius, radius / 3
        return numpy.minimum(numpy.maximum(abs(x) - long, abs(y) - wide), numpy.maximum(abs(x) - wide, abs(y) - long))
    assert shape == "ring", shape
    return abs(numpy.hypot(x, y) - 0.75 * radius) - 0.25 * radius


_ROWS, _COLUMNS = numpy.mgrid[0:SIZE, 0:SIZE] + 0.5


def _draw_scene(scene: Scene) -> numpy.ndarray:
    pixels = numpy.empty((SIZE, SIZE, 3))
    pixels[:] = scene.background
    for thing in scene.things:
        distance = _distance(thing.shape, _COLUMNS - thing.x, _ROWS - thing.y, thing.radius)
        cover = numpy.clip(0.5 - distance, 0, 1)[..., None]
        pixels = pixels * (1 - cover) + cover * COLORS[thing.color]
    return pixels.round().astype(numpy.uint8)


def _draw_icon(icon: Icon) -> numpy.ndarray:
    from PIL import Image, ImageDraw

    fine = 4
    image = Image.new("RGB", (SIZE * fine, SIZE * fine), icon.background)
    brush = ImageDraw.Draw(image)
    palette = (*(COLORS[name] for name in icon.colors), icon.background)
    for kind, points, color in ICONS[icon.name]:
        scaled = [fine * ((icon.x, icon.y)[index % 2] + icon.radius * point) for index, point in enumerate(points)]
        extra = (180, 360) if kind == "chord" else ()
        getattr(brush, kind)(scaled, *extra, fill=palette[color])
    return numpy.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _draw_lettering(lettering: Lettering) -> numpy.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (SIZE, SIZE), lettering.background)
    font = ImageFont.load_default(lettering.points)
    ImageDraw.Draw(image).text((lettering.x, lettering.y), lettering.word, fill=COLORS[lettering.color], font=font)
    return numpy.asarray(image)


def draw(picture: Scene | Icon | Lettering) -> numpy.ndarray:
    """The pixels of an image, (48, 48, 3) uint8."""
    drawers = {Scene: _draw_scene, Icon: _draw_icon, Lettering: _draw_lettering}
    return drawers[type(picture)](picture)
