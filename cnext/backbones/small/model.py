"""The embedded backbone of 3 million parameters, for `next-real`: `cnext.backbones.tiny` in another size.

Its images are 96 x 96 pixels, in 36 features. Its weights are stored in 8 bits, which keeps the package small: each row
of a matrix as int8 and a float16 scale, as `packed` makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from cnext import records
from cnext.backbones.small.vision import SIZES, Detokenizer, VisualEncoder
from cnext.backbones.tiny.model import TinyBackbone
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.backbones.tiny.vision import Sizes

FOLDER = Path(__file__).parent
SCALE = ".scale"


def packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of two or more dimensions, (N, ...), as int8 with a scale of each row, (N,) float16; others in float16.

    Returns: ``name`` and ``name.scale``, with tensor = int8 * scale.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.dim() < 2:
            found[name] = tensor.half()
            continue
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-7).half()
        found[name] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
        found[name + SCALE] = scale
    return found


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`, up to its rounding, in float32; tensors without a scale as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (scale := tensors.get(name + SCALE)) is not None:
            found[name] = tensor.float() * scale.float().view(-1, *[1] * (tensor.dim() - 1))
        elif not name.endswith(SCALE):
            found[name] = tensor.float()
    return found


class SmallBackbone(TinyBackbone):
    """3 M parameters, embedded, for next-real: pictures of 96 x 96 pixels; learns six tasks on a CPU in minutes."""

    name: ClassVar[str] = "small"
    picture_tokens: ClassVar[tuple[int, int]] = (SIZES.tokens + 2, SIZES.tokens + 1)
    sizes: ClassVar[Sizes] = SIZES
    own_weights: ClassVar[Path] = FOLDER / "weights.safetensors"
    pretraining: ClassVar[str] = "bench/pretrain_small.py"

    @classmethod
    def new_tokenizer(cls) -> TinyTokenizer:
        return TinyTokenizer(tuple(records.read(FOLDER / "vocabulary.json", list[str], "pretrain the backbone again")))

    @classmethod
    def new_vision(cls) -> tuple[nn.Module, nn.Module]:
        return VisualEncoder(), Detokenizer()

    @classmethod
    def stored(cls, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return unpacked(tensors)
