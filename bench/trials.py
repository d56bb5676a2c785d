"""Runs of a suite in one process that share the data, the encoded samples and the frozen model, scored at their end."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cnext import methods
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.methods.base import Method
from cnext.scoring import make_scorers
from cnext.training import setup, trainer
from cnext.training.batches import stable_seed
from cnext.training.evaluation import answer
from cnext.training.stages import rehearsal_memory, stages


class Trials:
    """What the runs of one process share.

    Args:
        config: suite, preset, split and whatever else the runs have in common; method, order and seed are not read.
    """

    def __init__(self, config: RunConfig) -> None:
        torch.set_num_threads(config.threads)
        self.config = dataclasses.replace(config, method="zero-shot", hyperparameters={})
        planned = plan(self.config)
        self.samples = setup.read_suite(planned, setup.data_folder(planned))
        self.backbone = setup.load_backbone(planned)
        self.scorers = make_scorers(planned.suite.clip, planned.device)
        self.encoded: dict[str, list[Any]] = {}

    def run(
        self,
        method: str,
        hyperparameters: Mapping[str, Any],
        seed: int,
        order: str,
        learnt: bool = False,
        kind: Callable[..., Method] | None = None,
    ) -> dict[str, float]:
        """The metrics of a run, to the bit those of `cnext.run`.

        Args:
            hyperparameters: those that differ from the method's defaults.
            learnt: whether each task is also scored when it has been learnt, for Forgetting and New.ACC.
            kind: a subclass of the method's class to use in its place.

        Returns:
            "avg_acc", the mean of the tasks' scores at the end, in percent; with ``learnt`` also "new_acc", their mean
            when each had been learnt, and "forgetting".
        """
        given = {"method": method, "hyperparameters": dict(hyperparameters), "seed": seed, "order": order}
        planned = plan(dataclasses.replace(self.config, **given))
        backbone, made = copy.deepcopy(self.backbone), (kind or methods.load(method))(**planned.hyperparameters)
        tasks = [planned.suite.task(name) for name in planned.order]
        generator = torch.Generator().manual_seed(stable_seed(seed, "adapters"))
        made.setup(backbone, tasks, generator, planned.suite.modalities)
        ready = setup.Prepared(self.samples, backbone, made, {}, self.encoded)

        def score(name: str) -> float:
            task, samples = planned.suite.task(name), self.samples[planned.config.split][name]
            with made.for_eval():
                scores = self.scorers[task.scorer](task, samples, answer(made, task, samples))
            return sum(each.strict for each in scores) / len(scores)

        new = {}
        for stage in stages(planned):
            parameters = made.trainable(stage.task)
            if parameters:
                seen = planned.order[: stage.number]
                memory = rehearsal_memory(self.samples["train"], seen, made.card.rehearsal, seed)
                samples = [sample for name in stage.names for sample in self.samples["train"][name]]
                training = trainer.begin(planned, ready, stage.task, parameters, samples, stage.steps, memory)
                backbone.train()
                while training.step < stage.steps:
                    training.train_step()
                training.finish()
            new |= {name: score(name) for name in stage.names if learnt and len(stage.names) == 1}
        final = {name: score(name) for name in planned.order}
        average = sum(final.values()) / len(final)
        if not learnt:
            return {"avg_acc": average}
        new_average = sum((final | new).values()) / len(final)
        others = max(len(final) - 1, 1)
        lost = sum(new.get(name, value) - value for name, value in list(final.items())[:-1])
        return {"avg_acc": average, "forgetting": lost / others, "new_acc": new_average}
