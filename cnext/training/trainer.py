"""Train one task: batches, learning-rate schedule, gradients, optimizer steps, and the state to resume from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone
from cnext.config.plan import Plan
from cnext.config.schedules import SCHEDULES
from cnext.distributed import collectives, deepspeed
from cnext.errors import UserError
from cnext.methods.base import Memory, Method
from cnext.tasks.base import Recipe, Sample, Task
from cnext.training.batches import Batches, stable_seed
from cnext.training.phases import finish_task
from cnext.training.precision import autocast
from cnext.training.setup import Prepared


@dataclass(frozen=True)
class StepLog:
    """What train.jsonl has of one optimizer step.

    Attributes:
        step: number of the step within its task, from 1.
        loss: text_loss + image_loss_weight * image_loss, of the whole batch, without penalties.
        text_loss, image_loss: means over the batch's supervised tokens and pictures.
        learning_rate: of this step.
        grad_norm: before clipping, penalties included.
        tokens: supervised tokens and features of the batch.
    """

    step: int
    loss: float
    text_loss: float
    image_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int


class TaskTrainer:
    """The optimizer steps of one task.

    Batches, dropout masks and the learning rate of a step follow from the seed and the step's number, so a checkpoint
    needs the parameters, the optimizer's moments and the method's state only.

    Args:
        parameters: the method's trainable parameters, as `Method.trainable` returned them.
        samples: the task's training samples.
        steps: optimizer steps in total.
        seed: parts of the seed, see `stable_seed`.
        extras: parameters trained beside the method's, see `trained_beside`.
        workers: worker processes that load samples; 0 loads them in this process.
        encoded: see `Batches`.
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
        encoded: list[Any] | None = None,
    ) -> None:
        self.backbone, self.method, self.own = backbone, method, parameters
        self.parameters = parameters | (extras or {})
        self.recipe, self.steps, self.seed = recipe, steps, seed
        self.batches = Batches(backbone, samples, recipe.batch_size, seed, workers, encoded)
        self.step = 0
        share = -(-recipe.batch_size // collectives.world_size())
        method.micro_batches = -(-share // (recipe.micro_batch_size or share))
        own = set(parameters.values())
        self.frozen: list[Tensor] = (
            [p for p in method.adapter_parameters().values() if p not in own] if recipe.decay_frozen else []
        )
        """Parameters of the method that weight decay shrinks although the task does not train them."""
        self.optimizer = deepspeed.adamw(
            list(self.parameters.values()),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def train_step(self) -> StepLog:
        """Does one optimizer step.

        Raises:
            UserError: the loss or the gradient norm is not finite. No parameter has changed.
        """
        rate = SCHEDULES[self.recipe.schedule](self.recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.method.relative_rate = min(rate / self.recipe.learning_rate, 1.0)  # the division rounds
        # Dropout masks differ between processes; rank 0 has the seed of a run in one process.
        rank = [collectives.rank()] if collectives.rank() else []
        torch.manual_seed(stable_seed(*self.seed, "step", self.step, *rank))
        sums, penalties = self._backward(self.batches.at(self.step, self.steps))
        loss, text_loss, image_loss, tokens = sums.tolist()
        self._check_finite("loss", loss)
        self.method.transform_gradients(self.own)
        for parameter in self.method.observed.values():
            parameter.grad = None
        for name, gradient in penalties.items():
            parameter = self.own[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm).item()
        self._check_finite("gradient norm", norm)
        if self.recipe.decay_frozen:
            self._decay_unused(rate)
        self.optimizer.step()
        self.method.after_micro_batch(last=True)
        self.optimizer.zero_grad()
        self.method.after_step()
        self.step += 1
        return StepLog(self.step, loss, text_loss, image_loss, rate, norm, int(tokens))

    def _decay_unused(self, rate: float) -> None:
        """What AdamW does to parameters whose gradient is zero throughout, and to trained ones a zero in this step."""
        with torch.no_grad():
            torch._foreach_mul_(self.frozen, 1 - rate * self.recipe.weight_decay)
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def finish(self) -> dict[str, Any] | None:
        """Ends the task in evaluation mode, see `finish_task`. Returns the statistics of `Method.after_task`."""
        self.backbone.eval()
        with autocast(self.recipe.precision, self.backbone.device):
            return finish_task(self.method)

    def _backward(self, batch: list[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the gradients of a batch, micro-batch by micro-batch.

        The task loss is a mean as ``loss_mean`` of the recipe says; its gradient is left in ``.grad``. The penalty is a
        mean over micro-batches.

        Returns: (4,) loss, text loss, image loss and number of tokens; the penalty's gradients by parameter name.
        """
        size = self.recipe.micro_batch_size or len(batch)
        parts = [batch[start : start + size] for start in range(0, len(batch), size)]
        count, whole = len(parts) * collectives.world_size(), None
        if self.recipe.loss_mean == "batch" and count > 1:
            whole = collectives.all_reduce(*self.backbone.supervised(batch), device=self.backbone.device)
        sums, penalties = Tensor(), {}
        samples = self.batches.samples_at(self.step)
        for number, part in enumerate(parts):
            self.method.batch_samples = samples[number * size : number * size + len(part)]
            losses = self._backward_task_loss(part, whole, 1.0 if whole else 1 / count)
            sums = sums + losses if len(sums) else losses
            self._add_penalty_gradients(penalties, part, len(parts))
            if part is not parts[-1]:
                self.method.after_micro_batch(last=False)
        for _ in range(self.method.micro_batches - len(parts)):  # other processes have more
            self.method.after_micro_batch(last=False)
        return sums, self._reduce(sums, penalties) if collectives.world_size() > 1 else penalties

    def _backward_task_loss(self, part: list[Any], whole: tuple[float, ...] | None, weight: float) -> Tensor:
        """Adds the gradient of the task loss, times a weight, to ``.grad``. whole: as in `Backbone.loss`.

        Returns: the row of `_backward`.
        """
        with autocast(self.recipe.precision, self.backbone.device):
            self.method.before_step(part)
            loss = self.backbone.loss(part, whole)
        (loss.total if weight == 1 else loss.total * weight).backward()
        losses = torch.stack([loss.total.detach(), loss.text, loss.image])
        return torch.cat([losses * weight, losses.new_tensor([float(loss.tokens)])])

    def _add_penalty_gradients(self, gradients: dict[str, Tensor], part: list[Any], count: int) -> None:
        """Adds the gradient of the method's penalty, divided by the number of micro-batches, to ``gradients``."""
        with autocast(self.recipe.precision, self.backbone.device):
            penalty = self.method.extra_loss(part)
        if penalty is None:
            return
        found = torch.autograd.grad(penalty / count, list(self.own.values()), allow_unused=True)
        for name, gradient in zip(self.own, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient

    def _reduce(self, sums: Tensor, penalties: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums the losses and ``.grad`` over all processes, in place. Returns the mean of the penalties' gradients."""
        # A parameter that no sample of this process has used may have a gradient in another process.
        read = [*self.parameters.values(), *(p for p in self.method.observed.values() if p.requires_grad)]
        used = collectives.all_reduce(*(float(p.grad is not None) for p in read), device=sums.device)
        for parameter, processes in zip(read, used, strict=True):
            if processes and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if penalties:
            filled = {name: penalties.get(name, torch.zeros_like(p)) for name, p in self.own.items()}
            penalties = {name: gradient / collectives.world_size() for name, gradient in filled.items()}
        gradients = [p.grad for p in read if p.grad is not None]
        collectives.all_reduce_([sums, *gradients, *penalties.values()])
        return penalties

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            ids = ", ".join(self.batches.ids(self.step))
            remedy = "the last checkpoint is good; a lower --learning-rate is the usual remedy"
            if not self.step:
                remedy = (
                    "no step was done on this task: check these samples and the weights, or give another --precision"
                )
            raise UserError(
                f"the {name} is {value} at step {self.step + 1} of {self.steps}; samples of the batch: {ids}\n{remedy}"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts as ``<key>:<parameter name>``; with ZeRO complete on rank 0 only."""
        moments = deepspeed.moments(self.optimizer, self.parameters.values())
        return {
            f"{key}:{name}": value
            for name, values in zip(self.parameters, moments, strict=True)
            for key, value in values.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restores the optimizer's state after ``step`` steps."""
        self.step = step
        optimizer = deepspeed.local_optimizer(self.optimizer)
        local = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for label, value in tensors.items():
            key, _, name = label.partition(":")
            parameter = self.parameters[name]
            if parameter in local:
                optimizer.state[parameter][key] = value.to(parameter.device)


def begin(
    planned: Plan,
    ready: Prepared,
    task: Task,
    parameters: dict[str, nn.Parameter],
    samples: Sequence[Sample],
    steps: int,
    memory: Memory,
) -> TaskTrainer:
    """Makes the trainer of a task and calls `Method.before_task`. memory: as the latter takes it."""
    recipe, seed = planned.recipe.of(task.name), (planned.config.seed, task.name)
    recipe = dataclasses.replace(recipe, learning_rate=recipe.learning_rate * ready.method.lr_factor)
    for parameter in ready.extras.values():
        parameter.requires_grad_(True)
    shared = {} if ready.encoded is None else ready.encoded
    options = ready.extras, planned.config.workers, shared.get(task.name)
    trainer = TaskTrainer(ready.backbone, ready.method, parameters, samples, recipe, steps, seed, *options)
    shared[task.name] = trainer.batches.encoded
    with autocast(recipe.precision, ready.backbone.device):
        ready.method.before_task(parameters, steps, memory)
    return trainer
