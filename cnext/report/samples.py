"""The report's samples: what was drawn to one prompt a task over all stages, and answers that were lost."""

from __future__ import annotations

import io
from pathlib import Path

from cnext.analysis.breaks import NO_PREDICTIONS
from cnext.analysis.run import Run, points
from cnext.analysis.samples import telling
from cnext.errors import UserError
from cnext.report.blocks import Block, Frame, Picture, Section, Strip, Text

SMALL, LARGE = 128, 256
"""Pictures up to SMALL pixels a side are enlarged by whole pixels to at most 2 SMALL, larger ones shrunk to LARGE."""
RIGHT, WRONG = 99.5, 50.0
SHOWN = 3


def drawings(run: Run) -> Section:
    """One prompt of each task that writes images: what was given, what was wanted, what was drawn at each stage."""
    blocks: list[Block] = []
    if not run.answered and any("image" in run.modalities("writes", task) for task in run.tasks):
        return Section("Drawn over the stages", [Text(f"Not shown: {run.path}: {NO_PREDICTIONS}.", "missing")])
    for number, task in enumerate(run.tasks, 1):
        samples = telling(run, task, 1) if "image" in run.modalities("writes", task) else []
        if not samples:
            continue
        [chosen] = samples
        row = chosen[max(chosen)]
        frames = [
            _given(row[key], f"drawing_{number}_{label}.png", label)
            for key, label in (("source_image", "given"), ("target_image", "wanted"))
            if row.get(key)
        ]
        for stage, answer in chosen.items():
            name, label, verdict = f"drawing_{number}_{stage}.png", run.stage(stage), points(answer["strict"])
            if answer.get("image") and (path := run.path / answer["image"]).is_file():
                frames.append(Frame(label, picture(path, name, f"{task}, drawn at stage {label}"), verdict))
            else:
                wrote = f", but the words: {_shorten(answer['text'], 60)}" if answer["text"] else ""
                frames.append(Frame(label, None, verdict, f"no image{wrote}"))
        blocks.append(Strip(f"{task}: {_shorten(row['instruction'], 300)}", frames))
    note = (
        "For each task that writes images, of the samples drawn at most stages the one whose score changed most. Above "
        "each picture its stage, below it its score in percent."
    )
    return Section("Drawn over the stages", [Text(note), *blocks] if blocks else [])


def answers(run: Run) -> Section:
    """Of each task that writes text, answers that were right when it was learnt and are wrong at the end."""
    blocks: list[Block] = []
    for number, task in enumerate(run.tasks[: run.last], 1):
        samples = run.answers(task) if "text" in run.modalities("writes", task) else []
        if number >= run.last or not samples or not {number, run.last} <= samples[0].keys():
            continue
        right = [sample for sample in samples if sample[number]["strict"] >= RIGHT]
        lost = [sample for sample in right if sample[run.last]["strict"] < WRONG]
        different: dict[str, dict[int, dict]] = {}
        for sample in lost:
            different.setdefault(sample[run.last]["text"], sample)
        title = f"{task}: of {len(right)} answers right when learnt, {len(lost)} wrong at the end"
        blocks.append(Text(title, "task"))
        for index, sample in enumerate(list(different.values())[:SHOWN], 1):
            row = sample[run.last]
            source = row.get("source_image")
            frames = [_given(source, f"answer_{number}_{index}.png", "given")] if source else []
            frames.append(Frame("expected", _shorten(row["answer"])))
            frames += [_said(run.stage(stage), said) for stage, said in sample.items()]
            blocks.append(Strip(_shorten(row["instruction"], 300), frames))
    note = f"Right when learnt and wrong at the end: the first of each different wrong answer, at most {SHOWN} a task."
    return Section("Answers over the stages", [Text(note), *blocks] if blocks else [])


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _said(label: str, row: dict) -> Frame:
    verdict = "✓" if row["strict"] >= RIGHT else f"✗ {row['error'].replace('_', ' ')}"
    return Frame(label, _shorten(row["text"]) or None, verdict, "nothing")


def _given(path: str, name: str, label: str) -> Frame:
    """A picture of the data set, which may have stayed on another machine."""
    if not Path(path).is_file():
        return Frame(label, None, "", "file is not here")
    return Frame(label, picture(Path(path), name, f"image {label}"))


def picture(path: Path, name: str, alt: str) -> Picture:
    """An image file as a PNG fit for the report. Raises UserError naming the file where it is not an image."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: expected an image, could not read one ({error}); run cnext-run again") from error
    longest = max(image.size)
    if longest <= SMALL:
        factor = 2 * SMALL // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Picture(name, buffer.getvalue(), alt)
