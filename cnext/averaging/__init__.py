"""Moving averages of parameters: one class per rule, for any torch model and optimizer."""

from cnext.averaging.base import MovingAverage
from cnext.averaging.pema import Pema

RULES: dict[str, type[MovingAverage]] = {rule.name: rule for rule in (Pema,)}
"""Rule name to class."""

__all__ = ["RULES", "MovingAverage", "Pema"]
