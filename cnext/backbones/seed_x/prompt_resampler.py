"""Resampler of the de-tokenizer: visual features to prompt embeddings of SDXL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.errors import UserError

HEADS = 16


@dataclass(frozen=True)
class PromptSizes:
    """Sizes of a `PromptResampler`.

    queries, width, layers: of its latents.  inner: width of its attention.  hidden: of its feed-forward layers.
    source: width of the features.  first, second: widths of the two halves of a prompt, those of SDXL's text encoders.
    """

    queries: int = 64
    width: int = 1024
    layers: int = 4
    inner: int = 1024
    hidden: int = 4096
    source: int = 4096
    first: int = 768
    second: int = 1280

    @classmethod
    def of(cls, state: Mapping[str, Tensor], source: str) -> PromptSizes:
        """The sizes of a state dict. Raises UserError if it is another model's."""
        names = (
            "latents proj_in.weight layers.0.0.to_q.weight layers.0.1.1.weight unet_proj_1.weight unet_proj_2.weight"
        )
        if missing := [name for name in names.split() if name not in state]:
            raise UserError(f"{source}: expected resampler.{', resampler.'.join(missing)}; found none of that name")
        latents, taken, inner, hidden, first, second = (state[name].shape for name in names.split())
        layers = {match[1] for name in state if (match := re.match(r"layers\.(\d+)\.", name))}
        return cls(latents[1], latents[2], len(layers), inner[0], hidden[0], taken[1], first[0], second[0])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-head attention with `HEADS` heads of q, k and v, (N, n, width) each."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Perceiver(nn.Module):
    """Perceiver attention: latents attend to features and to themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], 1)).chunk(2, -1)
        return self.to_out(attend(self.to_q(latents), k, v))


class Pool(nn.Module):
    """Attention pooling: the mean of the tokens attends to itself and all tokens."""

    def __init__(self, tokens: int, width: int, output: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.zeros(tokens + 1, width))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        return self.c_proj(attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))[:, 0]


class PromptResampler(nn.Module):
    """Features (N, 64, source) to prompts (N, queries, first + second) and pooled prompts (N, second).

    Parameters as in the released de-tokenizers. Reference: SEED-X, arXiv 2404.14396.
    """

    def __init__(self, sizes: PromptSizes) -> None:
        super().__init__()
        width = sizes.width
        self.latents = nn.Parameter(torch.zeros(1, sizes.queries, width))
        self.proj_in = nn.Linear(sizes.source, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Perceiver(width, sizes.inner),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, sizes.hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(sizes.hidden, width, bias=False),
                    ),
                ]
            )
            for _ in range(sizes.layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.unet_proj_1 = nn.Linear(width, sizes.first)
        self.unet_proj_2 = nn.Linear(width, sizes.second)
        self.unet_attnpool = Pool(sizes.queries, width, sizes.second)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        x, latents = self.proj_in(features), self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            attention, feed_forward = layer.children()
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        latents = self.norm_out(latents)
        prompts = torch.cat([self.unet_proj_1(latents), self.unet_proj_2(latents)], -1)
        return prompts, self.unet_attnpool(latents)
