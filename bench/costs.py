"""What a training step costs by the number of modalities, of tasks and by rank, on the backbone small.

    python bench/costs.py                                # measures on the CPU, one thread; about 20 minutes
    CNEXT_TEST_DEVICE=cuda python bench/costs.py         # on a GPU
    python bench/costs.py --draw                         # docs/costs.svg from the measured file

Every method is compared with `lora` at its defaults on the same number of samples, step by step in turn. Written to
bench/results/costs/<device>.json, by axis ("modalities", "tasks", "rank"), value and method:

branches: that are attached. trained: parameters that the last task trains.
step_ms: time of an optimizer step of the last task, 16 samples: the mean of the medians of its two halves, as averaging
rules read gradients in the second. over_lora: the same of the ratio to lora's step, in turn.
answer_ms: median time of one answer, of 16, its image encoded anew.
end_s: what the end of the last task takes, `Method.after_task` and phases.
kept_bytes: what the method holds between tasks: its parameters and its state, as a checkpoint has them.
saved_bytes: what the forward pass of a step keeps for the backward pass, parameters left out.
peak_bytes: allocated at most in a step; of a GPU alone.

modalities: tasks that read all modalities and write text; the third one is a name for two more branches, without
data of its own. tasks: next-real's hundred classes, cut in as many parts. rank: of each branch, with two modalities.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from timing import DEVICE, GPU, finish
from torch import Tensor

from cnext import methods
from cnext.backbones.small.model import SmallBackbone
from cnext.backbones.small.vision import SIZES
from cnext.backbones.tiny import model as tiny_model
from cnext.runs import fingerprint
from cnext.tasks import formats, suites
from cnext.tasks.base import Sample, Task
from cnext.tasks.generated import Example, Generator
from cnext.tasks.next_real import examples, material
from cnext.tasks.scenes import split_of
from cnext.training.batches import stable_seed
from cnext.training.evaluation import answer
from cnext.training.stages import rehearsal_memory
from cnext.training.trainer import TaskTrainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURE = ROOT / "bench" / "results" / "costs", ROOT / "docs" / "costs.svg"
SAMPLES, QUESTIONS = 48, 16
"""Training samples of a task, and questions of an answer's timing."""
STEPS = 2
"""Optimizer steps of each task but the last."""
MODALITIES = ("text", "image", "audio")
METHODS = ("lora", "ewc", "o-lora", "replay", "mage-paper", "mage", "mage-experts", "mr-lora")
"""Those whose cost by number of tasks is measured."""
SUITE = suites.load("next-real")
RECIPE = SUITE.budgets["default"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A method in one setting, to be timed."""

    axis: str
    value: int
    method: str
    hyperparameters: Mapping[str, Any]
    tasks: int = 1
    modalities: tuple[str, ...] = MODALITIES[:2]


def cases(axis: str, values: Sequence[int]) -> list[Case]:
    """The cases of an axis. The first is what the others are compared with."""
    first = Case(axis, 0, "lora", {}, values[0] if axis == "tasks" else 1)
    found = [first]
    for value in values:
        if axis == "tasks":
            found += [Case(axis, value, method, {}, value) for method in METHODS]
        elif axis == "modalities":
            found += [Case(axis, value, name, {}, 1, MODALITIES[:value]) for name in ("mage-paper", "mage")]
        else:
            found += [Case(axis, value, name, {"rank": value}) for name in ("lora", "mage-paper", "mage")]
    return found


def cut(parts: int) -> Generator:
    """Classification of next-real's things, a part of them in each task."""

    def made(task: str, split: str, seed: int) -> Iterator[Example]:
        rng, names = Random(f"{task}/{parts}/{split}/{seed}"), material.things()[int(task.split("-")[1]) :: parts]
        source = examples.Source(rng, rng, split, names, False)
        return (one for one in iter(lambda: examples.classification(source), None) if split_of(one.content) == split)

    names = tuple(f"part-{part:02d}" for part in range(parts))
    return dataclasses.replace(
        examples.GENERATOR, name=f"next-real-{parts}", tasks=names, held_out=(), splits=("test",), examples=made
    )


def tasks_of(parts: int, modalities: tuple[str, ...]) -> list[Task]:
    """The tasks of `cut`."""
    of = SUITE.task("ImageNet")
    return [
        dataclasses.replace(
            of,
            name=name,
            reads=modalities,
            train=of.train.replace("ImageNet", name),
            test=of.test.replace("ImageNet", name),
            train_images=f"{name}/images",
            test_images=f"{name}/images",
        )
        for name in cut(parts).tasks
    ]


class Learner:
    """A method that has learnt all tasks but the last, and is within that."""

    def __init__(self, case: Case, backbone: SmallBackbone, data: Path, rounds: int) -> None:
        self.case, self.backbone = case, copy.deepcopy(backbone)
        self.method = methods.load(case.method)(**case.hyperparameters)
        tasks = tasks_of(case.tasks, case.modalities)
        files = tasks_of(case.tasks, MODALITIES[:2])
        train = {task.name: formats.read_samples(task, data, "train") for task in files}
        self.questions: list[Sample] = formats.read_samples(files[-1], data, "test")[:QUESTIONS]
        generator = torch.Generator().manual_seed(stable_seed(0, "adapters"))
        self.method.setup(self.backbone, tasks, generator, case.modalities)
        self.tasks, self.task = tasks, tasks[-1]
        recipe = dataclasses.replace(RECIPE, warmup_steps=0)
        for number, task in enumerate(tasks, 1):
            parameters, last = self.method.trainable(task), task is self.task
            seen = [one.name for one in tasks[:number]]
            # Of the last: a first round that is not timed, those that are, and one that counts bytes.
            steps = STEPS + rounds + 2 if last else STEPS
            self.trainer = TaskTrainer(
                self.backbone, self.method, parameters, train[task.name], recipe, steps, (0, task.name)
            )
            memory = rehearsal_memory(train, seen, self.method.card.rehearsal, 0)
            self.method.before_task(parameters, steps, memory)
            for _ in range(STEPS):
                self.step()
            if not last:
                self.trainer.finish()

    def step(self) -> None:
        self.backbone.train()
        self.trainer.train_step()

    def answer(self) -> None:
        self.backbone.eval()
        with torch.no_grad(), self.method.for_eval():
            answer(self.method, self.task, self.questions)

    def saved_and_peak_bytes(self) -> tuple[int, int | None]:
        """Of a step: of the distinct storages saved for its backward pass, without parameters; allocated on a GPU."""
        owned = [*self.backbone.parameters(), *self.backbone.buffers()]
        known, found = {tensor.untyped_storage().data_ptr() for tensor in owned}, dict[int, Tensor]()

        def note(tensor: Tensor) -> Tensor:
            # Held until the end, so that no other takes the place of one that has been freed.
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        if GPU:
            torch.cuda.reset_peak_memory_stats()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.step()
        peak = torch.cuda.max_memory_allocated() if GPU else None
        return sum(one.untyped_storage().nbytes() for at, one in found.items() if at not in known), peak

    def end(self) -> dict[str, Any]:
        """Ends the last task. Returns what does not come from the rounds."""
        saved, peak = self.saved_and_peak_bytes()
        start = time.perf_counter()
        self.trainer.finish()
        finish()
        seconds = time.perf_counter() - start
        kept = [*self.method.adapter_parameters().values(), *self.method.state_dict().values()]
        branches: Any = self.method
        return {
            "axis": self.case.axis,
            "value": self.case.value,
            "method": self.case.method,
            "branches": len(branches.branches(self.tasks)),
            "trained": sum(parameter.numel() for parameter in self.trainer.own.values()),
            "kept_bytes": sum(tensor.numel() * tensor.element_size() for tensor in kept),
            "saved_bytes": saved,
            "peak_bytes": peak,
            "end_s": round(seconds, 3),
        }


def in_turn(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of every call in every round, of which the first is left out."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            finish()
            start = time.perf_counter()
            call()
            finish()
            if number:
                times.append(time.perf_counter() - start)
    return seconds


def typical(values: Sequence[float]) -> float:
    """The mean of the medians of the first and the second half."""
    middle = max(len(values) // 2, 1)
    return statistics.fmean(statistics.median(part) for part in (values[:middle], values[middle:]) if part)


def measure(axis: str, values: Sequence[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of an axis. folder: for data."""
    backbone, rows = SmallBackbone.load().to(DEVICE), []
    of = cases(axis, values)
    for parts in {case.tasks for case in of}:
        cut(parts).write(folder / str(parts), SAMPLES, QUESTIONS)
    learners = []
    for case in of:
        print(f"{axis} {case.value}: {case.method}", flush=True)
        learners.append(Learner(case, backbone, folder / str(case.tasks), rounds))
    steps = in_turn([learner.step for learner in learners], rounds)
    with patch.object(tiny_model, "KEPT_BYTES", 0):
        answers = in_turn([learner.answer for learner in learners], max(rounds // 3, 1))
    for learner, step, answered in list(zip(learners, steps, answers, strict=True))[1:]:
        times = {
            "step_ms": round(1e3 * typical(step), 2),
            "over_lora": round(typical([a / b for a, b in zip(step, steps[0], strict=True)]), 3),
            "answer_ms": round(1e3 * statistics.median(answered) / QUESTIONS, 2),
        }
        rows.append(learner.end() | times)
    return rows


def draw(file: Path, figure: Path) -> None:
    """Time of a step over lora's, and bytes kept, by modalities, tasks and rank."""
    import matplotlib
    from matplotlib.figure import Figure

    from cnext.report import plots

    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    labels = {"modalities": "branches, of 1, 2 and 3 modalities", "tasks": "tasks", "rank": "rank of a branch"}
    with matplotlib.rc_context(plots.STYLE | plots.FOR_FILES):
        made = Figure((9, 4.6), layout="constrained")
        panels = made.subplots(2, 3)
        for column, axis in enumerate(labels):
            for line, (field, unit, title) in enumerate(
                (("over_lora", 1.0, "step time over lora's"), ("kept_bytes", 1e6, "MB kept between tasks"))
            ):
                axes = panels[line][column]
                for name in dict.fromkeys(row["method"] for row in rows):
                    own = [row for row in rows if (row["axis"], row["method"]) == (axis, name)]
                    at = [row["branches" if axis == "modalities" else "value"] for row in own]
                    color = plots.task_colour([*METHODS].index(name))
                    axes.plot(at, [row[field] / unit for row in own], "o-", ms=3, lw=1.2, color=color, label=name)
                axes.set_xticks(sorted({tick for drawn in axes.lines for tick in drawn.get_xdata()}))
                axes.set_title(title if not column else "", loc="left", size=8.5, weight="bold")
                axes.set_xlabel(labels[axis] if line else "")
                axes.set_ylim(bottom=0)
                axes.grid(axis="y", color=plots.FAINT, lw=0.5)
        made.legend(*panels[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
        made.savefig(figure, metadata=plots.FILES["svg"])
    print(f"written: {figure}")


def table(rows: Sequence[Mapping[str, Any]], axis: str) -> list[str]:
    """Lines of a Markdown table of an axis: step time over lora's / MB kept / ms of an answer, by method and value."""
    own = [row for row in rows if row["axis"] == axis]
    values = list(dict.fromkeys(row["value"] for row in own))
    cells = {}
    for row in own:
        shown = f"{row['over_lora']:.2f} / {row['kept_bytes'] / 1e6:.2f} / {row['answer_ms']:.1f}"
        cells[row["method"], row["value"]] = shown
    names = dict.fromkeys(row["method"] for row in own)
    return [
        f"| {axis} | {' | '.join(map(str, values))} |",
        f"|---{'|---' * len(values)}|",
        *(f"| `{name}` | {' | '.join(cells[name, value] for value in values)} |" for name in names),
    ]


AXES = {"modalities": (1, 2, 3), "tasks": (6, 12, 24), "rank": (4, 8, 16, 32, 64)}
MOST = {"modalities": len(MODALITIES), "tasks": len(material.things()), "rank": SIZES.hidden}
"""The largest value of an axis: names of modalities, classes, and the width of the backbone."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=tuple(AXES), default=tuple(AXES), help="default: all")
    for axis, values in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", type=int, default=values, metavar="N", help=f"default: {values}")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the file (default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw docs/costs.svg from the CPU's file")
    given = parser.parse_args(arguments)
    if given.draw:
        draw(given.out / "cpu.json", FIGURE)
        return
    for axis, most in MOST.items():
        if wrong := [value for value in getattr(given, axis) if not 1 <= value <= most]:
            parser.error(f"--{axis}: expected numbers from 1 to {most}, got {', '.join(map(str, wrong))}")
    if given.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {given.rounds}")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for axis in given.axes:
            rows += measure(axis, getattr(given, axis), given.rounds, Path(folder))
    found = {"environment": fingerprint.present(DEVICE, 1), "rounds": given.rounds, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{DEVICE}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(line for axis in given.axes for line in (*table(rows, axis), "")))
    print(f"written: {file}")


if __name__ == "__main__":
    main()
