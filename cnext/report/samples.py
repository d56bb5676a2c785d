"""Report sections that show samples over the stages: generated images, and answers that became wrong."""

from __future__ import annotations

import io
from pathlib import Path

from cnext.analysis.breaks import NO_PREDICTIONS
from cnext.analysis.run import Run, points
from cnext.analysis.samples import most_changed
from cnext.image_files import open_image
from cnext.report.blocks import Block, Frame, Picture, Section, Strip, Text
from cnext.runs.schemas import Answer, check_image

SMALL, LARGE = 128, 256
"""Images up to SMALL pixels a side are enlarged by whole pixels to at most 2 SMALL, larger ones shrunk to LARGE."""
QUALITY = 82
"""Of a large image as JPEG, which takes a tenth of a PNG."""
RIGHT, WRONG = 99.5, 50.0
SHOWN = 3


def images(run: Run) -> Section:
    """One prompt of each task that writes images: the input, the target and the image generated at each stage."""
    title = "Generated images over stages"
    blocks: list[Block] = []
    if not run.answered and any("image" in run.modalities("writes", task) for task in run.tasks):
        return Section(title, [Text(f"Not shown: {run.path}: {NO_PREDICTIONS}.", "missing")])
    for number, task in enumerate(run.tasks, 1):
        samples = most_changed(run, task, 1) if "image" in run.modalities("writes", task) else []
        if not samples:
            continue
        [chosen] = samples
        row = chosen[max(chosen)]
        frames = [
            _given(getattr(row, key), f"image_{number}_{label}.png", label)
            for key, label in (("source_image", "input"), ("target_image", "target"))
            if getattr(row, key)
        ]
        for stage, answer in chosen.items():
            name, label, verdict = f"image_{number}_{stage}.png", run.stage(stage), points(answer.strict)
            path = run.path / (answer.image or "")
            if answer.image:
                check_image(path, answer)
            if answer.image and path.is_file():
                frames.append(Frame(label, picture(path, name, f"{task}, generated at stage {label}"), verdict))
            else:
                instead = f", but text: {_shorten(answer.text, 60)}" if answer.text else ""
                frames.append(Frame(label, None, verdict, f"no image{instead}"))
        blocks.append(Strip(f"{task}: {_shorten(row.instruction, 300)}", frames))
    note = (
        "One sample of each task that writes images: the one whose score varies most over the stages. Above each image "
        "stands its stage, below it its score in percent."
    )
    return Section(title, [Text(note), *blocks] if blocks else [])


def answers(run: Run) -> Section:
    """Answers of each task that writes text that were correct when it was learnt and are wrong at the end."""
    blocks: list[Block] = []
    for number, task in enumerate(run.tasks[: run.last], 1):
        samples = run.answers(task) if "text" in run.modalities("writes", task) else []
        if number >= run.last or not samples or not {number, run.last} <= samples[0].keys():
            continue
        right = [sample for sample in samples if sample[number].strict >= RIGHT]
        lost = [sample for sample in right if sample[run.last].strict < WRONG]
        different: dict[str, dict[int, Answer]] = {}
        for sample in lost:
            different.setdefault(sample[run.last].text, sample)
        title = f"{task}: of {len(right)} answers correct when learnt, {len(lost)} are wrong at the end"
        blocks.append(Text(title, "task"))
        for index, sample in enumerate(list(different.values())[:SHOWN], 1):
            row = sample[run.last]
            source = row.source_image
            frames = [_given(source, f"answer_{number}_{index}.png", "input")] if source else []
            frames.append(Frame("expected", _shorten(row.answer)))
            frames += [_answer(run.stage(stage), given) for stage, given in sample.items()]
            blocks.append(Strip(_shorten(row.instruction, 300), frames))
    note = (
        "Answers that were correct when their task was learnt and are wrong at the end: of each task at most "
        f"{SHOWN}, each with another wrong answer. Correct is a score of {RIGHT:g} or more, wrong one below {WRONG:g}."
    )
    return Section("Answers over stages", [Text(note), *blocks] if blocks else [])


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _answer(label: str, row: Answer) -> Frame:
    verdict = "✓" if row.strict >= RIGHT else f"✗ {row.error.replace('_', ' ')}"
    return Frame(label, _shorten(row.text) or None, verdict, "empty")


def _given(path: str, name: str, label: str) -> Frame:
    """An image of the data set, which may be on another machine."""
    if not Path(path).is_file():
        return Frame(label, None, "", "file not found")
    return Frame(label, picture(Path(path), name, f"{label} image"))


def picture(path: Path, name: str, alt: str) -> Picture:
    """An image file in the report's size: PNG where it is small, else JPEG. Raises UserError for what is no image."""
    from PIL import Image

    image = open_image(path)
    longest = max(image.size)
    if longest <= SMALL:
        factor = 2 * SMALL // longest
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((LARGE, LARGE))
    buffer = io.BytesIO()
    if longest <= SMALL:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=QUALITY)
        name = f"{name.removesuffix('.png')}.jpg"
    return Picture(name, buffer.getvalue(), alt)
