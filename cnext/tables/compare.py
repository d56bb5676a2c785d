"""Compare scores cell by cell, of runs, of score matrices in files and of the paper, under the same conditions.

What a file does not say, as its suite or scoring profile, cannot be checked, and is listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.runs import data_alike, fingerprint, schemas
from cnext.runs.results_file import verified
from cnext.runs.schemas import DataSummary
from cnext.scoring import published
from cnext.scoring.matrix import ScoreMatrix, points, without_repeats
from cnext.scoring.matrix_file import ScoreRecord, from_json, of_a_run, read, read_json
from cnext.tasks import suites

CONDITIONS = ("suite", "backbone", "tasks", "split", "samples", "budget")
"""Keys of results.json that must be equal, beside the scoring profile. Seeds and versions may differ."""

SUITES_OWN = "the suite's"

SCORES = ("score_matrix", "zero_shot", "error_matrix")
"""Keys of results.json with one value per profile."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    deviations: standard deviations of some metrics over seeds.  digests: by stage and what it trained, in order.
    fingerprint, data: of the environment and of the data, None where unknown.  matrix: whether it is a matrix from a
    file, which may lack conditions.
    """

    name: str
    method: str
    conditions: dict[str, Any]
    record: ScoreRecord
    deviations: dict[str, float] = field(default_factory=dict)
    note: str = ""
    digests: dict[tuple[int, str], str] = field(default_factory=dict)
    fingerprint: dict[str, Any] | None = None
    seed: int | None = None
    data: data_alike.Known | None = None
    matrix: bool = False

    def score(self, stage: int, task: str) -> float | None:
        """The score on a task after a stage, 0 being zero-shot; None where not evaluated."""
        i = self.record.tasks.index(task)
        row = self.record.matrix.to_rows()[stage - 1] if stage else self.record.zero_shot
        return row[i] if row else None

    def metrics(self, stages: int) -> dict[str, float | None]:
        """The metrics of the first stages."""

        def first(matrix: ScoreMatrix) -> ScoreMatrix:
            return ScoreMatrix.from_rows(matrix.to_rows()[:stages])

        errors = self.record.errors and {kind: first(shares) for kind, shares in self.record.errors.items()}
        return replace(self.record, matrix=first(self.record.matrix), errors=errors).metrics()


@dataclass(frozen=True)
class Pair:
    """A value of both sides. deviation: the standard deviation of ``there`` over seeds."""

    here: float
    there: float
    deviation: float | None = None

    @property
    def difference(self) -> float:
        return self.here - self.there


@dataclass(frozen=True)
class Difference:
    """A condition that both sides do not have in common."""

    condition: str
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"  {self.condition}: {_plain(self.here)} here, {_plain(self.there)} there"


@dataclass(frozen=True)
class States:
    """The stages at which both sides have the same digest, and the first at which they differ."""

    same: list[str]
    differ_at: str | None = None


@dataclass(frozen=True)
class Comparison:
    """scores: by stage, 0 being zero-shot, and task.  environments: lines of fingerprint fields that differ.

    unknown: by the side ("here", "there") the conditions that a file does not say, with those of the other side, None
    where that does not say them either.
    """

    here: Side
    there: Side
    unlike: list[Difference]
    unknown: dict[str, dict[str, Any]]
    stages: int
    scores: list[dict[str, Pair | None]]
    metrics: dict[str, Pair | None]
    states: States | None
    environments: list[str]


def of(path: Path, profile: str | None = None, scale: str | None = None) -> Side:
    """A run, as ``of_run``, or a score matrix in a .csv or .json file, as ``matrix_file.read`` takes it with a scale.

    Raises: UserError as these two.
    """
    if path.is_dir() or not path.is_file() or path.suffix.lower() not in (".csv", ".json"):
        return of_run(path, profile)
    value = read_json(path) if path.suffix.lower() == ".json" else None
    if of_a_run(value):
        return of_run(path, profile)
    record, said = read(path, scale), value if isinstance(value, dict) else {}
    conditions = {key: said[key] for key in ("profile", *CONDITIONS) if key in said and key != "tasks"}
    method = said.get("method")
    return Side(
        str(path),
        method if isinstance(method, str) else "",
        conditions | ({"tasks": record.tasks} if record.named else {}),
        record,
        matrix=True,
    )


def of_run(path: Path, profile: str | None = None) -> Side:
    """A run folder or its results.json under a scoring profile, or under its main one if it has no such profile.

    Raises:
        UserError: there are no results of a run; says where and what.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file}: expected the results of a run, found nothing; give a run folder, its results.json, "
            "or a score matrix in a .csv or .json file"
        )
    results = verified(read_json(file), file)
    needed = ("method", "tasks", "score_matrix", "profile", *CONDITIONS)
    missing = [key for key in needed if not isinstance(results, dict) or key not in results]
    if missing:
        raise UserError(f"{file}: expected the results.json of a run, lacks {', '.join(missing)}; run cnext-run again")
    profiles = results.get("profiles")
    section = profiles.get(profile) if isinstance(profiles, dict) else None
    if isinstance(section, dict):
        results = {key: value for key, value in results.items() if key not in SCORES} | section
    else:
        profile = results["profile"]
    # The released evaluators keep negative cosines.
    record = from_json(results, str(file), least=-100.0 if profile == "paper" else 0.0)
    conditions = {
        "profile": profile,
        **{key: results[key] for key in CONDITIONS},
        **_scored_by(file.parent, results["suite"]),
    }
    here, seed = results.get("fingerprint"), results.get("seed")
    return Side(
        f"{results['method']} ({path})",
        str(results["method"]),
        conditions,
        record,
        digests=_digests(results.get("digests"), str(file)),
        fingerprint=here if isinstance(here, dict) else None,
        data=_data(results.get("data"), str(file)),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
    )


def _data(value: Any, where: str) -> data_alike.Known | None:
    return None if value is None else schemas.convert(value, dict[str, dict[str, DataSummary]], f"{where}, data")


def _scored_by(folder: Path, suite: Any) -> dict[str, Any]:
    """The CLIP that scored a run's images, and scorers that are not cnext's, from config.json; {} without that file.

    A file named as the model that the suite has is that model: ViT-B-32.pt is openai/ViT-B-32.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else None
    if not isinstance(config, dict) or "clip" not in config:
        return {}
    own, given = suites.load(suite).clip if suite in suites.names() else "", Path(str(config["clip"] or ""))
    is_own = not config["clip"] or str(given) == own or (given.suffix and given.stem == Path(own).name)
    return {"clip": SUITES_OWN if is_own else str(given), **({"code": config["code"]} if "code" in config else {})}


def _digests(rows: Any, where: str) -> dict[tuple[int, str], str]:
    """The digests of a results.json by (stage, what was trained); none where it has none."""
    try:
        return {(int(row["stage"]), str(row["trained"])): str(row["sha256"]) for row in rows or ()}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{where}, digests: expected rows with stage, trained and sha256, got {error!r}") from error


def _states(here: Side, there: Side) -> States | None:
    """Which stages are bit-identical; None where a side has no digests, or none can be, of other seeds or methods."""
    if not here.digests or not there.digests or (here.seed, here.method) != (there.seed, there.method):
        return None
    same: list[str] = []
    for (stage, trained), digest in here.digests.items():
        found = there.digests.get((stage, trained))
        if found is None:
            continue
        if found != digest:
            return States(same, f"{stage} {trained}")
        same.append(f"{stage} {trained}")
    return States(same)


def of_paper(method: str, printed: bool = False) -> Side:
    """The published results of a method in the Continual-NExT paper.

    Args: printed: the name may also be the paper's own ("MAGE" of mage-paper), in any case of its letters.
    Raises: UserError with the methods that it has.
    """
    paper = published.continual_next()
    if printed and method not in paper["methods"]:
        known = {entry["title"].lower(): name for name, entry in paper["methods"].items()}
        known |= {name.lower(): name for name in paper["methods"]}
        method = known.get(method.lower(), method)
    conditions = {**paper["conditions"], "clip": SUITES_OWN}
    tasks = conditions["tasks"]
    matrix = published.score_matrix(paper, method)
    zero_shot = published.score_matrix(paper, "zero-shot").to_rows()[-1]
    record = ScoreRecord(tasks, matrix, zero_shot, writes=[paper["writes"][task] for task in tasks])
    entry = paper["methods"][method]
    name = f"{entry['title']} of the paper (tables {', '.join(map(str, entry['tables']))})"
    note = f"error types are not compared: in the paper they are classified by {paper['judge']}, here by rules"
    return Side(name, method, conditions, record, entry.get("deviations", {}), note)


def _named(side: Side, other: Side) -> Side:
    """A matrix whose tasks have no names with those of the other side, if it has as many."""
    if side.record.named or not other.record.named:
        return side
    count, names = len(side.record.tasks), other.record.tasks
    if count != len(names):
        raise UserError(
            f"{side.name} has {count} columns without names, {other.name} has the tasks {', '.join(names)}; "
            'name the columns in a first row, or as "tasks" in JSON'
        )
    return replace(side, record=replace(side.record, tasks=names))


def compare(here: Side, there: Side, anyway: bool = False) -> Comparison:
    """Scores and metrics of both sides and their differences, here minus there, up to the last stage of both.

    Raises:
        UserError: the conditions differ, unless ``anyway``; or no score was evaluated on both sides.
    """
    conditions = dict.fromkeys(("profile", *CONDITIONS, *here.conditions, *there.conditions))
    unknown = {
        place: {key: other.conditions.get(key) for key in conditions if key not in side.conditions}
        for place, side, other in (("here", here, there), ("there", there, here))
        if side.matrix
    }
    here, there = _named(here, there), _named(there, here)
    unlike = [
        Difference(key, value, there.conditions[key])
        for key, value in here.conditions.items()
        if key in there.conditions and value != there.conditions[key]
    ]
    unlike += [Difference(*each) for each in data_alike.pairs(here.data, there.data, alone=False)]
    if unlike and not anyway:
        listed = "\n".join(map(str, unlike))
        raise UserError(f"{here.name} and {there.name} are not comparable:\n{listed}\n--anyway compares all the same")
    stages = min(here.record.matrix.stages_done, there.record.matrix.stages_done)
    tasks = [task for task in here.record.tasks if task in there.record.tasks]
    scores = [
        {task: _pair(here.score(stage, task), there.score(stage, task)) for task in tasks}
        for stage in range(stages + 1)
    ]
    if not any(pair for row in scores for pair in row.values()):
        raise UserError(f"{here.name} and {there.name} have no task and stage in common; there is nothing to compare")
    theirs = there.metrics(stages)
    metrics = {
        name: _pair(value, theirs[name], there.deviations.get(name)) for name, value in here.metrics(stages).items()
    }
    environments = fingerprint.differences(here.fingerprint, there.fingerprint)
    return Comparison(here, there, unlike, unknown, stages, scores, metrics, _states(here, there), environments)


def _pair(here: float | None, there: float | None, deviation: float | None = None) -> Pair | None:
    return None if here is None or there is None else Pair(here, there, deviation)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def as_json(comparison: Comparison) -> str:
    """A comparison as JSON, with every metric of both sides."""

    def pair(of: Pair | None) -> dict[str, float] | None:
        if of is None:
            return None
        spread = {} if of.deviation is None else {"deviation_there": of.deviation}
        return {"here": of.here, "there": of.there, "difference": of.difference, **spread}

    states = comparison.states
    value = {
        "here": comparison.here.name,
        "there": comparison.there.name,
        "not_comparable": [vars(difference) for difference in comparison.unlike],
        "unknown": comparison.unknown,
        "seeds": {"here": comparison.here.seed, "there": comparison.there.seed},
        "stages": comparison.stages,
        "scores": [{task: pair(of) for task, of in row.items()} for row in comparison.scores],
        "metrics": {name: pair(of) for name, of in comparison.metrics.items()},
        "note": comparison.there.note,
        "states": states and {"same": states.same, "part_at": states.differ_at},
        "environments": comparison.environments,
    }
    return json.dumps(value, indent=2)


def text(comparison: Comparison) -> str:
    """A comparison as two tables: every score with its difference, then every metric that both sides have."""
    scores, metrics = comparison.scores, comparison.metrics
    lines = [f"here:  {comparison.here.name}", f"there: {comparison.there.name}"]
    if comparison.unlike:
        lines += ["NOT COMPARABLE:", *map(str, comparison.unlike)]
    lines += _unknown_text(comparison)
    lines += ["", "score here, and its difference to there (here minus there), in percent"]
    lines.append(f"{'after stage':<12}" + "".join(f"{task:>16}" for task in scores[0]))
    for stage, row in enumerate(scores):
        if any(row.values()):
            cells = (f"{points(p.here)} {points(p.difference, '+'):>6}" if p else "-" for p in row.values())
            lines.append(f"{stage or 'zero-shot':<12}" + "".join(f"{cell:>16}" for cell in cells))
    width = max(map(len, metrics)) + 2
    lines += ["", f"{'metric':<{width}}{'here':>8}{'there':>8}{'difference':>12}"]
    sides = [{name: pair and getattr(pair, side) for name, pair in metrics.items()} for side in ("here", "there")]
    for name in without_repeats(metrics, *sides):
        if pair := metrics[name]:
            here, there = points(pair.here), points(pair.there)
            spread = "" if pair.deviation is None else f"  there ± {points(pair.deviation)} over seeds"
            lines.append(f"{name:<{width}}{here:>8}{there:>8}{points(pair.difference, '+'):>12}{spread}")
    seeds = [side.seed for side in (comparison.here, comparison.there)]
    if None not in seeds and seeds[0] != seeds[1]:
        lines.append(f"seeds: {seeds[0]} here, {seeds[1]} there, so that all parameters differ from the start")
    if comparison.there.note and (comparison.here.record.errors or not comparison.here.matrix):
        lines.append(comparison.there.note)
    return "\n".join([*lines, *_states_text(comparison)])


def _unknown_text(comparison: Comparison) -> list[str]:
    """What the files do not say, beside what the other side has; the columns that were named after it."""
    lines = []
    for place, conditions in comparison.unknown.items():
        side, other = (comparison.here, comparison.there)[:: 1 if place == "here" else -1]
        known = {key: _plain(value) for key, value in conditions.items() if value is not None}
        if "tasks" in known:
            known["tasks"] += "; the columns are taken as these, in this order"
        if known:
            lines += [f"NOT CHECKED, as {side.name} does not say it; {other.name} has:"]
            lines += [f"  {key}: {value}" for key, value in known.items()]
    neither = [key for key in ("profile", *CONDITIONS) if all(key in of for of in comparison.unknown.values())]
    if len(comparison.unknown) == 2 and neither:
        lines += [f"NOT CHECKED, as neither file says it: {', '.join(neither)}"]
    sides = (comparison.here, comparison.there)
    lacking = [side.name for side in sides if side.data is None and side.seed is not None]
    if lacking and any(side.data is not None for side in sides):
        lines.append(f"NOT CHECKED: the data, of which {lacking[0]} has no digest, as a run of an earlier version")
    return lines


def _states_text(comparison: Comparison) -> list[str]:
    states = comparison.states
    if states is None:
        return []
    lines = ["", f"states: bit-identical up to stage {states.same[-1]}" if states.same else "states: not identical"]
    if states.differ_at is not None:
        lines[-1] += f"; different from stage {states.differ_at} on"
        lines += [f"  environments differ in {line}" for line in comparison.environments]
    return lines
