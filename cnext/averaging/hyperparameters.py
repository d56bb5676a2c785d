"""Ranges of the averages' hyperparameters."""

from __future__ import annotations

import math
from numbers import Real
from reprlib import repr as shortened

from cnext.errors import UserError

LEAST, MOST = 1e-12, 1e12
"""Of what has no range by itself: float32 over- or underflows beyond them."""


def number(what: str, value: object, low: float, high: float, *, inside: bool = False) -> float:
    """A hyperparameter as a float. what: its name for the message. inside: whether the ends are left out.

    Raises:
        UserError: it is no real number, or out of range.
    """
    found = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:  # an int of hundreds of digits
            found = math.nan
    if not (low < found < high if inside else low <= found <= high):
        between = f"between {low:g} and {high:g}, both left out" if inside else f"from {low:g} to {high:g}"
        raise UserError(f"{what} is {shortened(value)}; expected a number {between}")
    return found
