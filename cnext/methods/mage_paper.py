"""MAGE-paper: four LoRA branches by modality role, of which a task trains its own, averaged by PEMA.

A general branch is trained on tasks that read its modality, an expert branch on tasks that write it. At the end of a
task every trained parameter is averaged with its value from before the task, weighted by the damped inverse of its own
Fisher information, see `cnext.averaging.Pema`. The paper's equation itself is the average ``pema-literal``, the
released code's are ``pema-released`` and ``none``. `mage` is what we found to do better.

Reference: Continual-NExT, arXiv 2602.18055, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnext.methods.base import Card
from cnext.methods.parts.branches import RoleBranches


@dataclass
class MagePaper(RoleBranches):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    scale: float = 3.0
    c: float = 2.0

    card = Card(
        "arXiv 2602.18055",
        keeps="the averaging rule's state; of pema the summed Fisher information",
        grid={"scale": (1.0, 3.0, 6.0), "c": (2.0, 5.0, 10.0, 20.0)},
    )
