"""The report's findings from the scores: the headline, the score matrix, accuracy over stages, and why it forgets."""

from __future__ import annotations

import numpy as np

from cnext.analysis.error_types import repeats, who
from cnext.analysis.run import Run, mean_seen, points
from cnext.analysis.transfer import in_turn
from cnext.report import plots
from cnext.report.blocks import Block, Folded, Key, Numbers, Picture, Plots, Section, Table, Text
from cnext.scoring.base import ERROR_TYPES

_AVERAGES = ("avg_hal", "avg_iuf", "avg_oth")


def headline(run: Run) -> Section:
    """What was run, whether to believe it, and its four figures."""
    results, metrics, count = run.results, run.results.get("metrics", {}), len(run.tasks)
    samples = sorted(set(results.get("samples", {}).values()))
    facts = [f"{key} {results[key]}" for key in ("backbone", "budget", "order", "seed", "split") if key in results]
    facts += [f"{' to '.join(map(str, samples[:: max(1, len(samples) - 1)]))} samples a task"] if samples else []
    blocks: list[Block] = [Text(" · ".join(facts), "facts")]
    if not run.finished:
        text = f"Unfinished: evaluated up to stage {run.last} of {count}. The figures hold for the stages so far; "
        blocks.append(Text(f"{text}the same command resumes it.", "banner"))
    if results.get("budget") == "smoke":
        blocks.append(Text("A smoke run: it shows that everything works, and its scores mean nothing.", "banner"))
    numbers = [
        ("Avg.ACC", metrics.get("avg_acc"), "mean score at the end, over all tasks learnt"),
        ("Forgetting", metrics.get("forgetting"), "points lost since a task was learnt, mean of all but the last task"),
        ("New.ACC", metrics.get("new_acc"), "mean score of each task right after learning it"),
        ("Zero-shot", mean_seen(run.scores[0]), "mean score before any training"),
    ]
    if run.joint:
        blocks.append(Text("Joint training, a reference: all tasks were learnt at once, and none is forgotten."))
        numbers = [numbers[0], numbers[-1]]
    if _untrained(run):
        blocks.append(Text("Without training, a reference: nothing is learnt, and nothing can be forgotten."))
        numbers = numbers[:1]
    blocks.append(Numbers([(name, points(value), meaning) for name, value, meaning in numbers]))
    return Section(f"{results['method']} on {results['suite']}", blocks)


def _untrained(run: Run) -> bool:
    """Whether stages went by without a step, so that all of them are as the first."""
    return run.untrained and run.last > 0


def matrix(run: Run) -> Section:
    """The score matrix as a heat map and as a table."""
    names = [run.stage(stage) for stage in run.stages]
    rows = [
        [run.stage(stage), *map(points, run.scores[stage]), points(mean_seen(run.scores[stage][: stage or None]))]
        for stage in run.stages
    ]
    table = Table(["after stage", *run.tasks, "average"], rows)
    learnt = [run.stages.index(run.learnt(task)) for task in range(len(run.tasks))]
    heat = plots.score_matrix(run.scores[run.stages], names, run.tasks, learnt)
    note = (
        "Score in percent on each task (column) after each stage (row). Outlined: the task just learnt; the small "
        "figures beneath are the change since then. Blank: not evaluated. Average: over the tasks learnt by that "
        "stage, zero-shot over all."
    )
    samples = run.results.get("samples", {}).values()
    if samples:
        note += f" One standard error of a score is at most {points(50 / min(samples) ** 0.5)} points."
    picture = Picture("score_matrix.svg", heat, "Heat map of the score matrix, which the table below it repeats")
    return Section("Score matrix", [Text(note), Plots([picture], "wide plot"), Folded("The same as a table", table)])


def stages(run: Run) -> Section:
    """Accuracy over the stages, one panel a task, the stage average first."""
    if run.joint or _untrained(run):
        return Section("", [])
    titles = ["stage average", *(run.stage(number) for number in range(1, len(run.tasks) + 1))]
    pictures = []
    for number, title in enumerate(titles):
        task = number - 1 if number else None
        line = [mean_seen(row[: stage or None]) if task is None else row[task] for stage, row in enumerate(run.scores)]
        spoken = ", ".join(f"stage {stage} {points(value)}" for stage, value in enumerate(line) if stage >= number)
        alt = f"Score over stages of {title}: {spoken}"
        pictures.append(Picture(f"stages_{number}.svg", plots.accuracy(run.scores, task, title), alt))
    note = (
        "Score in percent over the stages, numbered as in the matrix. Open dot: zero-shot. The line begins where the "
        "task is learnt; grey lines are the other tasks. Labels: the score when learnt, and in bold the last one."
    )
    return Section("Accuracy over stages", [Text(note), Plots(pictures)])


def why_it_forgets(run: Run) -> Section:
    """What the lost points went to: the shares of each error when learnt and, where that is later, at the end."""
    matrices = run.results.get("error_matrix") or {}
    if run.last == 0 or set(matrices) != set(ERROR_TYPES):
        return Section("", [])
    shares = {error: run.staged(matrices[error]) for error in ERROR_TYPES}
    once = run.joint or _untrained(run)
    pictures, rows = [], []
    for task, name in enumerate(run.tasks[: run.last]):
        learnt = run.last if _untrained(run) else run.learnt(task)
        times = {"end": run.last} if once else {"learnt": learnt} | ({"end": run.last} if learnt < run.last else {})
        bars = {time: {error: shares[error][stage, task] for error in ERROR_TYPES} for time, stage in times.items()}
        if any(not np.isfinite(share) for parts in bars.values() for share in parts.values()):
            continue
        words = "; ".join(
            f"{time}: " + ", ".join(f"{error.replace('_', ' ')} {points(share)}" for error, share in parts.items())
            for time, parts in bars.items()
        )
        drawn = plots.errors(bars, name if once else run.stage(learnt))
        pictures.append(Picture(f"errors_{task + 1}.svg", drawn, f"Error shares of {name}, {words}"))
        if len(bars) > 1:
            growth = [bars["end"][error] - bars["learnt"][error] for error in ERROR_TYPES]
            rows.append([name, *(points(value, signed=True) for value in (*growth, sum(growth)))])
    metrics = run.results.get("metrics", {})
    sums = [metrics.get(name) for name in (*_AVERAGES, "forgetting")]
    rows.append(["mean", *(points(value, signed=True) for value in sums)])
    when = "at the end" if once else "when learnt and, if that is later, at the end"
    note = (
        f"What keeps each task from 100 percent, {when}, in percent of samples: "
        "hallucination (an answer of the right form that is wrong), instruction unfollowing (an answer of the wrong "
        "form) and other. Told apart by the scorers' rules."
    )
    head = ["growth since learnt", "hallucination", "instruction unfollowing", "other", "sum"]
    caption = "Last row: Avg.HAL + Avg.IUF + Avg.OTH = Forgetting, in points."
    key = Key([(error.replace("_", " "), plots.ERROR_COLOURS[error]) for error in ERROR_TYPES])
    table = [Table(head, rows, caption)] if len(rows) > 1 else []
    title = "What it gets wrong" if once else "Why it forgets"
    return Section(title, [Text(note), key, Plots(pictures), *table, *_judged(run)])


def _judged(run: Run) -> list[Block]:
    """What each judge whose table is in judge/ books forgetting to."""
    if not in_turn(run):
        return []
    rows, banners = [], []
    for name, table in run.judged.items():
        if repeats(run, name):
            continue
        left, booked, guessed = table["unjudged"], table["metrics"], table.get("estimates") or {}
        averages = [points(booked.get(metric), signed=True) for metric in (*_AVERAGES, "forgetting")]
        for place, metric in enumerate(_AVERAGES):
            if of := guessed.get(metric):
                estimate, low, high = (points(of[end], signed=True) for end in ("estimate", "low", "high"))
                averages[place] = f"{estimate} [{low}, {high}]"
        rows.append([name, who(table), *averages, f"incomplete, {left} not judged" if left else "complete"])
        if left:
            text = f"Incomplete: judge {name} has not judged {left} errors; nothing is guessed for them."
            banners.append(Text(text, "banner"))
    head = ["judge", "who", "Avg.HAL", "Avg.IUF", "Avg.OTH", "Forgetting", "verdicts"]
    caption = (
        "The same averages as told apart by each judge of cnext judge; a dash where verdicts are missing, "
        "and an estimate with its 95% interval where a part of the errors was drawn to be judged."
    )
    return [*banners, Table(head, rows, caption, words=(1, 6))] if rows else []
