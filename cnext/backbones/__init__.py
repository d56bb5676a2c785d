"""Backbones: models that read and write text and images behind one interface, `cnext.backbones.base.Backbone`.

Here are the models, their tokenizers, and the loading of their weights; not adapters, training or scoring. Another
package adds a backbone by an entry point of the group ``cnext.backbones``: ``name = "module:Class"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from cnext.registry import Registry

BACKBONES = Registry(
    "backbone",
    "cnext.backbones",
    {
        "tiny": "cnext.backbones.tiny.model:TinyBackbone",
        "janus": "cnext.backbones.janus:JanusBackbone",
        "emu3": "cnext.backbones.emu3:Emu3Backbone",
        "seed-x": "cnext.backbones.seed_x.model:SeedX",
    },
)


def modules() -> dict[str, str]:
    """Names of backbones and where their classes are. Imports none of them."""
    return BACKBONES.places()


def load(name: str) -> type:
    """The class of a backbone. Raises UserError with the valid names."""
    return BACKBONES[name]


def summary(name: str) -> str:
    """A backbone in one line."""
    return BACKBONES.summary(name)


def unmet_need(*names: str) -> Callable[[tuple[int, int]], str]:
    """A function that says why one of these backbones cannot read an image of some width and height, "" if all can.

    names: of backbones; none: all that come with cnext, which the first call imports.
    """

    @cache
    def kinds() -> list[Any]:
        return [load(name) for name in names or BACKBONES.own]

    if names:
        kinds()
    return lambda size: next(filter(None, (kind.unmet_need(size) for kind in kinds())), "")
