"""Token sequences of conversations that read and write text and images: ids, labels, image codes and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of positions without a target, as ``ignore_index`` of torch's cross-entropy."""
TEXT_READ, IMAGE_READ, TEXT_WRITTEN, IMAGE_WRITTEN = range(4)
"""Values of `Backbone.positions`: rows of ``cnext.adapters.BRANCH_ROLES``."""


class PromptTemplate(NamedTuple):
    """What surrounds an instruction.

    prefix, suffix: token ids at the ends.  before, after: text, tokenized together with the instruction.
    separator: text between the instruction and an image beside it.
    """

    prefix: list[int]
    before: str
    separator: str
    after: str
    suffix: list[int]


@dataclass(frozen=True)
class CodedInputs:
    """One sample as model inputs of a `CodedBackbone`.

    ids: (L,) int64 tokens.  labels: (L,) int64, the token where it is one of an answer, else IGNORED.
    codes: (L,) int64, the code where it is one of an image written, else IGNORED; 0 in place of codes until encoded.
    positions: (L,) int64, see `Backbone.positions`. A position that holds or predicts a code writes an image, any other
        that holds or predicts a supervised token writes text.
    read: of the image read, pixels (3, H, W) as prepared; once encoded, the features that the backbone embeds.
    written: pixels (3, H, W) of the image to write, as prepared; None once its codes are known.
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
    def question(self) -> CodedInputs:
        """The first instruction alone: everything before the first token or code of its answer."""
        end = int(((self.labels != IGNORED) | (self.codes != IGNORED)).nonzero()[0])
        return CodedInputs(self.ids[:end], self.labels[:end], self.codes[:end], self.positions[:end], self.read)

    def with_answer(self, answer: Sequence[int]) -> CodedInputs:
        """The sequence with an answer appended whose last token predicts the first code of an image."""
        added = self.ids.new_tensor(answer)
        ignored = torch.full_like(added, IGNORED)
        positions = torch.full_like(added, TEXT_WRITTEN)
        positions[-1] = IMAGE_WRITTEN
        return replace(
            self,
            ids=torch.cat([self.ids, added]),
            labels=torch.cat([self.labels, ignored]),
            codes=torch.cat([self.codes, ignored]),
            positions=torch.cat([self.positions, positions]),
        )


@dataclass
class SequenceBuilder:
    """Builds a `CodedInputs` piece by piece.

    rows: of each position its token, label, code, and what is read there.
    """

    rows: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add_context(self, ids: Sequence[int], position: int = TEXT_READ) -> None:
        """Appends tokens without a target."""
        self.rows += [(token, IGNORED, IGNORED, position) for token in ids]

    def add_target(self, ids: Sequence[int]) -> None:
        """Appends supervised tokens."""
        self.rows += [(token, token, IGNORED, TEXT_READ) for token in ids]

    def add_codes(self, count: int, placeholder: int) -> None:
        """Appends supervised codes, unknown until the image is encoded. placeholder: token id in their place."""
        self.rows += [(placeholder, IGNORED, 0, TEXT_READ)] * count

    def build(self, read: Tensor | None, written: Tensor | None) -> CodedInputs:
        """The inputs, with pixels (3, H, W) of the image read and of the one to write."""
        ids, labels, codes, positions = torch.tensor(self.rows).unbind(1)
        for target, position in ((labels, TEXT_WRITTEN), (codes, IMAGE_WRITTEN)):
            holds = target != IGNORED
            positions = positions.masked_fill(holds | F.pad(holds[1:], (0, 1)), position)
        return CodedInputs(ids, labels, codes, positions, read, written)
