"""Greedy answers of SEED-X, in which an image, once begun, is completed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cnext.backbones.conversation import IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.decoding import Decoder, greedy, pad_left
from cnext.backbones.seed_x.sizes import TOKENS
from cnext.backbones.seed_x.tokenizer import PAD, Tokenizer


class Answer(NamedTuple):
    """ids: up to </s>, or without it where most tokens were reached.  states: (64, hidden) last hidden states of the
    first image's tokens, or None."""

    ids: list[int]
    states: Tensor | None


def padded_prompts(
    ids: Sequence[Tensor], roles: Sequence[Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and roles of prompts, (B, L) each, padded on the left."""
    mask = pad_left([torch.ones_like(row) for row in ids], 0, device)
    return pad_left(ids, PAD, device), mask, pad_left(roles, TEXT_READ, device)


def generate(
    model: Decoder, tokenizer: Tokenizer, inputs: Tensor, mask: Tensor, roles: Tensor, max_new_tokens: int
) -> list[Answer]:
    """Greedy answers up to </s>. What follows ``<img>`` is forced: 64 image tokens and ``</img>``, which are banned
    elsewhere.

    The released code sets the logits of banned tokens to 0 and not to -inf: the same wherever the largest logit is
    positive.

    Args:
        model: its ``banned_ids`` are the tokens of an image after ``<img>``.
        inputs: (B, L, hidden) embeddings of the prompts.  mask, roles: (B, L), see `padded_prompts`.
    """
    device = model.device
    image = torch.tensor(tokenizer.picture(1), device=device)
    follows = torch.full((len(tokenizer),), -1, device=device)
    follows[image[:-1]] = image[1:]
    position_of = torch.full((len(tokenizer),), TEXT_WRITTEN, device=device)
    position_of[tokenizer.slots] = IMAGE_WRITTEN
    states: list[Tensor] = []
    rows = greedy(
        model,
        inputs,
        mask,
        roles,
        max_new_tokens,
        follows=follows,
        position_of=lambda chosen: position_of[chosen],
        states=states,
    )
    end_of_image = tokenizer["</img>"]
    return [Answer(row, _image_states(row, number, states, end_of_image)) for number, row in enumerate(rows)]


def _image_states(ids: list[int], row: int, states: Sequence[Tensor], end_of_image: int) -> Tensor | None:
    """(64, hidden): the states after each token before the first ``</img>``, one step after each was chosen."""
    if end_of_image not in ids:
        return None
    index = ids.index(end_of_image)
    return torch.stack([states[step][row] for step in range(index - TOKENS + 1, index + 1)])
