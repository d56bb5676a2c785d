"""SEED-X's greedy answers: a picture, once begun, is written to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnext.backbones.conversation import IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.decoding import Decoding, greedy
from cnext.backbones.seed_x.sizes import TOKENS
from cnext.backbones.seed_x.tokenizer import END, PAD, Tokenizer

if TYPE_CHECKING:
    from cnext.backbones.seed_x.model import Encoded, SeedX


@dataclass(frozen=True)
class Written:
    """An answer. ids: up to </s>, which is not in it.  states: (64, hidden) of its first picture's tokens, or None."""

    ids: list[int]
    states: Tensor | None


def successors(tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """(vocabulary,) int64: what must follow a token, ``<img>``, 64 tokens, ``</img>``; -1 where nothing must."""
    chain = torch.tensor(tokenizer.picture(1), device=device)
    table = torch.full((len(tokenizer),), -1, device=device)
    table[chain[:-1]] = chain[1:]
    return table


def generate(model: SeedX, asked: Sequence[Encoded], max_new_tokens: int) -> list[Written]:
    """Greedy answers up to </s>. What follows ``<img>`` is forced, and only that may be it.

    The released code sets the logits of tokens that may not be to 0 and not to -inf: the same wherever the largest
    logit is positive.
    """
    tokenizer, device = model.tokenizer, model.device
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([item.ids for item in asked], True, PAD, "left").to(device)
    roles = pad([item.roles for item in asked], True, TEXT_READ, "left").to(device)
    mask = pad([torch.ones_like(item.ids) for item in asked], True, 0, "left").to(device)
    follows = successors(tokenizer, device)
    slots = torch.zeros(len(tokenizer), dtype=torch.bool, device=device)
    slots[tokenizer.slots] = True
    states: list[Tensor] = []
    rows = greedy(
        Decoding(model, model.inputs(ids, roles, asked), mask, roles),
        model.llm.lm_head,
        model.llm.model.embed_tokens,
        stops=[END],
        never=follows[follows >= 0],
        pad=PAD,
        max_new_tokens=max_new_tokens,
        follows=follows,
        position_of=lambda chosen: torch.where(slots[chosen], IMAGE_WRITTEN, TEXT_WRITTEN),
        states=states,
    )
    return [
        Written([index for index in row if index != END], _first_picture(tokenizer, row, number, states))
        for number, row in enumerate(rows)
    ]


def _first_picture(tokenizer: Tokenizer, ids: list[int], row: int, states: Sequence[Tensor]) -> Tensor | None:
    """(64, hidden): the states when the tokens before the first ``</img>`` were fed, a step after each was chosen."""
    end = tokenizer["</img>"]
    if end not in ids:
        return None
    place = ids.index(end)
    return torch.stack([states[step][row] for step in range(place - TOKENS + 1, place + 1)])
