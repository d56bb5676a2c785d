"""Run a method over the tasks of a suite: train each task, evaluate after each, save checkpoints, and resume."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cnext import report
from cnext.config.plan import DATA_KEY, Plan, plan
from cnext.config.run_config import RunConfig
from cnext.distributed import collectives, processes
from cnext.monitoring.progress import Progress
from cnext.monitoring.resource_errors import as_user_errors
from cnext.monitoring.signals import Stop
from cnext.results import RunResult
from cnext.runs import checkpoint_fit, command_line, data_file, environment, fingerprint, trackers
from cnext.runs.run_folder import ENVIRONMENT, RESULTS, RunFolder
from cnext.runs.schemas import SEPARABILITY, StageScore, TrainStep
from cnext.runs.state_digests import StateDigest, digest
from cnext.scoring.base import find_scorer, make_scorers
from cnext.tasks import data_digest
from cnext.tasks.base import Task
from cnext.training import cost, results
from cnext.training.evaluation import evaluate
from cnext.training.precision import autocast
from cnext.training.separability import separability
from cnext.training.setup import prepare, reference_warnings
from cnext.training.stages import Stage, rehearsal_memory, stages
from cnext.training.state import RunState, Trained
from cnext.training.trainer import TaskTrainer, begin

ZERO_SHOT = "zero-shot"


def run(config: RunConfig, progress: Progress | None = None) -> RunResult:
    """Runs a configuration, or resumes it from its last checkpoint. A finished run is not run again.

    The run folder, ``config.folder``, gets config.json, options.json, run.yaml, results.json, cost.json,
    environment.json, data.json (digests of its rows), left_out.json (where rows of the data are left out),
    separability.json, scores.jsonl, train.jsonl, predictions/, extra_scores.jsonl and extra/ (scores and answers that
    are in no score matrix), checkpoints/ and report.html. A launcher's environment (torchrun, ``accelerate launch``)
    makes it one run in several processes.

    Args:
        config: what to run.
        progress: shows how far the run is; by default bars on standard error, and results on standard output; in a
            notebook a bar in place.

    Returns:
        The result, which print, rich and notebooks show as a table. It is also a mapping with the content of
        results.json. Scores are in percent, T is the number of tasks:

        - ``score_matrix``: T rows, one per stage, of T scores, one per task; None where not evaluated. ``zero_shot``:
          the T scores before training, None where nothing is trained. ``error_matrix``: as score_matrix, by type.
        - ``before_learnt``: each task's score right before its own stage, None for the first and where not measured.
        - ``held_out``: scores on the suite's held-out sets, see `cnext.runs.schemas.HeldOut`; absent where it has none.
        - ``metrics``: ``avg_acc``, ``new_acc``, ``forgetting`` and others, see `cnext.scoring.matrix.metrics`.
        - ``profiles``: the same four under the paper's own scorers.
        - ``tasks``, ``reads``, ``writes``, ``samples``: names in training order; modalities and test samples by name.
        - ``averaging``: statistics of the moving average by task and branch.
        - ``init``: what the run started from, with ``init_from`` alone: name, kind, SHA-256, tasks learnt, and notes.
        - ``cost``: counts of parameters, optimizer steps, supervised tokens, and stored bytes.
        - ``data``: SHA-256 and number of rows by task and split.
        - ``digests``: SHA-256 of the state after each stage. ``fingerprint``, ``versions``: the environment.
        - ``method``, ``hyperparameters``, ``backbone``, ``suite``, ``budget``, ``order``, ``seed``, ``split``,
          ``joint``, ``card``, ``finished``, ``profile``.

    Raises:
        UserError: the configuration, data, weights or the run folder are not usable (before training starts wherever
            that is possible), the loss is not finite, or memory or disk are full.
        Stopped: SIGTERM or the interrupt key came; everything up to the last step is saved.

    Example::

        from cnext import RunConfig, run

        result = run(RunConfig(method="lora", preset="smoke", out="runs"))
        print(result)
        result.metrics["forgetting"]
    """
    with processes.refusals():
        planned = plan(config)
    torch.set_num_threads(config.threads)
    with processes.process_group(planned.device, planned.settings()) as device, Stop() as stop:
        local = dataclasses.replace(planned, device=device)
        processes.check(planned.recipes)
        opened = processes.first_alone(lambda: RunFolder(planned.config.folder, planned.as_dict()))
        if opened is None:
            with Progress(quiet=True) as hidden:
                return RunResult(planned.config.folder, Runner(local, None, hidden, stop).run())
        with (
            progress or Progress() as shown,
            closing(opened) as folder,
            shown.kept_in(folder.path),
            as_user_errors(folder.path, lambda: shown.doing, planned.recipe.batch_size),
        ):
            command_line.write(planned.config, folder.run)
            command_line.write_yaml([planned], folder.path / command_line.YAML)
            shown.say(f"run folder: {folder.path}")
            return RunResult(folder.path, Runner(local, folder, shown, stop).run())


class Runner:
    """One run on one rank. The constructor neither reads data nor loads a model.

    Stage 0 is the pretrained model, stage t the model after the t-th task; see `Stage`.

    Args:
        folder: the run folder on rank 0, which writes all files; None on other ranks.
        stop: checked between two optimizer steps.
    """

    def __init__(self, planned: Plan, folder: RunFolder | None, progress: Progress, stop: Stop) -> None:
        self.plan, self.folder, self.progress, self.stop = planned, folder, progress, stop
        self.tasks = [planned.suite.task(name) for name in planned.order]
        self.stages = stages(planned)
        self.state = RunState()
        self._restored: dict[str, dict[str, Tensor]] = {}
        """Tensors of the checkpoint that the run resumes from, until the stage under way is done."""
        self._resumed = Path()
        """This checkpoint."""
        self._has_extra = True
        """Whether all stages have the scores that are in no score matrix; not in a run of an earlier version."""
        self._unlogged: list[TrainStep] = []
        """Steps since the last checkpoint."""

    def run(self) -> dict[str, Any]:
        """Trains and evaluates all stages that are left. Returns the results."""
        self.load()
        self.started = time.perf_counter()
        self.meter = cost.Meter(self.plan.device)
        self.resume()
        self._note_environment()
        self.progress.plan(self.plan, self.state.tasks_done, self.state.step)
        if self.plan.trains or self.state.tasks_done:
            self.evaluate_stage(self.state.tasks_done)
        self.separate_tasks()
        self.start_from_source()
        for stage in [stage for stage in self.stages if stage.number > self.state.tasks_done]:
            with self.stop.deferred():
                self.train_task(stage)
            self.evaluate_stage(stage.number)
            self._write_results()
        outcome = self._write_results()
        if self.folder is not None:
            self.folder.tidy([stage.label for stage in self.stages])
            html, _ = report.write_report(self.folder.path)
            self.progress.finished(outcome["metrics"], html)
            self.folder.conclude(outcome)
        return outcome

    def load(self) -> None:
        """Reads the data and loads backbone, method and scorers."""
        with processes.agreed():
            self.ready = prepare(self.plan)
            self.data = data_digest.of_samples(self.ready.samples)
        processes.compare({"data": data_file.summary(self.data)}, "the data that it reads")
        with processes.agreed():
            if self.folder is not None:
                self.folder.note_left_out(self.ready.left_out.as_dict())
                if note := self.folder.note_data(self.data, self.ready.samples):
                    self.progress.say(note)
        for line in self.ready.left_out.lines():
            self.progress.say(line)
        for line in reference_warnings(self.plan, self.ready.samples):
            self.progress.say(line)
        for name in [one.name for one in self.plan.suite.held_out if self.plan.trains]:
            if name not in self.plan.held_out:
                self.progress.say(f"held-out set {name} is not scored: no such split, or the backbone cannot do it")
        for note in self.ready.notes:
            self.progress.say(f"--init-from: {note}")
        self.backbone, self.method = self.ready.backbone, self.ready.method
        self.parameters = self.ready.saved_parameters()
        self.uneven = self.method.uneven = processes.sharded(self.backbone.language_model, self.parameters.values())
        self.scorers = make_scorers(self.plan.suite.clip, self.plan.device)

    def resume(self) -> None:
        """Restores the furthest checkpoint, if there is one, and drops what the logs have after it."""
        folder, say = self.folder, self.progress.say
        found = collectives.broadcast_object(processes.first_alone(lambda: folder and folder.furthest(say)))
        if found is None:
            self._add_digest(0, ZERO_SHOT, self.method.state_dict())
        else:
            path, self._restored, values = found
            data = values.get(DATA_KEY)
            if data not in (None, data_digest.joint(self.data)):
                raise data_file.changed(path, ["  the checkpoint is of a run on other data"])
            self._resumed, self.state = path, RunState.from_manifest(values, path)
            known = {} if self.state.step else {row.stage: row.sha256 for row in self.state.digests}
            checkpoint_fit.require_fit(path, self._restored, self.parameters, known.get(self.state.tasks_done))
            if self.ready.initial is not None:
                self.ready.initial.put_merged(self.backbone)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self._restored["adapters"][name])
            if not self.state.step:
                checkpoint_fit.restore(path, self.method, self._restored["method"])
            self.progress.say(f"resuming from {path.name}")
        if self.folder is not None:
            self._cut_logs(self.folder)
        known = (self.state.scores, self.state.extra, bool(self.folder and self.folder.run))
        self.state.scores, self.state.extra, self._has_extra = collectives.broadcast_object(known)

    def separate_tasks(self) -> None:
        """Writes how separable the tasks are without training, where the run begins and has two tasks or more."""
        there = self.folder and (self.folder.path / SEPARABILITY).is_file()
        begins = not (self.state.tasks_done or self.state.step or collectives.broadcast_object(there))
        if not (begins and self.plan.trains and len(self.tasks) > 1):
            return
        self.progress.measuring("measuring how separable the tasks are")
        with autocast(self.plan.recipe.precision, self.backbone.device):
            given = (self.backbone, self.tasks, self.ready.samples, self.plan.config.split)
            found = separability(*given, self.uneven)
        if self.folder is not None:
            self.folder.write_json(SEPARABILITY, found)
        self._measure(ZERO_SHOT, "evaluate")

    def start_from_source(self) -> None:
        """Puts what ``init_from`` names in place of the pretrained state, as the state after ``init_tasks``."""
        initial, given = self.ready.initial, len(self.plan.config.init_tasks)
        if initial is None:
            return
        if not self.state.tasks_done and not self.state.step:
            initial.put_merged(self.backbone)
            initial.compare_merged(self.backbone, self.plan.recipe.precision)
            initial.put(self.parameters, self.method)
            if given:
                stage = next(stage for stage in self.stages if stage.number == given)
                self.state.tasks_done = given
                self._save(stage.label, stage)
                self.evaluate_stage(given)
                self._write_results()
        initial.tensors.clear()

    def _cut_logs(self, folder: RunFolder) -> None:
        done, step = self.state.tasks_done, self.state.step
        under_way = next((stage.number for stage in self.stages if stage.number > done), done)
        last = (under_way if step else done, step or (sys.maxsize if done else 0))
        folder.cut(done, last, self.progress.say)
        self.state.scores, self.state.extra = (
            {(row.stage, row.task): row for row in log.rows} for log in (folder.scored, folder.extra)
        )
        for task in self.tasks:
            if others := {row.scorer for row in self.state.scores.values() if row.task == task.name} - {task.scorer}:
                before = f"{task.name} was scored by {', '.join(sorted(others))} and is by {task.scorer} from here"
                self.progress.say(f"warning: {before}: scores that do not compare; run it anew with another --out")
        folder.mirror(trackers.begin(self.plan.config, self.plan.as_dict(), self._last_steps(), self.progress.say))

    def _last_steps(self) -> dict[int, int]:
        """Optimizer steps of the whole run at the end of each stage."""
        last = {0: 0}
        for stage in self.stages:
            last[stage.number] = max(last.values()) + stage.steps
        return last

    def _note_environment(self) -> None:
        """Adds this environment to those that the results come from, if anything is left to do."""
        known = self.folder and self.folder.fingerprints(self.progress.say)
        fingerprints = self.state.fingerprints = collectives.broadcast_object(known) or []
        here = fingerprint.present(self.plan.device, self.plan.config.threads)
        if here in fingerprints or all((len(self.tasks), task.name) in self.state.scores for task in self.tasks):
            return
        for line in fingerprint.differences(fingerprints[-1], here) if fingerprints else ():
            self.progress.say(f"resuming in another environment, which the results will show: {line}")
        fingerprints.append(here)
        self._write_environment()

    def train_task(self, stage: Stage) -> None:
        """Trains a stage to its end, from the step that the state is at, and saves a checkpoint."""
        name, parameters, statistics = stage.task.name, self.method.trainable(stage.task), None
        trained = [*parameters.values(), *self.ready.extras.values()] if parameters else []
        self.state.trained.setdefault(name, Trained(sum(parameter.numel() for parameter in trained)))
        if parameters:
            trainer = self._trainer(stage, parameters)
            self._train_steps(stage, trainer)
            statistics = trainer.finish()
        self._measure(name, "train")
        self.state.add_averaging(name, statistics)
        self.state.tasks_done, self.state.step = stage.number, 0
        self._save(stage.label, stage)
        self._restored = {}

    def _trainer(self, stage: Stage, parameters: dict[str, nn.Parameter]) -> TaskTrainer:
        """The trainer of a stage, at the step that the state is at."""
        train = self.ready.samples["train"]
        samples = [sample for name in stage.names for sample in train[name]]
        seen = self.plan.order[: stage.number]
        memory = rehearsal_memory(train, seen, self.method.card.rehearsal, self.plan.config.seed)
        trainer = begin(self.plan, self.ready, stage.task, parameters, samples, stage.steps, memory)
        if self.state.step:
            trainer.load_state_dict(self._restored["optimizer"], self.state.step)
            checkpoint_fit.restore(self._resumed, self.method, self._restored["method"])
        return trainer

    def _train_steps(self, stage: Stage, trainer: TaskTrainer) -> None:
        """Takes the optimizer steps that are left. Saves a checkpoint at each interval, and where a signal came."""
        name, steps, trained = stage.task.name, stage.steps, self.state.trained[stage.task.name]
        self.backbone.train()
        while trainer.step < steps:
            log = trainer.train_step()
            trained.steps += 1
            trained.tokens += log.tokens
            self.state.step = log.step
            self._unlogged.append(TrainStep(stage=stage.number, task=name, **dataclasses.asdict(log)))
            self.progress.step(stage.number, name, log.step, steps, log.loss)
            due = self._stop_requested() or log.step % self.plan.config.checkpoint_interval == 0
            if due and log.step < steps:
                self._measure(name, "train")
                self._save(f"{stage.label}_step{log.step}", stage, trainer)
                # Reduced again: a signal that came while rank 0 was writing must stop all ranks at this step.
                if self._stop_requested():
                    self.stop.check(f"saved after step {log.step} of {steps} of {name}")

    def _stop_requested(self) -> bool:
        """Whether any rank has received a signal. All ranks then stop at the same step."""
        (received,) = collectives.all_reduce(float(self.stop.requested is not None), device=self.backbone.device)
        if received and self.stop.requested is None:
            self.stop.requested = signal.SIGTERM
        return bool(received)

    def _measure(self, name: str, kind: Literal["train", "evaluate"]) -> None:
        """Adds the time, memory and energy since the last call to a stage's cost."""
        lap = cost.combine(collectives.gather_shards([self.meter.lap()]))
        self.state.measured.setdefault(name, cost.StageCost()).add(kind, lap)

    def _save(self, label: str, stage: Stage, trainer: TaskTrainer | None = None) -> None:
        """Logs the steps since the last checkpoint, then writes the next. trainer: within a stage."""
        if self.folder is not None:
            self.folder.log_steps(self._unlogged)
        self._unlogged.clear()
        method = self.method.state_dict()
        tensors = {"adapters": self.parameters, "method": method, "optimizer": trainer.state_dict() if trainer else {}}
        stored = sum(t.numel() * t.element_size() for kept in (self.parameters, method) for t in kept.values())
        self.state.stored_bytes = stored
        if trainer is None:
            self._add_digest(stage.number, stage.task.name, method)
            self.state.stored_by_stage[stage.task.name] = stored
        if self.folder is not None:
            data = {DATA_KEY: data_digest.joint(self.data)}
            self.folder.save(tensors, self.state.to_manifest() | data, label)

    def _add_digest(self, stage: int, trained: str, method: dict[str, Tensor]) -> None:
        tensors = {"adapters": self.parameters, "method": method}
        self.state.digests.append(StateDigest(stage, trained, digest(tensors)))

    def evaluate_stage(self, number: int) -> None:
        """Evaluates the tasks seen up to a stage, or all at stage 0, except those that are scored already."""
        if self.state.step:
            # In the middle of the next stage, which began when this was done.
            return
        trained = next((stage.task.name for stage in self.stages if stage.number == number), ZERO_SHOT)
        tasks = self.tasks[:number] if number else self.tasks
        if self._has_extra or any((number, task.name) not in self.state.scores for task in tasks):
            # First, so that a stage whose own scores are all there lacks none of these that it ever had.
            self._evaluate_extra(number, trained)
        for task in tasks:
            if (number, task.name) in self.state.scores:
                continue
            row = self._score(number, trained, task)
            if self.folder is not None:
                self.folder.log_score(row)
            self.state.scores[number, task.name] = row
        self._measure(trained, "evaluate")
        self.progress.stage(number, trained, {t.name: self.state.scores[number, t.name].strict for t in tasks})

    def _evaluate_extra(self, number: int, trained: str) -> None:
        """Evaluates what `Plan.extra` names of a stage; not the next task where nothing is trained."""
        held_out = {task.name for task in self.plan.suite.held_out}
        for task in self.plan.extra(number):
            if (number, task.name) in self.state.extra or (self._untrained(number) and task.name not in held_out):
                continue
            row = self._score(number, trained, task, extra=True)
            if self.folder is not None:
                self.folder.log_extra(row)
            self.state.extra[number, task.name] = row

    def _untrained(self, number: int) -> bool:
        """Whether a stage after zero-shot is the pretrained model."""
        return bool(
            number and not self.plan.source and not any(each.parameters for each in self.state.trained.values())
        )

    def _score(self, number: int, trained: str, task: Task, extra: bool = False) -> StageScore:
        """A task's scores after a stage; the zero-shot scores where nothing has been trained.

        extra: whether the task's answers go into the folder extra/, as those of a task not learnt.
        """
        if self._untrained(number) and (known := (self.state.scores | self.state.extra).get((0, task.name))):
            return replace(known, stage=number, trained=trained, predictions=None)
        if self.folder is not None:
            self.folder.check()
        samples = self.ready.samples[self.plan.config.split][task.name]
        with (
            self.progress.evaluating(number, trained, task.name, len(samples)),
            autocast(self.plan.recipe.precision, self.backbone.device),
            self.method.for_eval(),
        ):
            folder, scorer = (
                self.folder and self.folder.path / ("extra" if extra else ""),
                find_scorer(task, self.scorers),
            )
            # A method that is given the task of a question knows those of the order alone.
            task_id = None if task.name in self.plan.order else self.tasks[max(number, 1) - 1]
            return evaluate(self.method, task, samples, scorer, folder, number, trained, self.uneven, task_id)

    def _write_results(self) -> dict[str, Any]:
        """Writes results.json, cost.json and environment.json. Returns the first one's content."""
        outcome = results.results(self.plan, self.method, self.state, self.data, self.ready.notes)
        if self.folder is not None:
            outcome = self.folder.write_json(RESULTS, outcome)
            seconds = time.perf_counter() - self.started
            self.folder.write_json("cost.json", results.costs(self.state, self.meter, seconds))
            self._write_environment()
        return outcome

    def _write_environment(self) -> None:
        if self.folder is not None:
            described = environment.describe() | {"fingerprints": self.state.fingerprints}
            self.folder.write_json(ENVIRONMENT, described)
