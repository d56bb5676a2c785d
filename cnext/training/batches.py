"""The batches of a task: which samples every optimizer step takes, and their encoding, ahead or when they are due."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from cnext.backbones.base import Backbone
from cnext.distributed import collectives
from cnext.tasks.base import Sample


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any parts; the same parts give the same seed on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class _Prepared:
    """Samples as `Backbone.prepare` gives them, for a DataLoader."""

    def __init__(self, backbone: Backbone, samples: Sequence[Sample]) -> None:
        self.backbone, self.samples = backbone, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.backbone.prepare(self.samples[index])


class Order:
    """Which samples a step takes: every one once per epoch, each epoch in an order that follows from the seed.

    samples: how many there are.  size: of a batch.
    """

    def __init__(self, samples: int, size: int, seed: tuple[object, ...]) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        self._epoch, self._places = -1, torch.empty(0)

    def indices(self, step: int) -> list[int]:
        """Numbers of the samples of a step, counted from 0."""
        indices = []
        for position in range(step * self.size, (step + 1) * self.size):
            epoch, place = divmod(position, self.samples)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(stable_seed(*self.seed, "epoch", epoch))
                self._epoch, self._places = epoch, torch.randperm(self.samples, generator=generator)
            indices.append(int(self._places[place]))
        return indices


class Batches:
    """The encoded samples of a task's steps, shared out over the processes of the run.

    Neither the number of processes nor of workers changes what is in a step.

    Args:
        size: samples of an optimizer step, over all processes.
        workers: processes that read and prepare samples beside the training; 0: it does that itself.
    """

    def __init__(
        self, backbone: Backbone, samples: Sequence[Sample], size: int, seed: tuple[object, ...], workers: int = 0
    ) -> None:
        self.backbone, self.samples, self.workers = backbone, samples, workers
        self._order, self._ahead = (Order(len(samples), size, seed) for _ in range(2))
        self._waiting: Iterator[Any] = iter(())
        self._next = -1
        self.encoded: list[Any] = []
        if backbone.encodes_ahead:
            every = self._loader([index] for index in range(len(samples)))
            self.encoded = backbone.encode_prepared([item for batch in every for item in batch])

    def ids(self, step: int) -> list[str]:
        """The ids of all samples of a step, counted from 0, those of other processes included."""
        return [self.samples[index].id for index in self._order.indices(step)]

    def _loader(self, batches: Iterable[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            _Prepared(self.backbone, self.samples),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=list,
            # Of its own: else every new loader takes a number from the one that dropout draws from.
            generator=torch.Generator(),
            # Forked: the samples and the tokenizer are there already.
            multiprocessing_context="fork" if self.workers else None,
        )

    def at(self, step: int, steps: int) -> list[Any]:
        """This process's encoded samples of a step out of ``steps``. Quickest when asked for step after step."""
        if self.backbone.encodes_ahead:
            return [self.encoded[index] for index in collectives.shard(self._order.indices(step))]
        if self._next != step:
            to_come = (collectives.shard(self._ahead.indices(number)) for number in range(step, steps))
            self._waiting = iter(self._loader(to_come))
        self._next = step + 1
        return self.backbone.encode_prepared(next(self._waiting))
