"""How the codes of an image are chosen: sampled from their distribution by a seed of the image, or the most likely."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnext.errors import UserError
from cnext.tasks.base import Sample


@dataclass(frozen=True)
class CodeSampling:
    """p = softmax(logits / temperature) over the ``top_k`` most likely codes.

    sample: a code is drawn from p; False: it is the most likely one, and the rest has no effect.
    temperature: positive.  top_k: 0 for all codes; codes as likely as the last one are kept, as in transformers.

    Raises:
        UserError: a temperature or a ``top_k`` out of range.

    Example:
        >>> sampling = CodeSampling(temperature=1.0, top_k=2048)
        >>> codes = sampling.choose(logits, uniform([0, 1], 16)[:, 0])  # logits: (2, codes)
    """

    sample: bool = True
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature must be positive and finite, got {self.temperature}; sample=false takes the most likely "
                "code"
            )
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0, got {self.top_k}; 0 keeps all codes")

    def choose(self, logits: Tensor, numbers: Tensor) -> Tensor:
        """Chooses one code each.

        Args:
            logits: (N, codes) float.
            numbers: (N,) float64 from `uniform`: the code is the first whose cumulative probability is above.

        Returns:
            (N,) int64.
        """
        if not self.sample:
            return logits.argmax(-1)
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        cumulative = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        # The last sum is 1 but for rounding; a number below it never falls on a code of probability 0.
        return torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)[:, 0]


def image_seed(seed: int, sample: Sample) -> int:
    """Seed of the image written for a sample: of the run's seed, its first instruction and the name of its image."""
    parts = [str(seed), sample.turns[0].instruction, sample.image.name if sample.image else ""]
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), (N, count) float64: each row from its own seed, on a CPU, so whatever the other rows are."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows).clamp(max=1 - 2**-50)
