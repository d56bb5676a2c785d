"""Backbones: dual-to-dual models behind one small interface.

A package elsewhere adds one by an entry point of the group ``cnext.backbones``: ``name = "module:Class"``.
"""

from __future__ import annotations

import importlib
import importlib.metadata

from cnext.errors import unknown

GROUP = "cnext.backbones"
_OWN = {
    "tiny": "cnext.backbones.tiny.model:TinyBackbone",
    "janus": "cnext.backbones.janus:JanusBackbone",
    "emu3": "cnext.backbones.emu3:Emu3Backbone",
    "seed-x": "cnext.backbones.seed_x.model:SeedX",
}
SUMMARIES = {
    "tiny": "0.87 M parameters, embedded, shaped like SEED-X; learns six tasks on a CPU in minutes",
    "janus": "Janus and Janus-Pro, 1 B or 7 B, from a folder of weights; reads through SigLIP and writes codes",
    "emu3": "Emu3, 8 B, from a folder of weights; text and the codes of pictures in one vocabulary",
    "seed-x": "SEED-X-I, 17 B, the paper's, from a folder of weights; reads images in tiles and draws through SDXL",
}


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
