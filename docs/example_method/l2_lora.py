"""L2: LoRA, held by a spring of equal strength to every value that the task before left."""

from dataclasses import dataclass

from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.lora import Lora


@dataclass
class L2Lora(Lora):
    """loss + strength * sum of (theta - theta_old)^2."""

    strength: float = 0.001
    """Strength of the spring; 0 is plain LoRA."""

    card = Card("Kirkpatrick et al. 2017, arXiv 1612.00796, section 2.1: the L2 baseline", keeps="nothing")

    def __post_init__(self):
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
