"""One sample at a time through SEED-X, without padding or cache: what batches are compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cnext.backbones.seed_x.encoding import SeedXInputs
from cnext.backbones.seed_x.model import SeedX
from cnext.tasks.base import Sample, Turn

TASKS = ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "RefCOCO", "HQEdit")


def embedded(model: SeedX, item: SeedXInputs) -> Tensor:
    """(L, hidden): one sample's embeddings, token by token, each view's in the place of its tokens."""
    rows = [model.llm.model.embed_tokens.weight[index] for index in item.ids]
    if item.centres is not None:
        read = []
        for number, (x, y) in enumerate(item.centres.tolist()):
            view = item.features[number if len(item.features) > 1 else 0]
            place = torch.tensor([x, y, 1 - x, 1 - y]) / 2
            read += [*(model.input_resampler(view[None])[0] + place @ model.patch_pos_embed)]
        slots = [place for place, index in enumerate(item.ids.tolist()) if index in model.tokenizer.slots]
        for place, row in zip(slots, read, strict=False):
            rows[place] = row
    return torch.stack(rows)


def hidden_of(model: SeedX, item: SeedXInputs) -> Tensor:
    return model.llm.model(inputs_embeds=embedded(model, item)[None]).last_hidden_state[0]


def asked(sample: Sample) -> Sample:
    return replace(sample, id="", turns=(Turn(sample.turns[0].instruction),), target_image=None)
