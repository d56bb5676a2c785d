"""Backbones: dual-to-dual models behind one small interface.

A package elsewhere adds one by an entry point of the group ``cnext.backbones``: ``name = "module:Class"``.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from cnext.errors import unknown

GROUP = "cnext.backbones"
_OWN = {"tiny": "cnext.backbones.tiny.model:TinyBackbone"}
SUMMARIES = {"tiny": "0.87 M parameters, embedded, shaped like SEED-X; learns six tasks on a CPU in minutes"}


def modules() -> dict[str, str]:
    """Backbone names and where their classes are. Imports none of them."""
    return _OWN | {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}


def load(name: str) -> type:
    """The class of a backbone. Raises UserError with the valid names."""
    known = modules()
    if name not in known:
        raise unknown("backbone", name, sorted(known))
    module, _, attribute = known[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
