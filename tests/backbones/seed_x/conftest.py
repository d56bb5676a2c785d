"""The small SEED-X: its folder, the loaded model, and samples of all six tasks with images of their own."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from backbones.seed_x.released import write_released

from cnext.backbones.seed_x.encoding import SeedXInputs
from cnext.backbones.seed_x.model import SeedX
from cnext.tasks.base import Sample, Turn


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released(tmp_path_factory.mktemp("released") / "pretrained")


@pytest.fixture(scope="session")
def loaded(folder: Path) -> SeedX:
    """Not to be changed."""
    return SeedX.load(weights=folder, steps=2)


@pytest.fixture
def fresh(folder: Path) -> SeedX:
    return SeedX.load(weights=folder, steps=2)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    """Two samples of every task, as the readers give them."""
    from PIL import Image

    folder, random = tmp_path_factory.mktemp("images"), numpy.random.default_rng(0)

    def image(width: int, height: int) -> Path:
        path = folder / f"{len(list(folder.iterdir()))}.png"
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=numpy.uint8)).save(path)
        return path

    words = "Answer the question using a single word or phrase."
    talk = (Turn(f"What color is the ring? {words}", "red"), Turn("Is it big?", "no"), Turn("How many?", "two"))
    box = Turn("Please provide the bounding box coordinate of the region this sentence describes: ring.", "[0.1,0.2]")
    label = Turn(f"What is the object in the image? {words}", "Ring.")
    return {
        "VQAv2": [Sample("v1", talk, image(640, 427)), Sample("v2", talk[:1], image(640, 480), image_first=False)],
        "ImageNet": [Sample("i1", (label,), image(500, 333)), Sample("i2", (label,), image(350, 500))],
        "Flickr30k": [
            Sample(f"f{number}", (Turn("Please generate the image. A dog runs."),), None, image(500, 375))
            for number in range(2)
        ],
        "OCRVQA": [Sample("o1", talk[1:], image(300, 460)), Sample("o2", talk[2:], image(64, 64))],
        "RefCOCO": [
            Sample("r1", (box,), image(640, 480)),
            Sample("r2", (box, box), image(640, 428), image_first=False),
        ],
        "HQEdit": [
            Sample("h1", (Turn("make the sky dark"),), image(640, 427), image(450, 450), tiled=False),
            Sample("h2", (Turn("red"),), image(600, 450), image(600, 450), image_first=False, tiled=False),
        ],
    }


@pytest.fixture(scope="session")
def encoded(loaded: SeedX, tasks: dict[str, list[Sample]]) -> dict[str, list[SeedXInputs]]:
    return {task: loaded.encode(samples) for task, samples in tasks.items()}
