"""Batches of a task: the order of samples over epochs, and a DataLoader that encodes them, independent of workers."""

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
    """A 63-bit seed from any parts: SHA-256 of their words, so the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


Place = tuple[int, int]
"""The index of a sample, and the epoch in which it is trained on."""


class _Prepared:
    """Dataset of `Backbone.prepare` of each sample, as it is drawn in an epoch."""

    def __init__(self, backbone: Backbone, samples: Sequence[Sample], seed: tuple[object, ...]) -> None:
        self.backbone, self.samples, self.seed = backbone, samples, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Place) -> Any:
        return self.backbone.prepare(self.sample(place))

    def sample(self, place: Place) -> Sample:
        """A sample as it is drawn in an epoch."""
        index, epoch = place
        sample = self.samples[index]
        return sample.drawn("/".join(map(str, (*self.seed, epoch)))) if sample.redraws else sample


class Order:
    """Samples of each step: every sample once per epoch, each epoch shuffled by the seed.

    Args:
        samples: number of samples.
        size: of a batch.
        seed: parts of the seed, see `stable_seed`.
    """

    def __init__(self, samples: int, size: int, seed: tuple[object, ...]) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        self._epoch, self._places = -1, torch.empty(0)

    def indices(self, step: int) -> list[int]:
        """Indices of the samples of a step; steps count from 0."""
        return [index for index, _ in self.places(step)]

    def places(self, step: int) -> list[Place]:
        """The samples of a step and their epochs, which count from 0 too."""
        places = []
        for position in range(step * self.size, (step + 1) * self.size):
            epoch, place = divmod(position, self.samples)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(stable_seed(*self.seed, "epoch", epoch))
                self._epoch, self._places = epoch, torch.randperm(self.samples, generator=generator)
            places.append((int(self._places[place]), epoch))
        return places


class Batches:
    """The encoded samples of each step, sharded over the processes of the run.

    The samples of a step depend on neither the number of processes nor of workers. Those with `Sample.redraws` are
    encoded each time that they are trained on.

    Args:
        size: samples of an optimizer step, over all processes.
        workers: worker processes that read and prepare samples; 0 does it in this process.
        encoded: the samples as an earlier run's ``encoded``, by the same backbone. None: they are encoded.
    """

    def __init__(
        self,
        backbone: Backbone,
        samples: Sequence[Sample],
        size: int,
        seed: tuple[object, ...],
        workers: int = 0,
        encoded: list[Any] | None = None,
    ) -> None:
        self.backbone, self.samples, self.seed, self.workers = backbone, samples, seed, workers
        self._order, self._prefetched = (Order(len(samples), size, seed) for _ in range(2))
        self._loaded: Iterator[Any] = iter(())
        self._next = -1
        self.encoded: list[Any] = encoded or []
        self._ahead = backbone.encodes_ahead and not any(sample.redraws for sample in samples)
        if self._ahead and not self.encoded:
            every = self._loader([(index, 0)] for index in range(len(samples)))
            self.encoded = backbone.encode_prepared([item for batch in every for item in batch])

    def ids(self, step: int) -> list[str]:
        """Ids of the samples of a step, those of other processes included; steps count from 0."""
        return [self.samples[index].id for index in self._order.indices(step)]

    def samples_at(self, step: int) -> list[Sample]:
        """This process's samples of a step, of which `at` has the encoded ones."""
        drawn = _Prepared(self.backbone, self.samples, self.seed)
        return [drawn.sample(place) for place in collectives.shard(self._order.places(step))]

    def _loader(self, batches: Iterable[list[Place]]) -> DataLoader[Any]:
        return DataLoader(
            _Prepared(self.backbone, self.samples, self.seed),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=list,
            # By default a new loader draws a number from the global generator, which dropout uses.
            generator=torch.Generator(),
            # A fork has the samples and the tokenizer already.
            multiprocessing_context="fork" if self.workers else None,
        )

    def at(self, step: int, steps: int) -> list[Any]:
        """This process's encoded samples of a step out of ``steps``. Fastest for consecutive steps."""
        if self._ahead:
            return [self.encoded[index] for index in collectives.shard(self._order.indices(step))]
        if self._next != step:
            remaining = (collectives.shard(self._prefetched.places(number)) for number in range(step, steps))
            self._loaded = iter(self._loader(remaining))
        self._next = step + 1
        return self.backbone.encode_prepared(next(self._loaded))
