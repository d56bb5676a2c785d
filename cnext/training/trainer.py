"""Training one task: batches, schedule, optimizer, and the state that a resumed run needs to take the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone
from cnext.config.run_config import Plan
from cnext.config.schedules import SCHEDULES
from cnext.distributed import collectives, deepspeed
from cnext.errors import UserError
from cnext.methods.base import Memory, Method
from cnext.tasks.base import Recipe, Sample, Task
from cnext.training.batches import Batches, stable_seed
from cnext.training.precision import autocast
from cnext.training.setup import Prepared


class TaskTrainer:
    """The optimizer steps of one task.

    Batches, dropout and the schedule follow from the seed and the step's number alone, so that nothing but the
    parameters, the optimizer's moments and the method's state has to be saved.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        parameters: dict[str, nn.Parameter],
        samples: Sequence[Sample],
        recipe: Recipe,
        steps: int,
        seed: tuple[object, ...],
        extras: dict[str, nn.Parameter] | None = None,
        workers: int = 0,
    ) -> None:
        self.backbone, self.method, self.own = backbone, method, parameters
        self.parameters = parameters | (extras or {})
        self.recipe, self.steps, self.seed = recipe, steps, seed
        self.batches = Batches(backbone, samples, recipe.batch_size, seed, workers)
        self.step = 0
        self.optimizer = deepspeed.adamw(
            list(self.parameters.values()),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step. Returns what is logged of it.

        Raises: UserError where the loss or the gradient is not finite, before any parameter changes.
        """
        rate = SCHEDULES[self.recipe.schedule](self.recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout masks differ from process to process; with one process the seed is what it always was.
        place = [collectives.rank()] if collectives.rank() else []
        torch.manual_seed(stable_seed(*self.seed, "step", self.step, *place))
        loss, penalties = self._backward(self.batches.at(self.step, self.steps))
        self._check("loss", loss["loss"])
        self.method.transform_gradients(self.own)
        for parameter, penalty in penalties:
            parameter.grad = penalty if parameter.grad is None else parameter.grad.add_(penalty)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm).item()
        self._check("gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        self.step += 1
        tokens = loss.pop("tokens")
        return {"step": self.step, **loss, "learning_rate": rate, "grad_norm": norm, "tokens": int(tokens)}

    def _backward(self, batch: list[Any]) -> tuple[dict[str, float], list[tuple[nn.Parameter, Tensor]]]:
        """Leaves the task loss's gradient in ``.grad``. Returns the loss, and the gradient of the method's own penalty.

        Both are of the whole batch, whatever processes and micro-batches it is in: a mean over all of its supervised
        tokens and pictures. A penalty that looks at samples is a mean over micro-batches.
        """
        size = self.recipe.micro_batch_size or len(batch)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        alone = len(parts) == 1 and collectives.world_size() == 1
        whole = None if alone else collectives.all_reduce(*self.backbone.supervised(batch), device=self.backbone.device)
        sums, penalties = Tensor(), {}
        for part in parts:
            with autocast(self.recipe.precision, self.backbone.device):
                self.method.before_step(part)
                loss = self.backbone.loss(part, whole)
            loss.total.backward()
            row = torch.stack(
                [loss.total.detach(), loss.text, loss.image, torch.tensor(float(loss.tokens)).to(loss.text)]
            )
            sums = sums + row if len(sums) else row
            with autocast(self.recipe.precision, self.backbone.device):
                penalty = self.method.extra_loss(part)
            if penalty is not None:
                found = torch.autograd.grad(penalty / len(parts), list(self.own.values()), allow_unused=True)
                for name, gradient in zip(self.own, found, strict=True):
                    if gradient is not None:
                        penalties[name] = penalties[name].add_(gradient) if name in penalties else gradient
        if collectives.world_size() > 1:
            # A parameter that no sample of this process has used may have a gradient elsewhere.
            used = collectives.all_reduce(
                *(float(p.grad is not None) for p in self.parameters.values()), device=sums.device
            )
            learnt = [p for p, processes in zip(self.parameters.values(), used, strict=True) if processes]
            for parameter in learnt:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if penalties:
                zeros = {name: torch.zeros_like(p) for name, p in self.own.items() if name not in penalties}
                penalties = {name: value / collectives.world_size() for name, value in (penalties | zeros).items()}
                penalties = {name: penalties[name] for name in self.own}
            collectives.all_reduce_([sums, *(p.grad for p in learnt if p.grad is not None), *penalties.values()])
        names = ("loss", "text_loss", "image_loss", "tokens")
        values: dict[str, float] = dict(zip(names, sums.tolist(), strict=True))
        return values, [(self.own[name], gradient) for name, gradient in penalties.items()]

    def _check(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            ids = ", ".join(self.batches.ids(self.step))
            raise UserError(
                f"the {name} is {value} at step {self.step + 1} of {self.steps}; samples of the batch: {ids}\n"
                "the last checkpoint is whole; a lower --learning-rate is the usual cure"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts by parameter name; divided ones in the first process alone."""
        kept = deepspeed.moments(self.optimizer, self.parameters.values())
        return {
            f"{key}:{name}": value
            for name, values in zip(self.parameters, kept, strict=True)
            for key, value in values.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes on after ``step`` steps with the optimizer's saved state."""
        self.step = step
        mine = deepspeed.held(self.optimizer)
        learnt = {parameter for group in mine.param_groups for parameter in group["params"]}
        for label, value in tensors.items():
            key, _, name = label.partition(":")
            parameter = self.parameters[name]
            if parameter in learnt:
                mine.state[parameter][key] = value.to(parameter.device)


def begin(
    planned: Plan,
    ready: Prepared,
    task: Task,
    parameters: dict[str, nn.Parameter],
    samples: Sequence[Sample],
    steps: int,
    memory: Memory,
) -> TaskTrainer:
    """The trainer of a task's parameters, and of what learns beside them, as the plan has it; the method is told.

    memory: as `Method.before_task` takes it.
    """
    recipe, seed = planned.recipe.of(task.name), (planned.config.seed, task.name)
    for parameter in ready.extras.values():
        parameter.requires_grad_(True)
    trainer = TaskTrainer(
        ready.backbone, ready.method, parameters, samples, recipe, steps, seed, ready.extras, planned.config.workers
    )
    with autocast(recipe.precision, ready.backbone.device):
        ready.method.before_task(parameters, steps, memory)
    return trainer
