"""The shapes of the files that a run writes: who reads a run folder finds in them what a run puts there, or refuses.

A run folder may come from elsewhere. What is in it names files inside it alone, save the pictures of the data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnext.errors import UserError, parse_json
from cnext.scoring.base import ERROR_TYPES, PROFILES
from cnext.shapes import name, relative, wrong


def percent(value: Any) -> bool:
    """a score: a number of percent"""
    return not wrong(value, float) and abs(value) <= 1e6


def place(value: Any) -> bool:
    """a whole number from 0 to 100,000,000"""
    return not wrong(value, int) and 0 <= value <= 10**8


SCORE = (percent, None)
MATRIX = [([SCORE], None)]
PROFILE = {
    "score_matrix?": (MATRIX, None),
    "zero_shot?": ([SCORE], None),
    "metrics?": {str: SCORE},
    "error_matrix?": ({str: MATRIX}, None),
}
MEASURED = {
    f"{key}?": (float, None)
    for key in (
        *("trainable_params", "stored_bytes", "optimizer_steps", "supervised_tokens", "total_seconds"),
        *("peak_memory_bytes", "peak_device_memory_bytes", "energy_joules", "train_seconds", "evaluate_seconds"),
        *("steps", "tokens", "seconds_per_step", "tokens_per_second"),
    )
}
COST = {**MEASURED, "stages?": [{**MEASURED, "task": str}]}
RESULTS = {
    **PROFILE,
    "method": str,
    "suite": str,
    "tasks": [name],
    "score_matrix": MATRIX,
    "profiles?": ({str: PROFILE}, None),
    "reads?": {str: [str]},
    "writes?": {str: [str]},
    "samples?": {str: int},
    "averaging?": ([{"task": str, "branches": {str: {"mean": percent, "std": percent}}}], None),
    "cost?": COST,
    "versions?": {str: (str, None)},
    "seed?": int,
    "profile?": str,
    "joint?": bool,
    "finished?": bool,
    "hyperparameters?": dict,
    **dict.fromkeys(("backbone?", "budget?", "order?", "split?"), str),
}
CONFIG = {
    **dict.fromkeys(("method?", "suite?"), str),
    **dict.fromkeys(("hyperparameters?", "backbone_options?"), dict),
    "recipe?": {"by_task?": {str: dict}},
    "seed?": int,
}
ENVIRONMENT = {"versions?": {str: (str, None)}}
RESTORED = {"method": str, "hyperparameters": dict, "backbone": str, "tasks": [name], "recipe?": dict}
CARD = {"profile": str, "split": str, "zero_shot": [SCORE], "metrics": dict, "finished": bool}
"""What a model card says of results, beside `RESULTS`."""
REFERENCE = {"input_ids": [place], "places": [place], "decimals": place, "sha256": str}
STEP = {"stage": int, "step": int, "loss": float}
SHARES = dict.fromkeys(ERROR_TYPES, percent)
SCORED = {
    "stage": int,
    **dict.fromkeys(("trained", "task"), name),
    "scorer": str,
    "samples": int,
    **dict.fromkeys(PROFILES, percent),
    "errors": dict.fromkeys(PROFILES, SHARES),
}
ANSWER = {
    "id": str,
    "instruction": str,
    "answer": str,
    "text": str,
    "strict": percent,
    "error": str,
    "image": (relative, None),
    "source_image": (str, None),
    "target_image": (str, None),
}


def checked(value: Any, shape: Any, where: str) -> Any:
    """The value. Raises UserError saying where and how it is of another shape."""
    if found := wrong(value, shape):
        raise UserError(f"{where} is not as a run writes it: {found}; run cnext-run again")
    return value


def read(path: Path, shape: Any) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file, and what in it is of another shape."""
    try:
        value = parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: expected a JSON object, could not read one ({error}); run cnext-run again") from error
    return checked(value, shape, str(path))


def read_rows(path: Path, shape: Any) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none where it is missing; a last line that was cut off is left out.

    Raises: UserError naming the file, the line and what in it is of another shape.
    """
    if not path.is_file():
        return []
    *lines, _cut_off = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected a JSON object ({error}); run cnext-run again") from error
        rows.append(checked(value, shape, f"{path}:{number}"))
    return rows


def read_results(path: Path) -> dict[str, Any]:
    """results.json, its matrices as wide as it has tasks. Raises UserError as `read`."""
    results = read(path, RESULTS)
    tasks = results["tasks"]
    profiles = [results, *(results.get("profiles") or {}).values()]
    rows = [row for part in profiles for row in [part.get("zero_shot"), *(part.get("score_matrix") or [])] if row]
    matrices = [part.get("score_matrix") or [] for part in profiles]
    for part in profiles:
        matrices += (part.get("error_matrix") or {}).values()
    rows += [row for matrix in matrices for row in matrix if row is not None]
    merged = {merge["task"] for merge in results.get("averaging") or []}
    if not tasks or len(set(tasks)) < len(tasks) or any(len(matrix) > len(tasks) for matrix in matrices):
        raise UserError(f"{path} is not as a run writes it: expected distinct tasks, and a row a stage at most")
    if any(len(row) != len(tasks) for row in rows) or not merged <= {*tasks, "joint"}:
        raise UserError(f"{path} is not as a run writes it: expected rows and averages of its {len(tasks)} tasks")
    return results
