"""Reference outputs by transformers' own classes for one sequence, without padding and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from backbones.small_folders import CODES
from PIL import Image
from torch import Tensor

from cnext.backbones.coded import CodedBackbone
from cnext.backbones.sampling import CodeSampling
from cnext.tasks.base import Sample

SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)


def pixels(backbone: CodedBackbone, path: Path | None) -> Tensor | None:
    """(1, 3, H, W) by the image processor alone."""
    if path is None:
        return None
    with Image.open(path) as image:
        return backbone.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]


def prompt(backbone: CodedBackbone, sample: Sample) -> list[int]:
    """Ids of a sample's first instruction, tokenized as one string, as the released processors make it."""
    text = sample.turns[0].instruction
    if backbone.name == "janus":
        picture = f"<begin_of_image>{'<image_placeholder>' * 16}<end_of_image>" if sample.image else ""
        middle = "\n".join([picture, text] if sample.image_first else [text, picture]) if picture else text
        user, assistant = ("<|User|>", "<|Assistant|>") if backbone.pro else ("User", "Assistant")
        return backbone.tokenizer.encode(f"{SYSTEM if picture else ''}{user}: {middle}\n\n{assistant}:")
    if sample.draws and not sample.image:
        caption = text.removeprefix("Generate an image: ").removeprefix("Please generate the image:").strip()
        return backbone.tokenizer.encode(f"<s>{caption}")
    picture = ""
    if sample.image:
        rows, columns = (size // 8 for size in pixels(backbone, sample.image).shape[-2:])
        slots = "<image>" * (rows * (columns + 1))
        picture = f"<|image start|>{rows}*{columns}<|image token|>{slots}<|extra_201|><|image end|>"
    middle = picture + text if sample.image_first else text + picture
    return backbone.tokenizer.encode(f"<s>You are a helpful assistant. USER: {middle}. ASSISTANT:")


ROW_END = -1
"""Stands for the token after a row of codes, where the model has one."""


def tokens(backbone: CodedBackbone, codes: Sequence[int]) -> list[int]:
    """Codes of Emu3 as tokens."""
    first, end = backbone.tokenizer.convert_tokens_to_ids(["<|visual token 000000|>", "<|extra_200|>"])
    return [end if code == ROW_END else first + code for code in codes]


def step(
    backbone: CodedBackbone, ids: Sequence[int], read: Tensor | None, codes: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Logits of the next token, and of the next code, after ids and the codes behind them."""
    model = backbone.model
    if backbone.name == "emu3":
        seen = {} if read is None else {"pixel_values": read, "image_sizes": torch.tensor([read.shape[-2:]])}
        # The outer class of old versions leaves the picture out.
        hidden = model.model(input_ids=torch.tensor([[*ids, *tokens(backbone, codes)]]), **seen).last_hidden_state
        logits = model.lm_head(hidden[0, -1])
        first = tokens(backbone, [0])[0]
        return logits, logits[first : first + CODES]
    inputs = model.get_input_embeddings()(torch.tensor([ids]))
    if read is not None:
        features = model.model.get_image_features(read.to(inputs.dtype))
        features = getattr(features, "pooler_output", features).to(inputs.dtype)
        slots = torch.tensor([ids]) == model.config.image_token_id
        inputs = inputs.masked_scatter(slots[..., None], features)
    if codes:
        behind = model.prepare_embeddings_for_image_generation(torch.tensor([codes]))
        inputs = torch.cat([inputs, behind], 1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0, -1]
    return model.lm_head(hidden), model.model.generation_head(hidden)


class Followed:
    """In place of a backbone's sampling of one image: chooses given codes and keeps the logits that it is shown."""

    def __init__(self, codes: Sequence[int]) -> None:
        self.codes, self.seen = codes, []

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        self.seen.append(logits[0])
        return torch.tensor([self.codes[len(self.seen) - 1]])


COUNT = 5_000


def shares(sampling: CodeSampling, row: Tensor) -> Tensor:
    """How often each code is chosen by ``COUNT`` numbers that fill [0, 1) evenly, float64."""
    numbers = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    chosen = sampling.choose(row.expand(COUNT, -1), numbers)
    return torch.bincount(chosen, minlength=len(row)).double() / COUNT
