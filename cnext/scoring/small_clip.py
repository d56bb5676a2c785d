"""CLIP in plain torch, for the small one that scores the embedded suite: open_clip's names, initial values and numbers.

Of open_clip it has a vision transformer and a text transformer with exact GELUs, pooled at the class token and at the
end of text. All else, OpenAI's weights included, is loaded by open_clip: see ``clip_weights``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image


class Block(nn.Module):
    """Attention and MLP, each after a norm and beside a residual connection."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        parts = {"c_fc": nn.Linear(width, inner), "gelu": nn.GELU(), "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.Sequential(OrderedDict(parts))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after another."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, mlp_ratio) for _ in range(layers)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    """Images (N, 3, size, size) to embeddings (N, D)."""

    def __init__(
        self,
        embed_dim: int,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        head_width: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        scale, positions = width**-0.5, (image_size // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // head_width, mlp_ratio)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(len(images), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x))[:, 0] @ self.proj


class SmallClip(nn.Module):
    """A CLIP with random weights, sized by open_clip's model configuration. ids of texts: the largest ends a text."""

    def __init__(self, config: Mapping[str, Any], vocabulary: int) -> None:
        super().__init__()
        text = config["text_cfg"]
        width, layers = text["width"], text["layers"]
        self.visual = Vision(config["embed_dim"], **config["vision_cfg"])
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.transformer = Transformer(width, layers, text["heads"])
        self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))
        mask = torch.full((text["context_length"],) * 2, -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            attention, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
            nn.init.normal_(attention.get_parameter("in_proj_weight"), std=width**-0.5)
            nn.init.normal_(attention.get_parameter("out_proj.weight"), std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(mlp.get_parameter("c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(mlp.get_parameter("c_proj.weight"), std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of images as `transform` gives them."""
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embeddings (N, D) of texts, (N, context_length) int64."""
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, self.get_buffer("attn_mask"))
        x = self.ln_final(x)
        return x[torch.arange(len(x), device=x.device), ids.argmax(-1)] @ self.text_projection


def transform(size: int) -> Callable[[Image], Tensor]:
    """What prepares an image, as open_clip does: the shorter side resized, the center, (3, size, size) in [-1, 1]."""

    def prepare(image: Image) -> Tensor:
        import numpy
        from PIL.Image import Resampling

        width, height = image.size
        shorter = min(width, height)
        if shorter != size:
            image = image.resize((int(size * width / shorter), int(size * height / shorter)), Resampling.BICUBIC)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size)).convert("RGB")
        pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub(0.5).div(0.5)

    return prepare
