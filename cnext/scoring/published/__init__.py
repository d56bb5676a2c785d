"""Published results as data: ``continual_next.json`` has the tables of arXiv 2602.18055 and their misprints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json, unknown
from cnext.scoring.matrix import ScoreMatrix


def continual_next() -> dict[str, Any]:
    """The tables of the Continual-NExT paper, by our names of methods; without stages where it printed none."""
    return parse_json((Path(__file__).parent / "continual_next.json").read_bytes())


def score_matrix(paper: dict[str, Any], method: str) -> ScoreMatrix:
    """The score matrix that a paper printed for a method. Raises UserError with the methods that it has."""
    if method not in paper["methods"]:
        error = unknown("method of the paper", method, list(paper["methods"]))
        raise UserError(f"{error}; choose one with --paper METHOD")
    return ScoreMatrix.from_rows(paper["methods"][method]["score_matrix"])
