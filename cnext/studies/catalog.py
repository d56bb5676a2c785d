"""``cnext list`` and ``cnext card``: the methods, backbones and suites that are installed."""

from __future__ import annotations

from collections.abc import Sequence

from cnext import backbones, methods
from cnext.tasks import suites


def everything() -> str:
    """Methods and backbones, a line each; suites with tasks, orders and presets. Does not import torch."""
    return "\n".join(
        [
            "methods",
            *(f"  {name:<14} {methods.summary(name)}" for name in sorted(methods.modules())),
            "backbones",
            *(f"  {name:<14} {backbones.summary(name)}" for name in sorted(backbones.modules())),
            "suites (details: cnext list SUITE)",
            *(suites.summary(suites.load(name)) for name in suites.names()),
        ]
    )


def suite(name: str) -> str:
    """One suite in detail. Raises UserError for an unknown name."""
    return suites.details(suites.load(name))


def cards(names: Sequence[str]) -> str:
    """The cards of methods. Raises UserError for an unknown name."""
    from cnext.studies.forecast import extra_bytes

    return "\n\n".join(methods.describe(name, extra_bytes(name)) for name in names)
