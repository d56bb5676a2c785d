"""Backbones: models that read and write text and images behind one interface, `cnext.backbones.base.Backbone`.

Here are the models, their tokenizers, and the loading of their weights; not adapters, training or scoring. Another
package adds a backbone by an entry point of the group ``cnext.backbones``: ``name = "module:Class"``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnext.errors import UserError
from cnext.registry import Registry

if TYPE_CHECKING:
    from cnext.tasks.base import ImageNeed, Task


def _checked(found: Any) -> type:
    from cnext.backbones.base import Backbone

    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise UserError(f"expected a subclass of cnext.backbones.base.Backbone, got {found!r:.100}")
    return found


BACKBONES = Registry(
    "backbone",
    "cnext.backbones",
    {
        "tiny": "cnext.backbones.tiny.model:TinyBackbone",
        "small": "cnext.backbones.small.model:SmallBackbone",
        "janus": "cnext.backbones.janus:JanusBackbone",
        "emu3": "cnext.backbones.emu3:Emu3Backbone",
        "seed-x": "cnext.backbones.seed_x.model:SeedX",
        "hf": "cnext.backbones.hf.model:HuggingFace",
    },
    _checked,
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


def check_tasks(name: str, weights: Path | None, tasks: Iterable[Task]) -> None:
    """Checks that a backbone reads and writes what tasks do. Loads no tensors.

    Raises:
        UserError: names every task that it cannot do, and what it cannot.
    """
    reads, writes = load(name).modalities(weights)
    problems = []
    for task in tasks:
        sides = (("reads", task.reads, reads), ("writes", task.writes, writes))
        lacking = [f"{side} {modality}" for side, asked, able in sides for modality in asked if modality not in able]
        problems += [f"{task.name} ({', '.join(lacking)})"] if lacking else []
    if problems:
        model = f"backbone {name}" + ("" if weights is None else f" with {weights}")
        raise UserError(
            f"{model} reads {' and '.join(reads)} and writes {' and '.join(writes)}, and cannot do "
            f"{', '.join(problems)}; choose other tasks by --order, another suite, or another model"
        )


def unmet_need(*names: str, weights: Path | None = None) -> ImageNeed:
    """A function that says why one of these backbones cannot read an image of some width and height, "" if all can.

    names: of backbones; none: all that come with cnext, which the first call imports.
    weights: of the one backbone that is named.
    """

    @cache
    def needs() -> list[Any]:
        return [load(name).image_need(weights) for name in names or BACKBONES.own]

    if names:
        needs()
    return lambda size: next(filter(None, (need(size) for need in needs())), "")
