"""MAGE: four branches by modality role, only the task's own trained, and a Fisher-weighted moving average.

Text and image have a general branch each (trained on tasks that read the modality) and an expert branch each (trained
on tasks that write it). At the end of a task every trained parameter is averaged with its value from before the task,
see `cnext.averaging.Pema`.

Reference: Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches


@dataclass
class Mage(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    card = Card("arXiv 2602.18055", keeps="the averaging rule's state; of pema the summed Fisher information")
