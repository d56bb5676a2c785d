"""One sample between its files and the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cnext.backbones.conversation import IGNORED, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.pretrained import open_picture
from cnext.backbones.seed_x import conversation
from cnext.backbones.seed_x.anyres import GRIDS, WHOLE, views, whole
from cnext.backbones.seed_x.tokenizer import PAD, Tokenizer
from cnext.backbones.seed_x.vision import VisualEncoder, pooled
from cnext.tasks.base import Sample


@dataclass(frozen=True)
class Encoded:
    """One sample. ids, labels, roles: (L,) int64.  centres: (T, 2) of the T views read, or None.

    features: (T or 1, 256, width) of the views read; (T or 1, 3, 448, 448) uint8 as prepared. See `anyres.Views`.
    target: (64, width) of the image wanted; (3, 448, 448) uint8 as prepared.
    """

    ids: Tensor
    labels: Tensor
    roles: Tensor
    centres: Tensor | None = None
    features: Tensor | None = None
    target: Tensor | None = None

    @property
    def question(self) -> Encoded:
        """The first instruction alone: all before the first token that is supervised."""
        length = int((self.labels != IGNORED).nonzero()[0])
        roles = self.roles[:length].clone()
        roles[-1] = TEXT_WRITTEN
        return replace(self, ids=self.ids[:length], labels=self.labels[:length], roles=roles, target=None)


def prepare(tokenizer: Tokenizer, sample: Sample, *, end_every_turn: bool = False, max_length: int | None) -> Encoded:
    """A sample with pixels in place of features.

    Args:
        end_every_turn, max_length: see `conversation.conversation`. max_length None: the first instruction alone.
    """
    read, target = None, None
    if sample.image:
        read = views(open_picture(sample.image), GRIDS if sample.tiled and not sample.target_image else WHOLE)
    count = len(read.centres) if read else 0
    if max_length is None:
        made = conversation.question(tokenizer, sample, count)
    else:
        options = {"end_every_turn": end_every_turn, "max_length": max_length}
        made = conversation.conversation(tokenizer, sample, count, **options)
        target = whole(open_picture(sample.target_image)) if sample.target_image else None
    ids, labels, roles = (torch.tensor(values) for values in (made.ids, made.labels, made.roles))
    return Encoded(ids, labels, roles, read.centres if read else None, read.pixels if read else None, target)


def encode(vit: VisualEncoder, prepared: Sequence[Encoded]) -> list[Encoded]:
    """Prepared samples with features in place of pixels, all views of all samples encoded together."""
    read = [item.features for item in prepared if item.features is not None]
    wanted = [item.target[None] for item in prepared if item.target is not None]
    if not read + wanted:
        return list(prepared)
    features = vit.features(torch.cat(read + wanted)).split([len(views) for views in read + wanted])
    reads, targets = iter(features[: len(read)]), iter(features[len(read) :])
    return [
        replace(
            item,
            features=None if item.features is None else next(reads),
            target=None if item.target is None else pooled(next(targets))[0],
        )
        for item in prepared
    ]


def padded(items: Sequence[Encoded], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, labels, roles: (B, L), with padding on the right."""

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, True, value).to(device)

    ids, labels = pad([item.ids for item in items], PAD), pad([item.labels for item in items], IGNORED)
    return ids, labels, pad([item.roles for item in items], TEXT_READ)
