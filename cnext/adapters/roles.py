"""Branch roles: a side (read or written) and a modality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cnext.errors import UserError, unknown
from cnext.records import ModalityName

MODALITIES = ("text", "image")
"""The modalities of a model or suite that does not say otherwise."""
SIDES = {"general": "read", "expert": "written"}


@dataclass(frozen=True)
class BranchRole:
    """Role of a branch: "text-general" is trained where text is read, "image-expert" where an image is written."""

    modality: str
    side: str

    @property
    def name(self) -> str:
        return f"{self.modality}-{self.side}"


def check_modalities(modalities: Iterable[str], what: str = "modalities") -> tuple[str, ...]:
    """The modalities as a tuple. what: how messages call them.

    Raises:
        UserError: no list, no modality, one twice, or a name that is not of lowercase letters, digits
            and underscores.
    """
    if isinstance(modalities, str):
        raise UserError(f"{what} must be a list of names, got the text {modalities!r}; write [{modalities!r}]")
    if not isinstance(modalities, Iterable):
        raise UserError(f"{what} must be a list of names, got {modalities!r}")
    found = tuple(modalities)
    strange = [repr(name) for name in found if not isinstance(name, str) or not ModalityName.fits(name)]
    if strange or not found or len(set(found)) < len(found):
        raise UserError(
            f"{what} must be different names of lowercase letters, digits and underscores, such as 'audio', at least "
            f"one; got {', '.join(strange) or list(found)}"
        )
    return found


def branch_roles(modalities: Iterable[str] = MODALITIES) -> tuple[BranchRole, ...]:
    """The roles of some modalities, two for each.

    Those of text and image are first, in the order of the released checkpoints' branches 0 to 3: text-general,
    image-general, text-expert, image-expert. Every further modality adds its general and its expert role at the end.

    Raises:
        UserError: as `check_modalities`.

    Example:
        >>> [role.name for role in branch_roles(["text", "audio"])]
        ['text-general', 'text-expert', 'audio-general', 'audio-expert']
    """
    given = check_modalities(modalities)
    released = [modality for modality in MODALITIES if modality in given]
    others = [modality for modality in given if modality not in MODALITIES]
    return (
        *(BranchRole(modality, side) for side in SIDES for modality in released),
        *(BranchRole(modality, side) for modality in others for side in SIDES),
    )


def position_roles(modalities: Iterable[str]) -> tuple[BranchRole, ...]:
    """`branch_roles`, for methods that choose branches by ``Backbone.positions``, which counts them.

    Raises:
        UserError: text or image is missing, so that the first four roles are not those of ``BRANCH_ROLES``.
    """
    given = check_modalities(modalities)
    if not set(MODALITIES) <= set(given):
        raise UserError(
            f"this method chooses branches by position, and needs a suite whose modalities include "
            f"{' and '.join(MODALITIES)}; they are {', '.join(given)}"
        )
    return branch_roles(given)


BRANCH_ROLES = branch_roles()
"""text-general, image-general, text-expert, image-expert."""


def roles_of(
    reads: Iterable[str], writes: Iterable[str], modalities: Sequence[str] = MODALITIES
) -> tuple[BranchRole, ...]:
    """The roles that a task trains: general for every modality that it reads, expert for every one that it writes.

    Args:
        reads, writes: the task's modalities.
        modalities: those of the model or suite.

    Raises:
        UserError: no list, or a modality that is not one of ``modalities``.
    """
    used = {"general": reads, "expert": writes}
    for side, names in used.items():
        verb = {"general": "reads", "expert": "writes"}[side]
        if not isinstance(names, Iterable):
            raise UserError(f"{verb} must be a list of modalities, got {names!r}; write [] for none")
        if isinstance(names, str):
            raise UserError(f"{verb} must be a list of modalities, got the text {names!r}; write [{names!r}]")
    chosen = {side: set(names) for side, names in used.items()}
    if strange := set.union(*chosen.values()) - set(modalities):
        raise unknown("modality", ", ".join(sorted(map(str, strange))), tuple(modalities))
    return tuple(role for role in branch_roles(modalities) if role.modality in chosen[role.side])


def modalities_of(branches: Iterable[str]) -> tuple[str, ...] | None:
    """The modalities whose roles, and no others, are the names of these branches; None where there are none.

    Example:
        >>> modalities_of(["text-general", "audio-general", "text-expert", "audio-expert"])
        ('text', 'audio')
    """
    names = set(branches)
    found = tuple(dict.fromkeys(name.rpartition("-")[0] for name in branches))
    if not found or not all(map(ModalityName.fits, found)):
        return None
    return found if {role.name for role in branch_roles(found)} == names else None
