"""Branch roles: a side (read or written) and a modality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cnext.errors import UserError

MODALITIES = ("text", "image")
"""A further modality is added here."""
SIDES = {"general": "read", "expert": "written"}


@dataclass(frozen=True)
class BranchRole:
    """Role of a branch: "text-general" is trained where text is read, "image-expert" where an image is written."""

    modality: str
    side: str

    @property
    def name(self) -> str:
        return f"{self.modality}-{self.side}"


BRANCH_ROLES = tuple(BranchRole(modality, side) for side in SIDES for modality in MODALITIES)
"""text-general, image-general, text-expert, image-expert: the order of the released checkpoints' branches 0 to 3."""


def roles_of(reads: Iterable[str], writes: Iterable[str]) -> tuple[BranchRole, ...]:
    """The roles that a task trains: general for every modality that it reads, expert for every one that it writes.

    Raises:
        UserError: a modality that is not in MODALITIES.
    """
    used = {"general": set(reads), "expert": set(writes)}
    strange = set.union(*used.values()) - set(MODALITIES)
    if strange:
        raise UserError(f"unknown modality {', '.join(sorted(strange))}; valid: {', '.join(MODALITIES)}")
    return tuple(role for role in BRANCH_ROLES if role.modality in used[role.side])
