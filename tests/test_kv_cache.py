"""The cache argument of transformers under both its names: generation and prompts work with either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaModel

from cnext.adapters.prompts import Prompts
from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import UserError
from cnext.kv_cache import NAMES, cache_argument, given_cache
from cnext.tasks import formats, suites


def decoder_with(name: str) -> type[LlamaModel]:
    """LlamaModel as a version of transformers has it that calls the argument so, and drops what it does not know."""
    own = cache_argument(LlamaModel.__new__(LlamaModel))

    def call(self: Any, inputs_embeds: Any, attention_mask: Any, position_ids: Any, use_cache: Any, cache: Any) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, own: cache}
        return LlamaModel.forward(self, inputs_embeds=inputs_embeds, **given)

    if name == "cache":

        def forward(self, inputs_embeds, attention_mask=None, position_ids=None, use_cache=None, cache=None, **rest):
            return call(self, inputs_embeds, attention_mask, position_ids, use_cache, cache)
    else:

        def forward(
            self, inputs_embeds, attention_mask=None, position_ids=None, use_cache=None, past_key_values=None, **rest
        ):
            return call(self, inputs_embeds, attention_mask, position_ids, use_cache, past_key_values)

    return type("LlamaModel", (LlamaModel,), {"forward": forward})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompted", [False, True], ids=["plain", "prompts"])
def test_answers_are_the_same_under_either_name(tiny: TinyBackbone, data: Path, name: str, prompted: bool) -> None:
    suite = suites.load("next-tiny")
    samples = [s for task in ("VQAv2", "RefCOCO") for s in formats.read_samples(suite.task(task), data, "test")[:3]]
    tiny.decoder = tiny.outer_model()
    prompts = Prompts(tiny.language_model, 20_000, 5, 2, 3.0, torch.Generator().manual_seed(0))
    prompts.chosen = torch.tensor([[3, 17]]) if prompted else None
    expected = [answer.text for answer in tiny.generate(samples, 20)]
    assert max(map(len, expected)) > 4, "several positions are fed one by one"
    tiny.decoder.model.__class__ = decoder_with(name)
    assert cache_argument(tiny.language_model) == name
    assert [answer.text for answer in tiny.generate(samples, 20)] == expected


def test_a_decoder_without_a_cache_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear\.forward takes no key-value cache.*got input"):
        cache_argument(nn.Linear(1, 1))


def test_a_given_cache_is_found_under_either_name() -> None:
    cache = object()
    assert [given_cache({name: cache}) for name in NAMES] == [cache, cache]
    assert given_cache({"cache": None, "past_key_values": cache}) is cache
    assert given_cache({"use_cache": True}) is None
