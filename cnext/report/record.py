"""Report sections on training: loss curves, metrics under all scoring profiles, cost, and how to reproduce the run."""

from __future__ import annotations

import json

import numpy as np

from cnext.analysis.run import NOTHING, Run, points
from cnext.report import plots
from cnext.report.blocks import Block, Code, Picture, Plots, Section, Table, Text
from cnext.runs.command_line import command
from cnext.scoring.matrix import FORMULAS, without_repeats


def training(run: Run) -> Section:
    """Loss over the steps of each task, and the weights of the moving average."""
    blocks: list[Block] = []
    if run.losses:
        pictures = [
            Picture(
                f"loss_{stage}.svg",
                plots.loss(values, stage - 1, run.stage(stage)),
                f"Training loss of stage {run.stage(stage)} over {len(values)} steps",
            )
            for stage, values in sorted(run.losses.items())
        ]
        note = (
            "Training loss over the optimizer steps of each task: the line is the mean, the band goes from the least "
            "to the greatest. Each panel has a scale of its own."
        )
        blocks += [Text(note), Plots(pictures)]
    branches: dict[str, dict[int, tuple[float, float]]] = {}
    for merge in run.results.averaging or []:
        for branch, beta in merge.branches.items():
            branches.setdefault(branch, {})[run.tasks.index(merge.task) + 1] = (beta.mean, beta.std)
    if branches:
        pictures = [
            Picture(
                f"averaging_{number}.svg",
                plots.retention(stages, len(run.tasks), branch),
                f"Mean beta of {branch}: " + ", ".join(f"stage {t} {mean:.2f}" for t, (mean, _) in stages.items()),
            )
            for number, (branch, stages) in enumerate(branches.items(), 1)
        ]
        note = (
            "Moving average: how much of the old average (beta) is kept when the parameters of a task are merged into "
            "it; 1 keeps all of it, 0 replaces it. Dot: mean over the branch's parameters; bar: one standard deviation."
        )
        blocks += [Text(note), Plots(pictures)]
    return Section("Training", blocks)


def metrics(run: Run) -> Section:
    """Every metric with its formula, and every score, under all scoring profiles side by side."""
    main, profiles = run.results.profile, run.results.profiles or {}
    values = run.results.metrics
    rows = []
    for name in without_repeats(values, values, *(profile.metrics for profile in profiles.values())):
        value = values[name]
        others = [profile.metrics.get(name) for profile in profiles.values()]
        if run.joint and value is None and others.count(None) == len(others):
            continue
        beside = [cell for other in others for cell in _beside(value, other)]
        rows.append([name, points(value), *beside, FORMULAS.get(name, "")])
    columns = [column for profile in profiles for column in (profile, "gap")]
    note = (
        "Every metric by two ways of scoring the same answers. Strict: each score as it is meant. Paper: the "
        "evaluators as the paper's authors released them, errors included. Gap: the second minus the first. In the "
        "formulas, R[t][i] is the score in percent on task i after stage t of T, tasks in training order."
    )
    formulas = Table(["metric", main, *columns, "formula and divisor"], rows, words=(2 + len(columns),))
    blocks: list[Block] = [Text(note), formulas]
    times = ("zero-shot", "learnt") if run.joint else ("zero-shot", "learnt", "end")
    for name, profile in profiles.items():
        other = run.staged(profile.score_matrix, profile.zero_shot)
        rows = []
        for task, label in enumerate(run.tasks):
            learnt = run.learnt(task)
            stages = (0, learnt, max(run.last, learnt))[: len(times)]
            pairs = [(run.scores[stage, task], other[stage, task]) for stage in stages]
            cells = [(points(first), *_beside(first, second)) for first, second in pairs]
            rows.append([label, *(cell for triple in cells for cell in triple)])
        head = [f"{time}, {kind}" for time in times for kind in (main, name, "gap")]
        blocks.append(Table(["task", *head], rows, f"Scores under the profiles {main} and {name}, in percent."))
    return Section("Metrics", blocks if values else [])


def _beside(value: float | None, other: float | None) -> tuple[str, str]:
    gap = np.nan if value is None or other is None else other - value
    return points(other), points(gap, signed=True)


def costs(run: Run) -> Section:
    """Parameters, storage, memory, time and energy, in all and by stage. Columns without values are left out."""
    known = (
        ("trainable parameters", "trainable_params", _count),
        ("stored between tasks", "stored_bytes", _size),
        ("peak memory", "peak_memory_bytes", _size),
        ("peak device memory", "peak_device_memory_bytes", _size),
        ("optimizer steps", "optimizer_steps", _count),
        ("supervised tokens", "supervised_tokens", _count),
        ("total time", "total_seconds", _time),
        ("energy", "energy_joules", _joules),
    )
    # cost.json is measured; the counts in results.json are exact.
    rows = [[name, show(value)] for name, key, show in known if (value := getattr(run.cost, key)) is not None]
    blocks: list[Block] = [Table(["cost", "value"], rows)] if rows else []
    if run.cost.stages:
        columns = (
            ("training", "train_seconds", _time),
            ("evaluation", "evaluate_seconds", _time),
            ("steps", "steps", _count),
            ("seconds/step", "seconds_per_step", "{:.3f}".format),
            ("tokens/s", "tokens_per_second", _count),
            ("stored", "stored_bytes", _size),
            ("peak memory", "peak_memory_bytes", _size),
            ("peak device memory", "peak_device_memory_bytes", _size),
            ("energy", "energy_joules", _joules),
        )
        filled = [
            column for column in columns if any(getattr(stage, column[1]) is not None for stage in run.cost.stages)
        ]
        stages = [
            [stage.task, *(NOTHING if (v := getattr(stage, key)) is None else show(v) for _, key, show in filled)]
            for stage in run.cost.stages
        ]
        blocks.append(Table(["stage", *(name for name, _, _ in filled)], stages))
    return Section("Cost", blocks)


def data(run: Run) -> Section:
    """The rows of the data that the run left out, and why."""
    rows = [
        [task, split, reason, _count(found.count), found.rows[0] if found.rows else NOTHING]
        for task, splits in run.left_out.items()
        for split, reasons in splits.items()
        for reason, found in reasons.items()
    ]
    note = "Rows of the data that were neither trained on nor scored. left_out.json names them."
    table = Table(["task", "split", "reason", "rows", "the first"], rows, words=(1, 2, 4))
    return Section("Rows left out", [Text(note), table] if rows else [])


def reproduction(run: Run) -> Section:
    """The command that runs it again, the configuration, the versions and the machine."""
    blocks: list[Block] = []
    if run.config:
        note = "The command resolves to the configuration below, and gives the same scores in the same environment."
        blocks += [Text(note), Code(command(run.config, run.options))]
    versions = {**run.environment.get("versions", {}), **run.results.versions}
    machine = [[name, _plain(value)] for name, value in run.environment.items() if name != "versions"]
    for head, rows in (
        ("version", [[name, version or "not installed"] for name, version in versions.items()]),
        ("environment", machine),
        ("configuration", [[name, _plain(value)] for name, value in run.config.items()]),
    ):
        if rows:
            blocks.append(Table([head, "value"], rows, words=(1,)))
    return Section("Reproduction", blocks)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _joules(value: float) -> str:
    return f"{value / 1e3:.2f} kJ" if value < 1e6 else f"{value / 3.6e6:.2f} kWh"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"
