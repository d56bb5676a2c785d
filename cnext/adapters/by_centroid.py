"""Classifies questions by task from their features: the nearest centroid, without training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ByCentroid:
    """Features x are of the task k with the nearest centroid, in units of the standard deviation within tasks:

        argmin_k  sum over the features j of (x_j - mu_kj)^2 / s_j^2.

    mu_k and s follow from counts, sums and summed squares, so no x is stored and the order of tasks does not matter.
    `ByQuestion` is the same with the whole covariance.

    Args:
        tasks: most tasks.
        like: a tensor (0, width) on the features' device.
        questions: number of questions to take of each task; the last batch may exceed it.
    """

    def __init__(self, tasks: int, like: Tensor, questions: int) -> None:
        self.questions = questions
        width, options = like.shape[1], {"dtype": torch.float64, "device": like.device}
        self.counts = torch.zeros(tasks, 1, **options)
        self.sums = torch.zeros(tasks, width, **options)
        self.squares = torch.zeros(width, **options)

    def state(self) -> dict[str, Tensor]:
        """The statistics, not copied."""
        return {"counts": self.counts, "sums": self.sums, "squares": self.squares}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state` returned; other names are ignored."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def wants(self, task: int) -> bool:
        """Whether fewer than ``questions`` features of a task were added."""
        return bool(self.counts[task] < self.questions)

    def add(self, task: int, x: Tensor) -> None:
        """Adds features of a task. x: (N, width)."""
        x = x.double()
        self.counts[task] += len(x)
        self.sums[task] += x.sum(0)
        self.squares += x.square().sum(0)

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest task among those added, (N,) int64; 0 before the first. x: (N, width)."""
        means = self.sums / self.counts.clamp(min=1)
        variances = (self.squares - (self.sums * means).sum(0)) / self.counts.sum().clamp(min=1)
        # A feature that does not vary within tasks must not be divided by; with one sample of each, none varies.
        variances = variances.clamp(min=0)
        least = 1e-3 * variances.mean()
        scale = (variances + torch.where(least > 0, least, 1.0)).rsqrt()
        distances = torch.cdist(x.double() * scale, means * scale, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.masked_fill(self.counts.T == 0, torch.inf).argmin(1)
