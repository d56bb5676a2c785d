"""Greedy decoding with a key-value cache: the one loop that every backbone writes text and codes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnext.backbones.base import Backbone
from cnext.backbones.conversation import TEXT_WRITTEN
from cnext.kv_cache import cache_argument


class Decoding:
    """Sequences under way, padded on the left so that all go on at the same place.

    ``last``: (B, hidden), the last hidden state of each.

    Args:
        backbone: whose ``language_model`` reads them, and whose ``positions`` are set before each of its passes.
        inputs: (B, L, hidden) embeddings of the prompts.
        mask: (B, L) int64, 1 where a position is no padding.
        positions: (B, L) int64, see `Backbone.positions`.
    """

    def __init__(self, backbone: Backbone, inputs: Tensor, mask: Tensor, positions: Tensor) -> None:
        from transformers import DynamicCache

        self.backbone = backbone
        cache = DynamicCache(config=backbone.language_model.config)  # pyright: ignore[reportArgumentType]
        self._cache = {cache_argument(backbone.language_model): cache}
        self._mask = mask
        self.last = self._pass(inputs, positions)

    def feed(self, inputs: Tensor, positions: Tensor | int) -> None:
        """Goes on by one position. inputs: (B, hidden) embeddings.  positions: (B,), or one for all."""
        new = self._mask.new_ones(len(inputs), 1)
        self._mask = torch.cat([self._mask, new], 1)
        roles = positions[:, None] if isinstance(positions, Tensor) else new * positions
        self.last = self._pass(inputs[:, None], roles)

    def _pass(self, inputs: Tensor, positions: Tensor) -> Tensor:
        self.backbone.positions = positions
        hidden = self.backbone.language_model(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            use_cache=True,
            **self._cache,
        ).last_hidden_state
        return hidden[:, -1].to(self.backbone.device)


def greedy(
    decoding: Decoding,
    head: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    stops: Sequence[int],
    never: Sequence[int] | Tensor,
    pad: int,
    max_new_tokens: int,
    follows: Tensor | None = None,
    position_of: Callable[[Tensor], Tensor] | None = None,
    states: list[Tensor] | None = None,
) -> list[list[int]]:
    """The most likely token after another, up to the first of ``stops`` (kept) or ``max_new_tokens``.

    token_t = follows[token_(t-1)] where that is not -1, else argmax over all but ``never`` of head(h_(t-1))

    Args:
        decoding: the prompts.
        head: (B, hidden) to logits, (B, vocabulary).  embed: token ids, (B,), to input embeddings, (B, hidden).
        stops: ids after which a sequence is finished.  never: ids that are not chosen.
        pad: what is fed after the end of a finished sequence.
        follows: (vocabulary,) int64, the token that must come after each, -1 where any may.
        position_of: token ids, (B,), to what their positions are for (default: text written).
        states: takes the hidden states, (B, hidden), that each column of tokens was chosen from.

    Returns: the ids of each sequence.
    """
    device = decoding.backbone.device
    ends, banned = torch.tensor(stops, device=device), torch.as_tensor(never, device=device)
    columns: list[Tensor] = []
    finished = torch.zeros(len(decoding.last), dtype=torch.bool, device=device)
    while len(columns) < max_new_tokens:
        if states is not None:
            states.append(decoding.last)
        chosen = head(decoding.last).to(device).index_fill(1, banned, -torch.inf).argmax(-1)
        if follows is not None and columns:
            following = follows[columns[-1]]
            chosen = torch.where(following >= 0, following, chosen)
        columns.append(chosen.masked_fill(finished, pad))
        finished = finished | torch.isin(columns[-1], ends)
        if finished.all() or len(columns) == max_new_tokens:
            break
        decoding.feed(embed(columns[-1]), TEXT_WRITTEN if position_of is None else position_of(columns[-1]))
    rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in finished]
    return [_until(row, set(stops)) for row in rows]


def _until(ids: list[int], stops: set[int]) -> list[int]:
    return next((ids[: place + 1] for place, index in enumerate(ids) if index in stops), ids)
