"""Upper bound: a joint-training reference, LoRA of rank 32 on all tasks' samples shuffled together.

One stage with the budget of all tasks: the sum of their steps, one schedule, every sample equally often. It is no
continual learner, and no bound either: in the paper three tasks end below what sequential learning reaches right after
each of them, and the paper gives no budget. Only the last row of its score matrix exists, so it forgets nothing.

Reference: Continual-NExT, arXiv 2602.18055, Table 1 ("Upper-Bound").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cnext.methods.base import Card
from cnext.methods.lora import Lora


@dataclass
class UpperBound(Lora):
    """y = W x + scale B A x, trained on all tasks at once."""

    joint: ClassVar[bool] = True

    card = Card("arXiv 2602.18055, Table 1", keeps="every training sample of every task until all are there")
