"""Encoding of SEED-X samples: from files to inputs of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cnext.backbones.conversation import IGNORED, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.seed_x import conversation
from cnext.backbones.seed_x.anyres import GRIDS, WHOLE, best_grid, views, whole
from cnext.backbones.seed_x.tokenizer import PAD, Tokenizer
from cnext.backbones.seed_x.vision import VisualEncoder, pooled
from cnext.image_files import image_size, open_image
from cnext.tasks.base import Sample


@dataclass(frozen=True)
class SeedXInputs:
    """One sample as model inputs.

    ids, labels, roles: (L,) int64, see `conversation.TokenizedSample`.  centres: (T, 2) of the T views read, or None.
    features: of the views read, (T or 1, 256, width); as prepared, (T or 1, 3, 448, 448) uint8. See `anyres.Views`.
    target: pooled features of the target image, (64, width); as prepared, (3, 448, 448) uint8.
    """

    ids: Tensor
    labels: Tensor
    roles: Tensor
    centres: Tensor | None = None
    features: Tensor | None = None
    target: Tensor | None = None

    @property
    def question(self) -> SeedXInputs:
        """The first instruction alone: everything before the first supervised token."""
        length = int((self.labels != IGNORED).nonzero()[0])
        roles = self.roles[:length].clone()
        roles[-1] = TEXT_WRITTEN
        return replace(self, ids=self.ids[:length], labels=self.labels[:length], roles=roles, target=None)


def prepare(
    tokenizer: Tokenizer, sample: Sample, *, end_every_turn: bool = False, max_length: int | None
) -> SeedXInputs:
    """A sample with pixels in place of features.

    Args:
        end_every_turn, max_length: see `conversation.conversation`; max_length None: the first instruction alone.
    """
    read, target = None, None
    if sample.image:
        read = views(open_image(sample.image), _grids(sample))
    count = len(read.centres) if read else 0
    if max_length is None:
        tokens = conversation.question(tokenizer, sample, count)
    else:
        options = {"end_every_turn": end_every_turn, "max_length": max_length}
        tokens = conversation.conversation(tokenizer, sample, count, **options)
        target = whole(open_image(sample.target_image)) if sample.target_image else None
    ids, labels, roles = (torch.tensor(values) for values in (tokens.ids, tokens.labels, tokens.roles))
    return SeedXInputs(ids, labels, roles, read.centres if read else None, read.pixels if read else None, target)


def _grids(sample: Sample) -> Sequence[tuple[int, int]]:
    return GRIDS if sample.tiled and not sample.target_image else WHOLE


def check_length(tokenizer: Tokenizer, sample: Sample, **options: Any) -> None:
    """Raises UserError as `conversation.conversation` for a sample that is too long. options: as there."""
    conversation.conversation(tokenizer, conversation.longest(tokenizer, sample), _view_count(sample), **options)


def length(tokenizer: Tokenizer, sample: Sample, end_every_turn: bool) -> int:
    """Tokens of a sample that is not truncated. end_every_turn: see `conversation.conversation`."""
    most = conversation.longest(tokenizer, sample)
    return len(conversation.untruncated(tokenizer, most, _view_count(sample), end_every_turn)[0])


def _view_count(sample: Sample) -> int:
    """Number of views of the image that is read, found without decoding it."""
    if not sample.image:
        return 0
    columns, rows = best_grid(*image_size(sample.image), _grids(sample))
    return columns * rows + 1


def encode(vit: VisualEncoder, prepared: Sequence[SeedXInputs]) -> list[SeedXInputs]:
    """Prepared samples with features in place of pixels; the views of all samples are encoded together."""
    read = [item.features for item in prepared if item.features is not None]
    written = [item.target[None] for item in prepared if item.target is not None]
    if not read + written:
        return list(prepared)
    features = vit.features(torch.cat(read + written)).split([len(views) for views in read + written])
    reads, targets = iter(features[: len(read)]), iter(features[len(read) :])
    return [
        replace(
            item,
            features=None if item.features is None else next(reads),
            target=None if item.target is None else pooled(next(targets))[0],
        )
        for item in prepared
    ]


def padded(items: Sequence[SeedXInputs], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and roles, (B, L) each, padded on the right."""

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, True, value).to(device)

    ids, labels = pad([item.ids for item in items], PAD), pad([item.labels for item in items], IGNORED)
    return ids, labels, pad([item.roles for item in items], TEXT_READ)
