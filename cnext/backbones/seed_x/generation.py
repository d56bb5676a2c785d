"""Greedy answers with a key-value cache; a picture, once begun, is written to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnext.backbones.conversation import IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
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


def greedy(model: SeedX, asked: Sequence[Encoded], max_new_tokens: int) -> list[Written]:
    """The likeliest next token, one at a time, until </s>. What follows ``<img>`` is forced, and only that may be it.

    The released code sets the logits of tokens that may not be to 0 and not to -inf: the same wherever the largest
    logit is positive.
    """
    from transformers import DynamicCache

    tokenizer, device = model.tokenizer, model.device
    longest = max(len(item.ids) for item in asked)

    def left(values: Tensor, padding: int) -> Tensor:
        return torch.nn.functional.pad(values, (longest - len(values), 0), value=padding)

    ids = torch.stack([left(item.ids, PAD) for item in asked]).to(device)
    roles = torch.stack([left(item.roles, TEXT_READ) for item in asked]).to(device)
    mask = torch.stack([left(torch.ones_like(item.ids), 0) for item in asked]).to(device)
    follows = successors(tokenizer, device)
    forced = follows[follows >= 0]
    slots = torch.zeros(len(tokenizer), dtype=torch.bool, device=device)
    slots[tokenizer.slots] = True
    inputs, cache = model.inputs(ids, roles, asked), DynamicCache(config=model.llm.config)
    finished = torch.zeros(len(asked), dtype=torch.bool, device=device)
    written: list[Tensor] = []
    states: list[Tensor] = []
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        states.append(
            model.llm.model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
        )
        chosen = model.llm.lm_head(states[-1]).index_fill(1, forced, -torch.inf).argmax(-1)
        if written:
            following = follows[written[-1]]
            chosen = torch.where(following >= 0, following, chosen)
        chosen = chosen.masked_fill(finished, PAD)
        written.append(chosen)
        finished = finished | (chosen == END)
        if finished.all():
            break
        inputs = model.llm.model.embed_tokens(chosen)[:, None]
        model.positions = torch.where(slots[chosen], IMAGE_WRITTEN, TEXT_WRITTEN)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(asked), 1)], 1)
    rows = torch.stack(written, 1).tolist()
    return [Written(_until_end(row), _first_picture(tokenizer, row, number, states)) for number, row in enumerate(rows)]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END)] if END in ids else ids


def _first_picture(tokenizer: Tokenizer, ids: list[int], row: int, states: Sequence[Tensor]) -> Tensor | None:
    """(64, hidden): the states when the tokens before the first ``</img>`` were fed, a step after each was chosen."""
    end = tokenizer["</img>"]
    if end not in ids:
        return None
    place = ids.index(end)
    return torch.stack([states[step][row] for step in range(place - TOKENS + 1, place + 1)])
