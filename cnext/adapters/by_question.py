"""Classifies questions by task from their features: streaming linear discriminant analysis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ByQuestion:
    """For features x of task k distributed as N(mu_k, S) and equal priors, the most likely task is

        argmax_k  x^T S^-1 mu_k - mu_k^T S^-1 mu_k / 2.

    mu_k and S follow from counts, sums and second moments, so no x is stored and the order of tasks does not matter.

    Args:
        tasks: most tasks.
        like: a tensor (0, width) on the features' device.
        questions: number of questions to take of each task; the last batch may exceed it.

    Reference: Hayes and Kanan, Deep Streaming Linear Discriminant Analysis, arXiv 1909.01520.
    """

    def __init__(self, tasks: int, like: Tensor, questions: int) -> None:
        self.questions = questions
        width, options = like.shape[1], {"dtype": torch.float64, "device": like.device}
        self.counts = torch.zeros(tasks, 1, **options)
        self.sums = torch.zeros(tasks, width, **options)
        self.moments = torch.zeros(width, width, **options)

    def state(self) -> dict[str, Tensor]:
        """The statistics, not copied."""
        return {"counts": self.counts, "sums": self.sums, "moments": self.moments}

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
        self.moments += x.T @ x

    def likeliest(self, x: Tensor) -> Tensor:
        """Index of the most likely task among those added, (N,) int64; 0 before the first. x: (N, width)."""
        means = self.sums / self.counts.clamp(min=1)
        within = (self.moments - self.sums.T @ means) / self.counts.sum().clamp(min=1)
        # Regularized by the identity: with fewer features than their width S is singular.
        within.diagonal().add_(1e-3 * within.diagonal().mean() + torch.finfo(within.dtype).tiny)
        weights = torch.linalg.solve(within, means.T)
        scores = x.double() @ weights - (means.T * weights).sum(0) / 2
        return scores.masked_fill(self.counts.T == 0, -torch.inf).argmax(1)
