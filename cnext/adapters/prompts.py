"""Soft prompts: a pool of trained prompts with keys, some of which are prepended to each row's input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.adapters.attach import trained_like
from cnext.errors import UserError
from cnext.kv_cache import given_cache


class Prompts(nn.Module):
    """A pool of prompts for a decoder, each with a key by which questions select it.

    Hooks on the decoder prepend the selected prompts and remove their positions from what it returns. It is called with
    ``inputs_embeds`` or ``input_ids`` and optionally ``attention_mask`` (rows, cached and new positions, or as
    `_with_prompts` says), ``position_ids`` (..., rows, new positions), which do not count the prompts, and a key-value
    cache, to which prompts are added once, while it is empty.

    Args:
        model: a transformers decoder.
        budget: number of parameters that prompts and keys may have together.
        length: vectors of a prompt.
        count: prompts selected for a question.
        scale: prompts are scale times their parameters: with Adam, as scale times the learning rate.
        generator: source of initial values, on the CPU. Prompts have the standard deviation of the embeddings.

    Raises:
        UserError: a budget too small for ``count`` prompts.
    """

    def __init__(
        self, model: Any, budget: int, length: int, count: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        embeddings = model.get_input_embeddings().weight
        width = embeddings.shape[1]
        size = budget // ((length + 1) * width)
        if size < count:
            raise UserError(
                f"{budget:,} parameters are {size} prompts of {length} vectors, fewer than the {count} to select"
            )
        values = trained_like(torch.randn(size, length + 1, width, generator=generator), embeddings)
        self.prompts = nn.Parameter(values[:, 1:] * (embeddings.std() / scale))
        self.keys = nn.Parameter(values[:, 0] * width**-0.5)
        self.count, self.scale = count, scale
        self.chosen: Tensor | None = None
        self._new = 0
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave)

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the prompts with the largest cosines of key and features, (N, count) int64, sorted by index; and
        these cosines, (N, count), sorted by value. features: (N, width)."""
        cosines = F.normalize(features.to(self.keys.dtype), dim=1) @ F.normalize(self.keys, dim=1).T
        largest, chosen = cosines.topk(self.count)
        return chosen.sort().values, largest

    @contextmanager
    def before(self, chosen: Tensor) -> Iterator[None]:
        """Context in which these prompts are prepended: (rows, count) int64, or (1, count) for all rows."""
        self.chosen = chosen
        try:
            yield
        finally:
            self.chosen = None

    def _enter(self, model: Any, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.chosen is None:
            return None
        if args:  # GPT-2's head passes the ids by position
            args, given = (), dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | given
        cache, changed = given_cache(given), dict(given)
        inputs = changed.get("inputs_embeds")
        if inputs is None:
            inputs = changed["inputs_embeds"] = model.get_input_embeddings()(changed.pop("input_ids"))
        rows, self._new = inputs.shape[:2]
        prompts = (self.scale * self.prompts[self.chosen]).flatten(1, 2).to(inputs.dtype).expand(rows, -1, -1)
        count, first = prompts.shape[1], cache is None or not cache.get_seq_length()
        if first:
            changed["inputs_embeds"] = torch.cat([prompts, inputs], 1)
        changed["attention_mask"] = _with_prompts(given.get("attention_mask"), rows, count, first)
        if (positions := given.get("position_ids")) is not None:
            moved, ahead = positions + count, torch.arange(count, device=positions.device)
            before = ahead.expand(*positions.shape[:-1], -1)
            changed["position_ids"] = torch.cat([before, moved], -1) if first else moved
        if (places := given.get("cache_position")) is not None:
            ahead = torch.arange(count, device=places.device)
            changed["cache_position"] = torch.cat([ahead, places + count]) if first else places + count
        if first and (images := given.get("visual_pos_masks")) is not None:  # of Qwen3-VL: where images are
            changed["visual_pos_masks"] = torch.cat([images.new_zeros(rows, count), images], 1)
        return args, changed

    def _leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        if self.chosen is not None:
            output.last_hidden_state = output.last_hidden_state[:, -self._new :]


def _with_prompts(mask: Any, rows: int, count: int, first: bool) -> Any:
    """An attention mask with columns, and in a first pass rows, for prompts, each of which sees those before it.

    mask: (rows, positions) of ones and zeros; (rows, 1, queries, positions) of bool, or of float to be added; a
        dictionary of these by type of layer; or None, causal.
    """
    if mask is None:
        return None
    if isinstance(mask, dict):
        return {kind: _with_prompts(one, rows, count, first) for kind, one in mask.items()}
    if not isinstance(mask, Tensor):
        raise UserError(
            f"prompts cannot be put before an attention mask of class {type(mask).__name__}: expected a tensor; load "
            "the model with attn_implementation='sdpa'"
        )
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(rows, count), mask], 1)
    if not first:
        raise UserError(
            "prompts cannot be put before an attention mask that was made with a cache; generate with use_cache=False"
        )
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    queries, positions = mask.shape[-2:]
    wide = mask.new_full((*mask.shape[:2], count + queries, count + positions), hidden)
    wide[..., count:, :count], wide[..., count:, count:] = seen, mask
    wide[..., :count, :count].masked_fill_(torch.ones_like(wide[..., :count, :count], dtype=torch.bool).tril(), seen)
    return wide


def prompted(model: nn.Module) -> bool:
    """Whether prompts are put before a decoder's inputs at present."""
    hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return any(isinstance(one, Prompts) and one.chosen is not None for one in hooks)
