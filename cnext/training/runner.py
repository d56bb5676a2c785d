"""The runner: learns a suite's tasks one after another, evaluates after each, and goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from cnext import report
from cnext.config.run_config import Plan, RunConfig, plan
from cnext.distributed import collectives, processes
from cnext.monitoring.progress import Progress
from cnext.monitoring.resource_errors import explained
from cnext.monitoring.signals import Stop
from cnext.runs import command_line, environment, fingerprint, state_digests
from cnext.runs.checkpoint import write_json
from cnext.runs.run_folder import RunFolder
from cnext.runs.tensorboard import EventLog
from cnext.scoring import make_scorers
from cnext.tasks.base import Sample, Task, joined
from cnext.training import cost
from cnext.training.batches import stable_seed
from cnext.training.evaluation import evaluate
from cnext.training.precision import autocast
from cnext.training.results import results
from cnext.training.setup import prepare
from cnext.training.trainer import TaskTrainer, begin

ZERO_SHOT = "zero-shot"


def run(config: RunConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Runs a configuration: trains on its tasks in order, evaluates after each, and writes results and report.

    Resumes where an earlier process stopped. On a CPU the results are the same bits, with or without interruption, for
    the same number of threads. Under torchrun every process calls it, and the first one writes.

    Args:
        config: what to run; its ``folder`` receives all files.
        progress: where progress is shown; None for the terminal.

    Returns:
        The content of results.json: score matrix in percent, metrics of both scoring profiles, averaging statistics.

    Raises:
        UserError: a mistake that the user can fix, before training starts where possible.
        Stopped: by SIGTERM or the interrupt key; all finished work is saved.

    Example:
        >>> from cnext import RunConfig, run
        >>> results = run(RunConfig(method="mage", budget="smoke", seed=1))  # doctest: +SKIP
        >>> results["metrics"]["forgetting"]  # doctest: +SKIP
    """
    planned = plan(config)
    torch.set_num_threads(config.threads)
    with processes.joined(planned.device) as device, Stop() as stop:
        mine = dataclasses.replace(planned, device=device)
        processes.check(planned.recipes)
        if collectives.rank():
            with Progress(quiet=True) as hidden:
                return Runner(mine, None, hidden, stop).run()
        with (
            progress or Progress() as shown,
            closing(RunFolder(planned.config.folder, planned.as_dict())) as folder,
            shown.kept_in(folder.path),
            explained(folder.path, lambda: shown.doing, planned.recipe.batch_size),
        ):
            command_line.write(planned.config)
            shown.say(f"run folder: {folder.path}")
            return Runner(mine, folder, shown, stop).run()


class Runner:
    """One run. ``stage`` counts the tasks learnt: 0 is the pretrained model, t the model after the t-th task.

    Joint training has the one stage at which all are learnt. Of several processes the first has the run's folder, and
    tells the others what is in it.
    """

    def __init__(self, planned: Plan, folder: RunFolder | None, progress: Progress, stop: Stop) -> None:
        self.plan, self.config, self.folder, self.progress = planned, planned.config, folder, progress
        self.stop = stop
        self.tasks = [planned.suite.task(name) for name in planned.order]
        self.ready = prepare(planned)
        self.samples, self.backbone = self.ready.samples, self.ready.backbone
        self.method, self.extras = self.ready.method, self.ready.extras
        self.held = self.method.held() | self.extras
        self.unevenly = processes.sharded(self.backbone.language_model, self.held.values())
        self.stages = self._stages()
        self.scorers = make_scorers(planned.suite.clip, planned.device)
        self.tasks_done, self.step, self.tensors = 0, 0, {}
        self.ledger: dict[str, Any] = {
            "trained": {},
            "averaging": [],
            "measured": {},
            "stored_by_stage": {},
            "digests": [],
        }
        """What is known of the stages so far: parameters and tokens (exact), statistics, times (measured), and a
        checksum of what each has learnt."""

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
        self.meter = cost.Meter(self.plan.device)
        self._restore()
        self.scores = collectives.broadcast_object(self.folder and self.folder.scores(self.tasks_done)) or {}
        if self.folder is not None and self.config.log == "tensorboard":
            self.folder.mirror(EventLog(self.folder.path / "tensorboard", self._ends()))
        self._note_environment()
        self.progress.plan(self.plan, self.tasks_done, self.step)
        self._evaluate(self.tasks_done)
        for stage in [number for number in self.stages if number > self.tasks_done]:
            with self.stop.held():
                self._train(stage)
            self._evaluate(stage)
            self._write(started)
        outcome = self._write(started)
        if self.folder is None:
            return outcome
        self.folder.tidy([f"{stage}_{task.name}" for stage, (task, _) in self.stages.items()])
        html, _ = report.write_report(self.folder.path)
        self.progress.finished(outcome, html)
        return outcome

    def _restore(self) -> None:
        furthest = collectives.broadcast_object(self.folder and self.folder.furthest(self.progress.say))
        if furthest is None:
            self._cut_steps(0, 0)
            self._digest(0, ZERO_SHOT, self.method.state_dict())
            return
        latest, self.tensors, values = furthest
        self.tasks_done, self.step, self.ledger = values["tasks_done"], values["step"], values["ledger"]
        with torch.no_grad():
            for name, parameter in self.held.items():
                parameter.copy_(self.tensors["adapters"][name])
        if not self.step:
            self.method.load_state_dict(self.tensors["method"])
        under_way = next((stage for stage in self.stages if stage > self.tasks_done), self.tasks_done)
        self._cut_steps(under_way if self.step else self.tasks_done, self.step or sys.maxsize)
        self.progress.say(f"going on from {latest.name}")

    def _ends(self) -> dict[int, int]:
        """Optimizer steps done by the end of each stage."""
        ends = {0: 0}
        for stage, (task, names) in self.stages.items():
            steps = self.plan.recipe.of(task.name).steps
            ends[stage] = max(ends.values()) + sum(steps[name] for name in names)
        return ends

    def _cut_steps(self, stage: int, step: int) -> None:
        if self.folder is not None:
            self.folder.cut_steps(stage, step)

    def _note_environment(self) -> None:
        """Adds this environment to those that the run's results are from, where there is anything left to do."""
        there = self.folder and fingerprint.of_processes(self.folder.path / "environment.json")
        self.fingerprints = collectives.broadcast_object(there) or []
        here = fingerprint.present(self.plan.device, self.config.threads)
        if here in self.fingerprints or all((len(self.tasks), task.name) in self.scores for task in self.tasks):
            return
        for line in fingerprint.differences(self.fingerprints[-1], here) if self.fingerprints else ():
            self.progress.say(f"going on in another environment, which its results will say: {line}")
        self.fingerprints.append(here)
        self._describe()

    def _describe(self) -> None:
        if self.folder is None:
            return
        described = environment.describe() | {"fingerprints": self.fingerprints}
        write_json(self.folder.path / "environment.json", described)

    def _digest(self, stage: int, trained: str, state: dict[str, Tensor]) -> None:
        self.ledger["digests"].append(state_digests.row(stage, trained, {"adapters": self.held, "method": state}))

    def _train(self, stage: int) -> None:
        task, names = self.stages[stage]
        recipe = self.plan.recipe.of(task.name)
        steps = sum(recipe.steps[name] for name in names)
        parameters = self.method.trainable(task)
        rows, statistics = [], None
        learnt = [*parameters.values(), *self.extras.values()] if parameters else []
        trained = {"parameters": sum(p.numel() for p in learnt), "steps": 0, "tokens": 0}
        if parameters:
            samples = [sample for name in names for sample in self.samples["train"][name]]
            trainer = begin(self.plan, self.ready, task, parameters, samples, steps, self._memory(stage))
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
                due = self._told_to_stop() or trainer.step % self.config.block_steps == 0
                if due and trainer.step < steps:
                    self._measure(task.name, "train")
                    self.ledger["trained"][task.name] = trained
                    self._save(rows, f"{stage}_{task.name}_step{trainer.step}", self.tasks_done, trainer)
                    # Asked again: one that hears of it while the first process writes must not leave the others.
                    if self._told_to_stop():
                        self.stop.check(f"saved after step {trainer.step} of {steps} of {task.name}")
            self.backbone.eval()
            with autocast(recipe.precision, self.backbone.device):
                statistics = self.method.after_task()
        self._measure(task.name, "train")
        self.ledger["trained"][task.name] = trained
        self.ledger["averaging"].append(statistics and {"task": task.name, "branches": statistics})
        self._save(rows, f"{stage}_{task.name}", stage, None)
        self.tasks_done = stage
        self.step, self.tensors = 0, {}

    def _told_to_stop(self) -> bool:
        """Whether a signal has come, to this process or to another: all stop at the same step."""
        (heard,) = collectives.all_reduce(float(self.stop.requested is not None), device=self.backbone.device)
        if heard and self.stop.requested is None:
            self.stop.requested = signal.SIGTERM
        return bool(heard)

    def _measure(self, name: str, kind: str) -> None:
        """Books what the time since the last such call has cost."""
        measured = self.ledger["measured"]
        lap = cost.together(collectives.gather_shards([self.meter.lap()]))
        measured[name] = cost.added(measured.get(name, {}), kind, lap)

    def _save(self, rows: list[dict[str, Any]], label: str, tasks_done: int, trainer: TaskTrainer | None) -> None:
        """Logs the steps since the last checkpoint, then writes the next one."""
        if self.folder is not None:
            self.folder.log_steps(rows)
        rows.clear()
        state = self.method.state_dict()
        tensors = {"adapters": self.held, "method": state, "optimizer": trainer.state_dict() if trainer else {}}
        if trainer is None:
            self._digest(tasks_done, self.stages[tasks_done][0].name, state)
        stored = sum(t.numel() * t.element_size() for kept in (self.held, state) for t in kept.values())
        self.ledger["stored_bytes"] = stored
        if trainer is None:
            self.ledger["stored_by_stage"][self.stages[tasks_done][0].name] = stored
        values = {"tasks_done": tasks_done, "step": trainer.step if trainer else 0, "ledger": self.ledger}
        if self.folder is not None:
            self.folder.save(tensors, values, label)

    def _evaluate(self, stage: int) -> None:
        """Evaluates after a stage on every task seen (all of them before the first), as far as not done already."""
        if self.step:
            return
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
                folder = self.folder and self.folder.path
                label = f"{stage}_{trained}"
                row = evaluate(self.method, task, samples, self.scorers[task.scorer], folder, label, self.unevenly)
            self._log_score({"stage": stage, "trained": trained, "task": task.name, "scorer": task.scorer, **row})
        self._measure(trained, "evaluate")
        self.progress.stage(
            stage, trained, [self.scores[stage, t.name] for t in self.tasks if (stage, t.name) in self.scores]
        )

    def _log_score(self, row: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log_score(row)
        self.scores[row["stage"], row["task"]] = row

    def _write(self, started: float) -> dict[str, Any]:
        joined = fingerprint.joined(self.fingerprints)
        outcome = results(self.plan, self.method, self.scores, self.ledger, joined)
        if self.folder is not None:
            write_json(self.folder.path / "results.json", outcome)
            write_json(
                self.folder.path / "cost.json", cost.summary(self.ledger, self.meter, time.perf_counter() - started)
            )
            self._describe()
        return outcome
