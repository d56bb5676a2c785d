"""Greedy text and greedy codes, one position at a time with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnext.backbones.conversation import IMAGE_WRITTEN, TEXT_WRITTEN, Encoded

if TYPE_CHECKING:
    from cnext.backbones.coded import CodedBackbone


class Decoding:
    """Sequences under way. ``last``: (B, hidden), the last hidden state of each."""

    def __init__(self, backbone: CodedBackbone, begun: Sequence[Encoded]) -> None:
        from transformers import DynamicCache

        self.backbone = backbone
        config: Any = backbone.language_model.config
        self._cache = DynamicCache(config=config)
        # Padding on the left, so that all sequences go on at the same place.
        ids, _, codes, positions, self._mask = backbone.padded(begun, "left")
        reads = [item.read for item in begun if item.read is not None]
        self.last = self._pass(backbone.embed(ids, codes, reads), positions)

    def feed(self, inputs: Tensor, role: int) -> None:
        """Goes on by one position. inputs: (B, hidden) embeddings.  role: what the position is for."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(inputs), 1)], 1)
        self.last = self._pass(inputs[:, None], self._mask.new_full((len(inputs), 1), role))

    def _pass(self, inputs: Tensor, positions: Tensor) -> Tensor:
        backbone = self.backbone
        backbone.positions = positions
        hidden = backbone.language_model(
            inputs_embeds=inputs,
            attention_mask=self._mask,
            position_ids=(self._mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[:, -1].to(backbone.device)


def write(backbone: CodedBackbone, questions: Sequence[Encoded], max_new_tokens: int) -> list[list[int]]:
    """The likeliest token after another, until the end token (dropped) or the one that begins a picture (kept)."""
    decoding, device = Decoding(backbone, questions), backbone.device
    stops = torch.tensor([backbone.eos, backbone.begin[0]], device=device)
    never = torch.tensor(backbone.never, device=device)
    finished = torch.zeros(len(questions), dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    while len(columns) < max_new_tokens:
        logits = backbone.model.lm_head(decoding.last).to(device).index_fill(1, never, -torch.inf)
        chosen = logits.argmax(-1).masked_fill(finished, backbone.pad)
        columns.append(chosen)
        finished |= torch.isin(chosen, stops)
        if finished.all() or len(columns) == max_new_tokens:
            break
        decoding.feed(backbone.embed_tokens(chosen), TEXT_WRITTEN)
    unwanted = (backbone.eos, backbone.pad)
    return [[index for index in row if index not in unwanted] for row in torch.stack(columns, 1).tolist()]


def draw(backbone: CodedBackbone, begun: Sequence[Encoded]) -> Tensor:
    """The likeliest code after another of each picture begun, (N, tokens) int64, with guidance where it is above 1."""
    guided = backbone.guidance > 1
    decoding = Decoding(backbone, [*begun, *map(backbone.without_instruction, begun)] if guided else begun)
    codes: list[Tensor] = []
    while True:
        logits = backbone.code_logits(decoding.last).to(backbone.device).float()
        if guided:
            given, blank = logits.chunk(2)
            logits = blank + backbone.guidance * (given - blank)
        codes.append(logits.argmax(-1))
        if len(codes) == backbone.tokens:
            return torch.stack(codes, 1)
        fed = codes[-1].repeat(2) if guided else codes[-1]
        decoding.feed(backbone.code_embeddings(fed), IMAGE_WRITTEN)
        if backbone.row_end is not None and len(codes) % backbone.grid[1] == 0:
            decoding.feed(backbone.embed_tokens(torch.full_like(fed, backbone.row_end)), IMAGE_WRITTEN)
