"""The runner: learns a suite's tasks one after another, evaluates after each, and goes on where it was interrupted."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnext import backbones, methods
from cnext.backbones.base import Backbone
from cnext.running import environment, report
from cnext.running.batches import stable_seed
from cnext.running.checkpoint import load, write_json
from cnext.running.config import Plan, RunConfig, cache, plan
from cnext.running.evaluation import evaluate
from cnext.running.folder import RunFolder
from cnext.running.precision import DTYPES, autocast, in_float32
from cnext.running.progress import Progress
from cnext.running.results import results
from cnext.running.training import TaskTrainer
from cnext.scoring import make_scorers
from cnext.scoring.clip import load_clip
from cnext.tasks import formats, synthetic
from cnext.tasks.base import DataError, Sample, Task, joined

ZERO_SHOT = "zero-shot"


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Runs a configuration to its end, or goes on with it where an earlier process stopped. Returns its results.

    Raises: UserError for anything that the user has to mend, before training starts wherever that is possible.
    """
    planned = plan(config)
    torch.set_num_threads(config.threads)
    with progress or Progress() as shown, closing(RunFolder(config.folder, planned.as_dict())) as folder:
        shown.say(f"run folder: {folder.path}")
        return Runner(planned, folder, shown).run()


def data_folder(planned: Plan) -> Path:
    """The folder with the suite's files; a synthetic suite is drawn into the cache first."""
    recipe = planned.recipe
    if planned.config.data is not None:
        return planned.config.data
    name = f"{planned.suite.name}-v{synthetic.FORMAT_VERSION}-{recipe.train_samples}-{recipe.test_samples}"
    return synthetic.GENERATORS[planned.suite.synthetic](cache() / name, recipe.train_samples, recipe.test_samples)


def read_suite(planned: Plan, data: Path) -> dict[str, dict[str, list[Sample]]]:
    """Every sample that the run will use: split ("train" and the one evaluated) to task name to samples.

    Raises: DataError with every unusable row of every file.
    """
    limits = {"train": planned.recipe.train_samples, planned.config.split: planned.recipe.test_samples}
    samples: dict[str, dict[str, list[Sample]]] = {split: {} for split in limits}
    problems = []
    for name in planned.order:
        for split, limit in limits.items():
            try:
                samples[split][name] = formats.read(planned.suite.task(name), data, split, limit)
            except DataError as error:
                problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return samples


def load_backbone(planned: Plan) -> Backbone:
    """The plan's backbone on its device, at its precision."""
    config, recipe = planned.config, planned.recipe
    return backbones.load(config.backbone).load(
        planned.device,
        config.weights,
        dtype=DTYPES[recipe.precision],
        device_map=config.device_map,
        checkpointing=recipe.checkpointing,
    )


def extras(backbone: Backbone, trainable: str) -> dict[str, nn.Parameter]:
    """What learns beside the method's own parameters, in float32, by name. trainable: as in `Recipe`."""
    found = {} if trainable == "branches" else backbone.connections()
    if trainable == "released":
        found |= backbone.released_extras()
    return in_float32({f"backbone.{name}": parameter for name, parameter in found.items()})


class Runner:
    """One run. ``stage`` counts the tasks learnt: 0 is the pretrained model, t the model after the t-th task.

    Joint training has the one stage at which all are learnt.
    """

    def __init__(self, planned: Plan, folder: RunFolder, progress: Progress) -> None:
        self.plan, self.config, self.folder, self.progress = planned, planned.config, folder, progress
        self.tasks = [planned.suite.task(name) for name in planned.order]
        self.samples = read_suite(planned, data_folder(planned))
        self.backbone = load_backbone(planned)
        self.method = methods.load(self.config.method)(**planned.hyperparameters)
        generator = torch.Generator().manual_seed(stable_seed(self.config.seed, "adapters"))
        self.method.setup(self.backbone, self.tasks, generator)
        self.extras = extras(self.backbone, planned.recipe.trainable)
        self.held = self.method.held() | self.extras
        self.stages = self._stages()
        self.scorers = make_scorers(planned.suite.clip, planned.device)
        if any("image" in task.writes for task in self.tasks):
            # Now, and not when the first picture is scored: a CLIP that is not there stops the run before it starts.
            load_clip(planned.suite.clip, planned.device)
        self.tasks_done, self.step, self.tensors = 0, 0, {}
        self.ledger: dict[str, Any] = {"trained": {}, "averaging": [], "measured": {}}
        """What is known of the stages so far: parameters and tokens (exact), statistics, and times (measured)."""

    def _stages(self) -> dict[int, tuple[Task, list[str]]]:
        """What each stage learns: as the method sees it, and the names of the tasks whose samples it trains on."""
        if self.method.joint:
            return {len(self.tasks): (joined(self.tasks), list(self.plan.order))}
        return {stage: (task, [task.name]) for stage, task in enumerate(self.tasks, 1)}

    def _memory(self, stage: int) -> dict[str, list[Sample]]:
        """The samples kept of every task up to this stage's, as many as the method's card asks for: drawn by seed."""
        kept = {}
        for task in self.tasks[:stage] if self.method.card.rehearsal else []:
            samples = self.samples["train"][task.name]
            generator = torch.Generator().manual_seed(stable_seed(self.config.seed, task.name, "memory"))
            drawn = torch.randperm(len(samples), generator=generator)[: self.method.card.rehearsal]
            kept[task.name] = [samples[index] for index in drawn.tolist()]
        return kept

    def run(self) -> dict[str, Any]:
        started = time.perf_counter()
        self._restore()
        self.scores = self.folder.scores()
        self.progress.plan(self.plan, self.tasks_done, self.step)
        self._evaluate(self.tasks_done)
        for stage in [number for number in self.stages if number > self.tasks_done]:
            self._train(stage)
            self._evaluate(stage)
            self._write(started)
        outcome = self._write(started)
        html, _ = report.write_report(self.folder.path)
        self.progress.finished(outcome, html)
        return outcome

    def _restore(self) -> None:
        latest = self.folder.latest()
        if latest is None:
            self.folder.cut_steps(0, 0)
            return
        self.tensors, values = load(latest)
        self.tasks_done, self.step, self.ledger = values["tasks_done"], values["step"], values["ledger"]
        with torch.no_grad():
            for name, parameter in self.held.items():
                parameter.copy_(self.tensors["adapters"][name])
        if not self.step:
            self.method.load_state_dict(self.tensors["method"])
        under_way = next((stage for stage in self.stages if stage > self.tasks_done), self.tasks_done)
        self.folder.cut_steps(under_way if self.step else self.tasks_done, self.step or sys.maxsize)
        self.progress.say(f"going on from {latest.name}")

    def _train(self, stage: int) -> None:
        task, names = self.stages[stage]
        recipe = self.plan.recipe.of(task.name)
        steps = sum(recipe.steps[name] for name in names)
        parameters = self.method.trainable(task)
        started, rows, statistics = time.perf_counter(), [], None
        extras = self.extras if parameters else {}
        learnt = [*parameters.values(), *extras.values()]
        trained = {"parameters": sum(p.numel() for p in learnt), "steps": 0, "tokens": 0}
        if parameters:
            for parameter in extras.values():
                parameter.requires_grad_(True)
            seed = (self.config.seed, task.name)
            samples = [sample for name in names for sample in self.samples["train"][name]]
            trainer = TaskTrainer(
                self.backbone, self.method, parameters, samples, recipe, steps, seed, extras, self.config.workers
            )
            self.method.before_task(parameters, steps, self._memory(stage))
            if self.step:
                trained = self.ledger["trained"][task.name]
                trainer.load_state_dict(self.tensors["optimizer"], self.step)
                self.method.load_state_dict(self.tensors["method"])
            self.backbone.train()
            while trainer.step < steps:
                row = trainer.train_step()
                trained["steps"] += 1
                trained["tokens"] += row["tokens"]
                rows.append({"stage": stage, "task": task.name, **row})
                self.progress.step(stage, task.name, row, steps)
                if trainer.step % self.config.block_steps == 0 and trainer.step < steps:
                    self._measure(task.name, train_seconds=time.perf_counter() - started)
                    started = time.perf_counter()
                    self.ledger["trained"][task.name] = trained
                    self._save(rows, f"{stage}_{task.name}_step{trainer.step}", self.tasks_done, trainer)
            self.backbone.eval()
            statistics = self.method.after_task()
        self._measure(task.name, train_seconds=time.perf_counter() - started)
        self.ledger["trained"][task.name] = trained
        self.ledger["averaging"].append(statistics and {"task": task.name, "branches": statistics})
        self._save(rows, f"{stage}_{task.name}", stage, None)
        self.tasks_done = stage
        self.step, self.tensors = 0, {}

    def _measure(self, name: str, **seconds: float) -> None:
        row = self.ledger["measured"].setdefault(name, {"train_seconds": 0.0, "evaluate_seconds": 0.0})
        for key, value in seconds.items():
            row[key] += value

    def _save(self, rows: list[dict[str, Any]], label: str, tasks_done: int, trainer: TaskTrainer | None) -> None:
        """Logs the steps since the last checkpoint, then writes the next one."""
        self.folder.log_steps(rows)
        rows.clear()
        state = self.method.state_dict()
        tensors = {"adapters": self.held, "method": state, "optimizer": trainer.state_dict() if trainer else {}}
        stored = sum(t.numel() * t.element_size() for kept in (self.held, state) for t in kept.values())
        self.ledger["stored_bytes"] = stored
        values = {"tasks_done": tasks_done, "step": trainer.step if trainer else 0, "ledger": self.ledger}
        self.folder.save(tensors, values, label)

    def _evaluate(self, stage: int) -> None:
        """Evaluates after a stage on every task seen (all of them before the first), as far as not done already."""
        if self.step:
            return
        started = time.perf_counter()
        trained = self.stages[stage][0].name if stage else ZERO_SHOT
        for task in self.tasks[:stage] if stage else self.tasks:
            if (stage, task.name) in self.scores:
                continue
            if stage and not any(row["parameters"] for row in self.ledger["trained"].values()):
                self._log_score({**self.scores[0, task.name], "stage": stage, "trained": trained})
                continue
            samples = self.samples[self.config.split][task.name]
            shown = self.progress.evaluating(stage, trained, task.name, len(samples))
            precision = autocast(self.plan.recipe.precision, self.backbone.device)
            with shown, precision, self.method.for_eval():
                row = evaluate(
                    self.method, task, samples, self.scorers[task.scorer], self.folder.path, f"{stage}_{trained}"
                )
            self._log_score({"stage": stage, "trained": trained, "task": task.name, "scorer": task.scorer, **row})
        self._measure(trained, evaluate_seconds=time.perf_counter() - started)
        self.progress.stage(
            stage, trained, [self.scores[stage, t.name] for t in self.tasks if (stage, t.name) in self.scores]
        )

    def _log_score(self, row: dict[str, Any]) -> None:
        self.folder.log_score(row)
        self.scores[row["stage"], row["task"]] = row

    def _write(self, started: float) -> dict[str, Any]:
        outcome = results(self.plan, self.method, self.scores, self.ledger)
        write_json(self.folder.path / "results.json", outcome)
        write_json(self.folder.path / "cost.json", self._cost(time.perf_counter() - started))
        write_json(self.folder.path / "environment.json", environment.describe())
        return outcome

    def _cost(self, seconds: float) -> dict[str, Any]:
        """What was measured. Times of an interrupted run are those of its saved steps."""
        stages = []
        for name, measured in self.ledger["measured"].items():
            trained = self.ledger["trained"].get(name, {"steps": 0, "tokens": 0})
            busy = measured["train_seconds"]
            stages.append(
                {
                    "task": name,
                    **measured,
                    "steps": trained["steps"],
                    "tokens": trained["tokens"],
                    "tokens_per_second": trained["tokens"] / busy if busy else None,
                    "seconds_per_step": busy / trained["steps"] if trained["steps"] else None,
                }
            )
        # Linux counts in KiB, macOS in bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        device = torch.cuda.max_memory_allocated() if self.plan.device.startswith("cuda") else None
        return {
            "stages": stages,
            "last_process_seconds": seconds,
            "total_seconds": sum(row["train_seconds"] + row["evaluate_seconds"] for row in stages),
            "peak_memory_bytes": resident,
            "peak_device_memory_bytes": device,
        }
