"""Greedy text generation with a key-value cache, for every backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cnext.backbones.conversation import TEXT_WRITTEN
from cnext.kv_cache import cache_argument


class Decoder(Protocol):
    """A language model with its head, as every `Backbone` here is one.

    language_model: a decoder of transformers, or one that is called so and has ``new_cache``.
    lm_head: hidden states (N, hidden) to logits (N, vocabulary).
    positions: see `Backbone.positions`; set before each pass.
    stop_ids: tokens that end an answer.  banned_ids: tokens that are never generated.  pad_id: the padding token.
    """

    positions: Any

    @property
    def language_model(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def lm_head(self) -> Any: ...
    @property
    def stop_ids(self) -> Sequence[int]: ...
    @property
    def banned_ids(self) -> Sequence[int]: ...
    @property
    def pad_id(self) -> int: ...


def pad_left(rows: Sequence[Tensor], value: int, device: torch.device) -> Tensor:
    """(B, L) of B tensors of up to L elements, with ``value`` on the left of the shorter ones."""
    return pad_sequence(list(rows), True, value, "left").to(device)


class CachedDecoding:
    """A batch of sequences under generation and their key-value cache.

    Sequences are padded on the left, so that all continue at the same index. ``last``: (B, hidden), the last hidden
    state of each.

    Args:
        model: its ``language_model`` computes each pass; ``positions`` is set before.
        inputs: (B, L, hidden) embeddings of the prompts.
        mask: (B, L) int64, 0 at padding and 1 elsewhere.
        positions: (B, L) int64, see `Backbone.positions`.
    """

    def __init__(self, model: Decoder, inputs: Tensor, mask: Tensor, positions: Tensor) -> None:
        self.model = model
        cache = _new_cache(model.language_model)
        self._cache = {cache_argument(model.language_model): cache}
        self._mask = mask
        self.last = self._pass(inputs, positions)

    def append(self, inputs: Tensor, positions: Tensor | int) -> None:
        """Appends one position to each sequence. inputs: (B, hidden) embeddings.  positions: (B,), or one for all."""
        new = self._mask.new_ones(len(inputs), 1)
        self._mask = torch.cat([self._mask, new], 1)
        roles = positions[:, None] if isinstance(positions, Tensor) else new * positions
        self.last = self._pass(inputs[:, None], roles)

    def _pass(self, inputs: Tensor, positions: Tensor) -> Tensor:
        self.model.positions = positions
        hidden = self.model.language_model(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            use_cache=True,
            **self._cache,
        ).last_hidden_state
        return hidden[:, -1].to(self.model.device)


def _new_cache(decoder: Any) -> Any:
    """An empty key-value cache of a decoder: its own kind where it has one, else that of transformers."""
    if hasattr(decoder, "new_cache"):
        return decoder.new_cache()
    from transformers import DynamicCache

    return DynamicCache(config=decoder.config)


def greedy(
    model: Decoder,
    inputs: Tensor,
    mask: Tensor,
    positions: Tensor,
    max_new_tokens: int,
    *,
    follows: Tensor | None = None,
    position_of: Callable[[Tensor], Tensor] | None = None,
    states: list[Tensor] | None = None,
) -> list[list[int]]:
    """Generates the most likely token after another, up to the first of ``model.stop_ids`` or ``max_new_tokens``.

    token_t = follows[token_(t-1)] where that is not -1, else argmax over all but ``banned_ids`` of lm_head(h_(t-1))

    Args:
        model: the language model.
        inputs, mask, positions: the prompts, padded on the left: see `CachedDecoding`.
        max_new_tokens: most tokens that a sequence gets.
        follows: (vocabulary,) int64, the token that must come after each, -1 where any may.
        position_of: token ids, (B,), to their `Backbone.positions`. Default: text written.
        states: list to which the hidden states, (B, hidden), are appended that each column of tokens was chosen from.

    Returns:
        The ids of each sequence, the one of ``stop_ids`` included where it came to that.
    """
    decoding, device = CachedDecoding(model, inputs, mask, positions), model.device
    embed_tokens: Any = model.language_model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    stops, banned = torch.tensor(model.stop_ids, device=device), torch.tensor(model.banned_ids, device=device)
    columns: list[Tensor] = []
    finished = torch.zeros(len(decoding.last), dtype=torch.bool, device=device)
    while len(columns) < max_new_tokens:
        if states is not None:
            states.append(decoding.last)
        chosen = model.lm_head(decoding.last).to(device).index_fill(1, banned, -torch.inf).argmax(-1)
        if follows is not None and columns:
            following = follows[columns[-1]]
            chosen = torch.where(following >= 0, following, chosen)
        columns.append(chosen.masked_fill(finished, model.pad_id))
        finished = finished | torch.isin(columns[-1], stops)
        if finished.all() or len(columns) == max_new_tokens:
            break
        decoding.append(embed_tokens(columns[-1]), TEXT_WRITTEN if position_of is None else position_of(columns[-1]))
    rows = torch.stack(columns, 1).tolist() if columns else [[] for _ in finished]
    return [_truncated(row, set(model.stop_ids)) for row in rows]


def _truncated(ids: list[int], stops: set[int]) -> list[int]:
    return next((ids[: index + 1] for index, token in enumerate(ids) if token in stops), ids)
