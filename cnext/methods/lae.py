"""LAE: LoRA trained online, and a slow exponential moving average of it, the offline copy, that answers.

theta_off <- decay theta_off + (1 - decay) theta_on after every step from the second task on. The offline copy is made
at the end of the first task; neither it nor the online adapter is reset between tasks.

The official code (decay 0.9999) also freezes the online adapter for the first epochs of a task and answers with the
maximum of both adapters' class probabilities. Here tasks are trained for steps, not epochs, and a maximum over classes
has no counterpart for generated text. As in Continual-NExT, only the average is used, with decay 0.99.

Reference: Gao et al., A Unified Continual Learning Framework with General Parameter-Efficient Tuning, arXiv 2303.10070.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from cnext import adapters, ops
from cnext.averaging.base import by_kind
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.parts.low_rank import LowRank


@dataclass
class Lae(LowRank):
    """y = W x + scale B A x."""

    decay: Annotated[float, "Decay of the average per step: after n steps the old value has weight decay^n."] = 0.995

    card = Card(
        "arXiv 2303.10070",
        keeps="the offline copy of the adapter",
        grid={"scale": (1.0, 3.0, 6.0), "decay": (0.95, 0.98, 0.99, 0.995)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise UserError(f"lae: expected decay in [0, 1], got {self.decay}")
        self.offline: dict[str, Tensor] = {}

    def after_step(self) -> None:
        online = self.adapter_parameters()
        for names in by_kind(self.offline):
            ops.ema_step_([online[name] for name in names], [self.offline[name] for name in names], beta=self.decay)

    def after_task(self) -> dict[str, Any] | None:
        if not self.offline:
            online = self.adapter_parameters()
            self.offline = {name: p.detach().to(torch.float32, copy=True) for name, p in online.items()}

    @contextmanager
    def for_eval(self) -> Iterator[None]:
        with adapters.holding(self.adapter_parameters(), self.offline):
            yield

    def extra_bytes(self, tasks: int) -> int:
        return sum(4 * parameter.numel() for parameter in self.adapter_parameters().values())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.offline)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        online = self.adapter_parameters()
        self.offline = {name: tensor.to(online[name].device, copy=True) for name, tensor in state.items()}
