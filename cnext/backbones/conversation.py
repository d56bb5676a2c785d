"""A conversation as a language model sees it that reads and writes text and pictures in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label where nothing is supervised."""
TEXT_READ, IMAGE_READ, TEXT_WRITTEN, IMAGE_WRITTEN = range(4)
"""Rows of cnext.adapters.BRANCH_ROLES."""


class Frame(NamedTuple):
    """What stands around an instruction. head, tail: token ids.  before, after: text, tokenized with the instruction.
    glue: text between the instruction and a picture beside it."""

    head: list[int]
    before: str
    glue: str
    after: str
    tail: list[int]


@dataclass(frozen=True)
class Encoded:
    """One conversation.

    ids: (L,) int64 tokens.  labels: (L,) int64, the token where one of an answer stands, else IGNORED.
    codes: (L,) int64, the code where one of a picture written stands, else IGNORED; 0 for any of them until encoded.
    positions: (L,) int64 roles. A position that holds or gives a code writes an image, any other that holds or gives a
        supervised token writes text.
    read: of the picture read, pixels (3, H, W) as prepared, and encoded what the backbone embeds of it.
    written: pixels (3, H, W) of the picture to write as prepared; None once its codes are known.
    """

    ids: Tensor
    labels: Tensor
    codes: Tensor
    positions: Tensor
    read: Tensor | None = None
    written: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def question(self) -> Encoded:
        """The first instruction alone: all before the first token of its answer, which its last position gives."""
        end = int((self.labels != IGNORED).nonzero()[0])
        return Encoded(self.ids[:end], self.labels[:end], self.codes[:end], self.positions[:end], self.read)

    def before_codes(self, answer: Sequence[int]) -> Encoded:
        """A question with an answer whose last token gives the first code of a picture."""
        added = self.ids.new_tensor(answer)
        nothing = torch.full_like(added, IGNORED)
        roles = torch.full_like(added, TEXT_WRITTEN)
        roles[-1] = IMAGE_WRITTEN
        return replace(
            self,
            ids=torch.cat([self.ids, added]),
            labels=torch.cat([self.labels, nothing]),
            codes=torch.cat([self.codes, nothing]),
            positions=torch.cat([self.positions, roles]),
        )


@dataclass
class Conversation:
    """Puts a sequence together, piece by piece."""

    cells: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Of each position the token, its label, its code, and what is read there."""

    def read(self, ids: Sequence[int], role: int = TEXT_READ) -> None:
        self.cells += [(token, IGNORED, IGNORED, role) for token in ids]

    def write(self, ids: Sequence[int]) -> None:
        """Supervised text."""
        self.cells += [(token, token, IGNORED, TEXT_READ) for token in ids]

    def write_codes(self, count: int, placeholder: int) -> None:
        """Supervised codes, which are filled in when the picture is encoded."""
        self.cells += [(placeholder, IGNORED, 0, TEXT_READ)] * count

    def encoded(self, read: Tensor | None, written: Tensor | None) -> Encoded:
        ids, labels, codes, positions = torch.tensor(self.cells).unbind(1)
        for wanted, role in ((labels, TEXT_WRITTEN), (codes, IMAGE_WRITTEN)):
            holds = wanted != IGNORED
            positions = positions.masked_fill(holds | F.pad(holds[1:], (0, 1)), role)
        return Encoded(ids, labels, codes, positions, read, written)
