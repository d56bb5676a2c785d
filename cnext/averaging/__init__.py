"""Moving averages of parameters for any torch model and optimizer: one class per rule.

Averages over the course of a task, and the Fisher information that weights them. No averaging over runs or seeds: that
is in the tables and analyses of a study.
"""

from typing import get_args

from cnext.averaging.base import MovingAverage, Rule, Statistics
from cnext.averaging.fisher import UNITS, FisherAccumulator, Unit
from cnext.averaging.kron import PemaKron
from cnext.averaging.pema import Pema
from cnext.averaging.per_step import Constant, PemaLiteral, PemaStep
from cnext.averaging.released import Dema, NoAverage, PemaReleased

RULES: dict[Rule, type[MovingAverage]] = dict(
    zip(get_args(Rule), (Pema, PemaKron, PemaStep, PemaLiteral, PemaReleased, Dema, Constant, NoAverage), strict=True)
)
"""Rule name to class."""

__all__ = [
    "RULES",
    "UNITS",
    "Constant",
    "Dema",
    "FisherAccumulator",
    "MovingAverage",
    "NoAverage",
    "Pema",
    "PemaKron",
    "PemaLiteral",
    "PemaReleased",
    "PemaStep",
    "Rule",
    "Statistics",
    "Unit",
]
