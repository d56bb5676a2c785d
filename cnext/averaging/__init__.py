"""Moving averages of parameters: one class per rule, for any torch model and optimizer.

The fused update of the parameters is in `ops`; when an average is taken is decided by a method.
"""

from cnext.averaging.base import MovingAverage
from cnext.averaging.fisher import UNITS, FisherAccumulator
from cnext.averaging.pema import Pema
from cnext.averaging.per_step import Constant, PemaLiteral, PemaStep
from cnext.averaging.released import Dema, NoAverage, PemaReleased

RULES: dict[str, type[MovingAverage]] = {
    rule.name: rule for rule in (Pema, PemaStep, PemaLiteral, PemaReleased, Dema, Constant, NoAverage)
}
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
    "PemaLiteral",
    "PemaReleased",
    "PemaStep",
]
