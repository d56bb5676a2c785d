"""Report sections from the scores: headline, score matrix, accuracy over stages, forgetting by error type."""

from __future__ import annotations

import numpy as np

from cnext.analysis.error_types import repeats
from cnext.analysis.run import Run, mean_seen, points
from cnext.analysis.transfer import in_turn
from cnext.report import plots
from cnext.report.blocks import Block, Folded, Key, Numbers, Picture, Plots, Section, Table, Text
from cnext.scoring.base import ERROR_TYPES

MEANING = {
    "avg_acc": "mean score over all tasks at the end, in percent",
    "forgetting": "mean fall of the tasks before the last, from when each was learnt to the end, in points",
    "new_acc": "mean score of each task right after it was learnt, in percent",
}
"""The main metrics in words."""
_AVERAGES = ("avg_hal", "avg_iuf", "avg_oth")


def headline(run: Run) -> Section:
    """The setting of the run, warnings, and the main metrics."""
    results, metrics, count = run.results, run.results.metrics, len(run.tasks)
    samples = sorted(set(results.samples.values()))
    setting = {"backbone": results.backbone, "preset": results.budget, "order": results.order}
    setting |= {"seed": results.seed, "split": results.split}
    facts = [f"{key} {value}" for key, value in setting.items() if value not in ("", None)]
    facts += [f"{' to '.join(map(str, samples[:: max(1, len(samples) - 1)]))} samples a task"] if samples else []
    blocks: list[Block] = [Text(" · ".join(facts), "facts")]
    if not run.finished:
        text = f"Unfinished: evaluated up to stage {run.last} of {count}; all metrics are of these stages. "
        blocks.append(Text(f"{text}The same command resumes the run.", "banner"))
    if results.budget == "smoke":
        blocks.append(Text("Preset smoke: a test that everything works; its scores mean nothing.", "banner"))
    numbers = [
        ("Avg.ACC", metrics.get("avg_acc"), MEANING["avg_acc"]),
        ("Forgetting", metrics.get("forgetting"), MEANING["forgetting"]),
        ("New.ACC", metrics.get("new_acc"), MEANING["new_acc"]),
        ("Zero-shot", mean_seen(run.scores[0]), "mean score over all tasks before any training, in percent"),
    ]
    if run.joint:
        blocks.append(Text("Joint training, an upper bound: all tasks are trained at once, and nothing is forgotten."))
        numbers = [numbers[0], numbers[-1]]
    if _untrained(run):
        what = "No training, a lower bound: nothing is learnt, and nothing can be forgotten."
        blocks.append(Text(f"Evaluation of {results.init.name}, without training." if results.init else what))
        numbers = numbers[:1]
    if results.init:
        blocks.append(Text(f"Started from {results.init}."))
        blocks += [Text(f"What it started from: {note}.", "banner") for note in results.init.notes]
    blocks.append(Numbers([(name, points(value), meaning) for name, value, meaning in numbers]))
    blocks += [Text(text)] if (text := _sentence(run)) else []
    return Section(f"{results.method} on {results.suite}", blocks)


def _sentence(run: Run) -> str:
    """The main figures in words; "" of a run that does not learn tasks one after another."""
    average, new, forgetting = (run.metric(name) for name in ("avg_acc", "new_acc", "forgetting"))
    if not in_turn(run) or average is None or new is None or forgetting is None:
        return ""
    change = "lost" if forgetting >= 0 else "gained"
    return (
        f"After learning {run.last} tasks one after another, the model reaches a mean score of {points(average)} "
        f"percent on them. Right after learning each of them it reached {points(new)}; the tasks before the last one "
        f"have {change} {points(abs(forgetting))} points each since then, on average."
    )


def _untrained(run: Run) -> bool:
    """Whether no stage had an optimizer step, so that all stages are equal."""
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
        "A row for the model before training and after each stage of it, a column for each task; scores in percent. "
        "Outlined: the task just learnt. Below a later score stands its change since then. Blank: not tested. The "
        "average is over the tasks learnt so far, in the first row over all tasks."
    )
    samples = run.results.samples.values()
    if samples:
        note += (
            f" With {min(samples)} samples a task, a score has a standard error of at most "
            f"{points(50 / min(samples) ** 0.5)} points."
        )
    picture = Picture("score_matrix.svg", heat, "Heat map of the score matrix; see the table below")
    return Section(
        "Score matrix", [Text(note), Plots([picture], "wide plot"), Folded("Score matrix as a table", table)]
    )


def stages(run: Run) -> Section:
    """Score over the stages: a panel for the average, then one for each task."""
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
        "Score in percent after each stage, numbered as in the score matrix: the mean over the tasks learnt so far, "
        "then each task. Open dot: before any training. The solid line starts where the task is learnt; grey: the "
        "other tasks. The figures are the score when learnt and, in bold, the last one."
    )
    return Section("Accuracy over stages", [Text(note), Plots(pictures)])


def error_types(run: Run) -> Section:
    """The share of each error type when a task was learnt and at the end, and what forgetting consists of."""
    matrices = run.results.error_matrix or {}
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
        plot = plots.errors(bars, name if once else run.stage(learnt))
        pictures.append(Picture(f"errors_{task + 1}.svg", plot, f"Error shares of {name}, {words}"))
        if len(bars) > 1:
            growth = [bars["end"][error] - bars["learnt"][error] for error in ERROR_TYPES]
            rows.append([name, *(points(value, signed=True) for value in (*growth, sum(growth)))])
    sums = [run.results.metrics.get(name) for name in (*_AVERAGES, "forgetting")]
    rows.append(["mean", *(points(value, signed=True) for value in sums)])
    when = "at the end" if once else "when the task was learnt and at the end"
    note = (
        f"What is missing to a score of 100, in points, {when}, by the type of error. Hallucination: the answer has "
        "the form that was asked for and says something wrong. Instruction unfollowing: it does not have that form. "
        "Other: neither of these. Fixed rules decide the type."
    )
    head = ["change since learnt", "hallucination", "instruction unfollowing", "other", "sum"]
    caption = (
        "How each type grew from when a task was learnt to the end, in points. The last row holds Avg.HAL, Avg.IUF and "
        "Avg.OTH, which add up to Forgetting."
    )
    key = Key([(error.replace("_", " "), plots.ERROR_COLOURS[error]) for error in ERROR_TYPES])
    table = [Table(head, rows, caption)] if len(rows) > 1 else []
    title = "Errors by type" if once else "Forgetting by error type"
    return Section(title, [Text(note), key, Plots(pictures), *table, *_judged(run)])


def _judged(run: Run) -> list[Block]:
    """Forgetting by error type, as classified by each judge with a table in judge/."""
    if not in_turn(run):
        return []
    rows, banners = [], []
    for name, table in run.judged.items():
        if repeats(run, name):
            continue
        left, known, estimates = table.unjudged, table.metrics, table.estimates or {}
        averages = [points(known.get(metric), signed=True) for metric in (*_AVERAGES, "forgetting")]
        for place, metric in enumerate(_AVERAGES):
            if of := estimates.get(metric):
                estimate, low, high = (points(end, signed=True) for end in (of.estimate, of.low, of.high))
                averages[place] = f"{estimate} [{low}, {high}]"
        rows.append([name, table.name, *averages, f"incomplete, {left} not judged" if left else "complete"])
        if left:
            text = f"Incomplete: judge {name} has not judged {left} errors; they count for no error type."
            banners.append(Text(text, "banner"))
    head = ["judge", "model", "Avg.HAL", "Avg.IUF", "Avg.OTH", "Forgetting", "verdicts"]
    caption = (
        "The same averages with error types from cnext judge: a dash where verdicts are missing, an estimate with its "
        "95% interval where a random sample of the errors was judged."
    )
    return [*banners, Table(head, rows, caption, words=(1, 6))] if rows else []
