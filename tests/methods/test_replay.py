"""Experience replay: contents of the memory, its draws, and its loss against a plain loop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, opened, train_rest
from torch.nn import functional as F

from cnext.distributed import collectives


def test_the_first_task_has_nothing_to_replay(data: Path) -> None:
    sequence, trainer = opened("replay", data, "VQAv2")
    assert sequence.method.memory == []
    assert sequence.method.extra_loss(trainer.batches.encoded[:4]) is None


def test_the_memory_holds_the_earlier_tasks_alone(data: Path) -> None:
    sequence, _ = opened("replay", data, "VQAv2", "Flickr30k", "HQEdit", samples=6)
    earlier = [s for name in ("VQAv2", "Flickr30k") for s in sequence.samples(name)[:6]]
    expected = sequence.tiny.encode(earlier)
    assert len(sequence.method.memory) == 12
    for item, other in zip(sequence.method.memory, expected, strict=True):
        assert torch.equal(item.ids, other.ids)


def test_the_loss_against_a_plain_loop(data: Path) -> None:
    """Cross-entropy over all supervised tokens of the samples drawn, 6 times the squared error of their pictures."""
    sequence, trainer = opened("replay", data, "VQAv2", "HQEdit", "Flickr30k", samples=5, weight=0.3)
    torch.manual_seed(3)
    found = sequence.method.extra_loss(trainer.batches.encoded[:4])
    torch.manual_seed(3)
    text, image = [], []
    for index in torch.randperm(10)[:4].tolist():
        output = sequence.tiny.output([sequence.method.memory[index]])
        text.append(F.cross_entropy(output.logits.double(), output.labels, reduction="none"))
        image += (
            [(output.image_pred - output.image_target).double().square().flatten()] if len(output.image_pred) else []
        )
    assert image, "the draw has pictures"
    expected = 0.3 * (torch.cat(text).mean() + 6 * torch.cat(image).mean())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [5, 1], ids=["2 and 2 drawn", "1 and none drawn"])
def test_shares_of_two_processes_average_to_the_loss_of_one(
    samples: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions differ in length, so the loss is not a mean of the processes' means."""
    sequence, trainer = opened("replay", data, "HQEdit", "VQAv2", samples=samples)
    method, batch = sequence.method, trainer.batches.encoded
    torch.manual_seed(3)
    expected = method.extra_loss(batch[:4])
    torch.manual_seed(3)
    drawn = [method.memory[index] for index in torch.randperm(len(method.memory))[:4].tolist()]
    whole = tuple(map(float, method.backbone.supervised(drawn)))
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "all_reduce", lambda *_, device: whole)
    parts = []
    for number in range(2):
        monkeypatch.setattr(collectives, "shard", lambda items, number=number: items[number::2])
        torch.manual_seed(3)
        parts.append(method.extra_loss(batch[:2]))
    torch.testing.assert_close(sum(parts) / 2, expected)


def test_every_step_draws_anew_and_none_twice(data: Path) -> None:
    """Over many steps each sample is drawn as often as any other, within five standard deviations."""
    sequence, trainer = opened("replay", data, "VQAv2", "Flickr30k", samples=12)
    method, steps = sequence.method, 400
    places = {id(item): place for place, item in enumerate(method.memory)}
    drawn = []

    def spy(batch: list) -> object:
        drawn.append([places[id(item)] for item in batch])
        return type("Loss", (), {"total": torch.zeros(())})

    sequence.tiny.loss = spy
    torch.manual_seed(0)
    for _ in range(steps):
        method.extra_loss(trainer.batches.encoded[:4])
    assert all(len(set(batch)) == 4 for batch in drawn)
    counts = Counter(place for batch in drawn for place in batch)
    expected, deviation = steps / 3, (steps * 1 / 3 * 2 / 3) ** 0.5
    assert all(abs(counts[place] - expected) < 5 * deviation for place in range(12))


def test_draws_of_a_step_repeat(data: Path) -> None:
    """The trainer seeds the generator by the step: two runs replay the same samples in the same steps."""
    runs = []
    for _ in range(2):
        sequence, trainer = opened("replay", data, "VQAv2", "Flickr30k")
        drawn = []
        places = {id(item): place for place, item in enumerate(sequence.method.memory)}
        original = sequence.tiny.loss

        def spy(batch: list, *whole: object, original=original, places=places, drawn=drawn) -> object:
            drawn.append([places.get(id(item), -1) for item in batch])
            return original(batch, *whole)

        sequence.tiny.loss = spy
        train_rest(trainer)
        runs.append(drawn)
    assert runs[0] == runs[1]
    replayed = runs[0][1::2]
    assert len({tuple(batch) for batch in replayed}) == STEPS
    assert all(place >= 0 for batch in replayed for place in batch)


def test_a_small_memory_is_replayed_whole(data: Path) -> None:
    sequence, trainer = opened("replay", data, "VQAv2", "Flickr30k", samples=2, weight=1.0)
    expected = sequence.tiny.loss(sequence.method.memory).total
    torch.testing.assert_close(sequence.method.extra_loss(trainer.batches.encoded[:4]), expected)
