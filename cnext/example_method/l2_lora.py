"""L2: LoRA with a penalty of equal strength on the distance of every parameter from its value after the last task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.lora import Lora


@dataclass
class L2Lora(Lora):
    """L = L_task + strength * sum of (theta - theta_old)^2."""

    strength: Annotated[float, "Weight of the penalty; 0 is plain LoRA."] = 0.001

    card = Card("Kirkpatrick et al. 2017, arXiv 1612.00796, section 2.1: the L2 baseline", keeps="nothing")

    def __post_init__(self):
        super().__post_init__()
        if not self.strength >= 0:
            raise UserError(f"strength must be at least 0, got {self.strength}")
        self.old = {}

    def before_task(self, parameters, steps, memory):
        self.parameters = parameters
        self.old = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def extra_loss(self, batch):
        return self.strength * sum((p - self.old[name]).square().sum() for name, p in self.parameters.items())

    def after_task(self):
        self.old = {}

    def state_dict(self):
        return self.old

    def load_state_dict(self, state):
        self.old = dict(state)
