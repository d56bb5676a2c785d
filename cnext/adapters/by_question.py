"""Classifies questions by task from their features, without training: linear discriminant analysis, nearest centroid.

Both need counts, sums and summed products of the features x alone: no x is stored, and the order of tasks does not
matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor


class FeatureSums(ABC):
    """What both classifiers keep of the features.

    Args:
        tasks: most tasks.
        like: a tensor (0, width) on the features' device.
        questions: number of questions to take of each task; the last batch may exceed it.
    """

    name: ClassVar[str]
    """Of the summed products in a checkpoint."""

    def __init__(self, tasks: int, like: Tensor, questions: int) -> None:
        self.questions = questions
        none = like[:0].to(torch.float64)
        self.counts, self.sums = none.new_zeros(tasks, 1), none.new_zeros(tasks, like.shape[1])
        self.products = self.product(none)

    @staticmethod
    @abstractmethod
    def product(x: Tensor) -> Tensor:
        """What is summed over features x, (N, width), beside themselves."""

    def state(self) -> dict[str, Tensor]:
        """The statistics, not copied."""
        return {"counts": self.counts, "sums": self.sums, self.name: self.products}

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
        self.products += self.product(x)

    def means(self) -> Tensor:
        """The mean of each task, (tasks, width), 0 of one that was not added."""
        return self.sums / self.counts.clamp(min=1)


class ByQuestion(FeatureSums):
    """For features x of task k distributed as N(mu_k, S) and equal priors, the most likely task is

        argmax_k  x^T S^-1 mu_k - mu_k^T S^-1 mu_k / 2.

    Reference: Hayes and Kanan, Deep Streaming Linear Discriminant Analysis, arXiv 1909.01520.
    """

    name = "moments"

    @staticmethod
    def product(x: Tensor) -> Tensor:
        return x.T @ x

    def likeliest(self, x: Tensor) -> Tensor:
        """Index of the most likely task among those added, (N,) int64; 0 before the first. x: (N, width)."""
        means = self.means()
        within = (self.products - self.sums.T @ means) / self.counts.sum().clamp(min=1)
        # Regularized by the identity: with fewer features than their width S is singular.
        within.diagonal().add_(1e-3 * within.diagonal().mean() + torch.finfo(within.dtype).tiny)
        weights = torch.linalg.solve(within, means.T)
        scores = x.double() @ weights - (means.T * weights).sum(0) / 2
        return scores.masked_fill(self.counts.T == 0, -torch.inf).argmax(1)


class ByCentroid(FeatureSums):
    """Features x are of the task k with the nearest centroid, in units of the standard deviation s_j within tasks:

    argmin_k  sum over the features j of (x_j - mu_kj)^2 / s_j^2.

    It is `ByQuestion` with a diagonal S.
    """

    name = "squares"

    @staticmethod
    def product(x: Tensor) -> Tensor:
        return x.square().sum(0)

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest task among those added, (N,) int64; 0 before the first. x: (N, width)."""
        means = self.means()
        variances = (self.products - (self.sums * means).sum(0)) / self.counts.sum().clamp(min=1)
        # A feature that does not vary within tasks must not be divided by; with one sample of each, none varies.
        variances = variances.clamp(min=0)
        least = 1e-3 * variances.mean()
        scale = (variances + torch.where(least > 0, least, 1.0)).rsqrt()
        distances = torch.cdist(x.double() * scale, means * scale, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.masked_fill(self.counts.T == 0, torch.inf).argmin(1)
