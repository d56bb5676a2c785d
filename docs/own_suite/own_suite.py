"""A suite of one's own: rows with images from Parquet files, a scorer of one's own, two methods compared.

    python own_suite.py FOLDER [options of cnext-run, such as --backbone hf --weights DIR]

writes FOLDER/suite (two tasks and scoring.py) and FOLDER/data (a Parquet file for each split, as ``datasets`` writes
them: images as bytes), checks them, and trains ``lora`` and ``mage`` into FOLDER/runs.
"""

import io
import json
import sys
from pathlib import Path

import pyarrow
from PIL import Image, ImageDraw
from pyarrow import parquet

from cnext.cli import main, run_main
from cnext.testing import check_scorer

COLORS = ("red", "green", "blue", "yellow")
SCORING = '''"""Scorers of this suite."""


def near(answer: str, references: list[str]) -> float:
    """The share of an accepted answer's words that the answer has, times that of its own words that are accepted."""
    said = set(answer.lower().split())
    shares = [len(said & set(accepted.lower().split())) ** 2 / len(accepted.split()) for accepted in references]
    return max(shares) / len(said) if said else 0.0
'''


def drawn(color: str, shape: str, corner: int) -> bytes:
    """A PNG of a shape on white."""
    image, file = Image.new("RGB", (48, 48), "white"), io.BytesIO()
    getattr(ImageDraw.Draw(image), shape)((corner, corner, corner + 24, corner + 24), fill=color)
    image.save(file, "PNG")
    return file.getvalue()


def write(folder: Path) -> None:
    """The suite and its data."""
    suite, data = folder / "suite", folder / "data"
    suite.mkdir(parents=True)
    asked = {"Colors": "What color is the object?", "Shapes": "What shape is the object?"}
    for task, question in asked.items():
        (data / task).mkdir(parents=True)
        for split, corners in (("train", range(0, 24, 3)), ("test", (1, 10))):
            rows = [
                {
                    "id": f"{task}-{split}-{color}-{shape}-{corner}",
                    "question": question,
                    "answer": color if task == "Colors" else {"ellipse": "ring", "rectangle": "square"}[shape],
                    "image": {"bytes": drawn(color, shape, corner), "path": None},
                }
                for color in COLORS
                for shape in ("ellipse", "rectangle")
                for corner in corners
            ]
            parquet.write_table(pyarrow.Table.from_pylist(rows), data / task / f"{split}.parquet")
        manifest = {
            "reads": ["text", "image"],
            "writes": ["text"],
            "format": "conversation",
            "scorer": "scoring:near",
            "train": f"{task}/train.parquet",
            "test": f"{task}/test.parquet",
            "max_new_tokens": 8,
        }
        (suite / f"{task}.json").write_text(json.dumps(manifest, indent=2))
    (suite / "scoring.py").write_text(SCORING)
    recipe = {"steps": dict.fromkeys(asked, 20), "batch_size": 8, "learning_rate": 1e-3}
    budgets = {"default": recipe, "smoke": recipe | {"steps": dict.fromkeys(asked, 2)}}
    (suite / "suite.json").write_text(json.dumps({"tasks": list(asked), "orders": {}, "budgets": budgets}, indent=2))


def script(folder: Path, options: list[str]) -> int:
    """Writes, checks and runs. Returns the exit status."""
    write(folder)
    suite, data = str(folder / "suite"), str(folder / "data")
    check_scorer("scoring:near", suite=suite)
    if main(["data", "check", data, "--suite", suite]):
        return 1
    given = ["--method", "lora", "mage", "--suite", suite, "--data", data, "--out", str(folder / "runs")]
    return run_main([*given, *options])


if __name__ == "__main__":
    sys.exit(script(Path(sys.argv[1]), sys.argv[2:]))
