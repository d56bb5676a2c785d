"""EW+GA: MAGE without its average; four branches by modality role, only the task's own trained (4-split LoRA).

General branches are trained where their modality is read, experts where it is written.

Reference: Continual-NExT, arXiv 2602.18055, Table 4 (EW+GA) and section 4 (4-Split LoRA).
"""

from __future__ import annotations

from dataclasses import dataclass

from cnext.methods.base import Card
from cnext.methods.mage import Mage


@dataclass
class EwGa(Mage):
    """y = W x + scale * sum over the four roles of B_i A_i x."""

    average: str = "none"
    """Averaging rule, as of mage."""

    card = Card("arXiv 2602.18055, Table 4", keeps="nothing; with an average, the rule's state")
