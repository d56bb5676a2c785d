"""``cnext list`` and ``cnext card``: the methods, backbones and suites that are installed."""

from __future__ import annotations

from collections.abc import Sequence

from cnext import backbones, methods
from cnext.tasks import suites


def listing(suite: str | None = None) -> str:
    """All methods, backbones and suites, or one suite in detail. Does not import torch."""
    if suite is not None:
        return suites.details(suites.load(suite))
    lines = ["methods", *(f"  {name:<14} {methods.summary(name)}" for name in sorted(methods.modules()))]
    lines += [
        "backbones",
        *(f"  {name:<14} {backbones.summary(name)}" for name in sorted(backbones.modules())),
    ]
    lines += ["suites (details: cnext list SUITE)", *(suites.summary(suites.load(name)) for name in suites.names())]
    return "\n".join(lines)


def cards(names: Sequence[str]) -> str:
    """The cards of methods."""
    from cnext.studies.forecast import extra_bytes

    return "\n\n".join(methods.describe(name, extra_bytes(name)) for name in names)
