"""Training one task: batches, schedule, optimizer, and the state that a resumed run needs to take the same steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnext.backbones.base import Backbone
from cnext.errors import UserError
from cnext.methods.base import Method
from cnext.tasks.base import Recipe, Sample


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts; the same parts give the same seed on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from the full rate down to its minimum. step: 0-based."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(steps - recipe.warmup_steps, 1)
    low = recipe.min_learning_rate_ratio
    return recipe.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


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
    ) -> None:
        self.backbone, self.method, self.parameters = backbone, method, parameters
        self.samples, self.recipe, self.steps, self.seed = samples, recipe, steps, seed
        self.encoded = backbone.encode(samples)
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()),
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self._epoch, self._order = -1, torch.empty(0)

    def _batch(self) -> list[int]:
        """Indices of the step's samples: every sample once per epoch, each epoch in an order of its own."""
        indices = []
        for position in range(self.step * self.recipe.batch_size, (self.step + 1) * self.recipe.batch_size):
            epoch, place = divmod(position, len(self.samples))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(stable_seed(*self.seed, "epoch", epoch))
                self._epoch, self._order = epoch, torch.randperm(len(self.samples), generator=generator)
            indices.append(int(self._order[place]))
        return indices

    def train_step(self) -> dict[str, Any]:
        """One optimizer step. Returns what is logged of it.

        Raises: UserError where the loss or the gradient is not finite, before any parameter changes.
        """
        indices = self._batch()
        rate = learning_rate(self.recipe, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(stable_seed(*self.seed, "step", self.step))
        batch = [self.encoded[index] for index in indices]
        self.method.before_step(batch)
        loss = self.backbone.loss(batch)
        self._check("loss", loss.total, indices)
        loss.total.backward()
        self.method.transform_gradients(self.parameters)
        penalty = self.method.extra_loss(batch)
        if penalty is not None:
            penalty.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm)
        self._check("gradient norm", norm, indices)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.total.item(),
            "text_loss": loss.text.item(),
            "image_loss": loss.image.item(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens": loss.tokens,
        }

    def _check(self, name: str, value: Tensor, indices: list[int]) -> None:
        if not torch.isfinite(value):
            ids = ", ".join(self.samples[index].id for index in indices)
            raise UserError(
                f"the {name} is {value.item()} at step {self.step + 1} of {self.steps}; samples of the batch: {ids}\n"
                "the last checkpoint is whole; a lower --learning-rate is the usual cure"
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's moments and step counts by parameter name."""
        state = self.optimizer.state
        return {
            f"{key}:{name}": value
            for name, parameter in self.parameters.items()
            for key, value in state[parameter].items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor], step: int) -> None:
        """Goes on after ``step`` steps with the optimizer's saved state."""
        self.step = step
        for label, value in tensors.items():
            key, _, name = label.partition(":")
            parameter = self.parameters[name]
            self.optimizer.state[parameter][key] = value.to(parameter.device)
