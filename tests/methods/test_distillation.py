"""Distillation: the loss and its gradient in closed form, and the choice of the teacher."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from methods.sequence import Sequence, opened

from cnext import adapters
from cnext.backbones.base import Output
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.distillation import Distillation


def outputs(positions: int, pictures: int) -> tuple[Output, Output]:
    def one() -> Output:
        logits, drawn = torch.randn(positions, 7, dtype=torch.float64), torch.randn(pictures, 4, 3, dtype=torch.float64)
        return Output(logits, torch.zeros(positions, dtype=torch.int64), drawn, torch.zeros_like(drawn))

    return one(), one()


@pytest.mark.parametrize("pictures", [0, 2], ids=["text", "text-and-pictures"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_distance_against_a_plain_loop(tiny: TinyBackbone, temperature: float, pictures: int) -> None:
    torch.manual_seed(0)
    teacher, student = outputs(5, pictures)
    method = Distillation(temperature=temperature)
    method.backbone = tiny
    text = 0.0
    for wanted, given in zip(teacher.logits.tolist(), student.logits.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in logits] for logits in (wanted, given))
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        text += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    pairs = list(zip(teacher.image_pred.flatten().tolist(), student.image_pred.flatten().tolist(), strict=True))
    image = sum((a - b) ** 2 for a, b in pairs) / max(len(pairs), 1)
    found = method.distance(teacher, student)
    torch.testing.assert_close(found.item(), temperature**2 * text + tiny.image_loss_weight * image)


def test_pictures_alone_have_a_distance(tiny: TinyBackbone) -> None:
    """Of a batch without supervised text, as with Emu3's released loss."""
    teacher, student = outputs(0, 2)
    method = Distillation()
    method.backbone = tiny
    image = (student.image_pred - teacher.image_pred).square().mean()
    torch.testing.assert_close(method.distance(teacher, student), tiny.image_loss_weight * image)


def test_the_gradient_of_the_text_term(tiny: TinyBackbone) -> None:
    """T (softmax(z / T) - softmax(z_teacher / T)) / positions: T^2 undoes the 1 / T of the temperature but for one."""
    torch.manual_seed(0)
    teacher, student = outputs(5, 0)
    logits = student.logits.requires_grad_()
    method = Distillation(temperature=3.0)
    method.backbone = tiny
    method.distance(teacher, student).backward()
    expected = 3 * ((logits.detach() / 3).softmax(-1) - (teacher.logits / 3).softmax(-1)) / 5
    torch.testing.assert_close(logits.grad, expected)


def test_nothing_is_added_in_the_first_task(data: Path) -> None:
    sequence, trainer = opened("distillation", data, "VQAv2")
    assert sequence.method.extra_loss(trainer.batches.encoded[:4]) is None


@pytest.mark.parametrize("task", ["HQEdit", "VQAv2"])
def test_no_pull_where_the_student_is_the_teacher(data: Path, task: str) -> None:
    sequence, trainer = opened("distillation", data, "Flickr30k", task)
    loss = sequence.method.extra_loss(trainer.batches.encoded[:4])
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(parameter.grad.abs().max() for parameter in sequence.parameters.values()) < 1e-5


def test_the_teacher_is_the_model_as_the_task_found_it(data: Path) -> None:
    """After two steps: the distance to what the model gave before them, and the parameters stay where they are."""
    sequence, trainer = opened("distillation", data, "VQAv2", "HQEdit", weight=0.7)
    batch = trainer.batches.encoded[:4]
    with torch.no_grad():
        before = sequence.tiny.output(batch)
    start = {name: parameter.detach().clone() for name, parameter in sequence.parameters.items()}
    trainer.train_step()
    trainer.train_step()
    now = sequence.state()
    found = sequence.method.extra_loss(batch)
    expected = 0.7 * sequence.method.distance(before, sequence.tiny.output(batch))
    torch.testing.assert_close(found, expected)
    assert found > 1e-4
    assert all(torch.equal(now[name], tensor) for name, tensor in sequence.state().items())
    with torch.no_grad(), adapters.holding(sequence.parameters, start):
        again = sequence.tiny.output(batch)
    assert torch.equal(again.image_pred, before.image_pred)


def test_the_teacher_drops_nothing_out(data: Path) -> None:
    sequence, trainer = opened("distillation", data, "VQAv2", "HQEdit", dropout=0.5)
    seen = []
    with torch.no_grad():
        expected = sequence.tiny.output(trainer.batches.encoded[:4])
    distance = sequence.method.distance

    def spy(teacher: Output, student: Output) -> torch.Tensor:
        seen.extend((teacher, student))
        return distance(teacher, student)

    sequence.method.distance = spy
    sequence.tiny.train()
    sequence.method.extra_loss(trainer.batches.encoded[:4])
    assert torch.equal(seen[0].logits, expected.logits)
    assert not torch.equal(seen[1].logits, expected.logits)
    assert all(module.training for module in sequence.tiny.modules())


def test_a_teacher_is_kept_within_a_task_only(data: Path) -> None:
    sequence = Sequence("distillation", data)
    sequence.learn("VQAv2")
    assert sequence.method.state_dict().keys() == {"tasks"}
    sequence.open("HQEdit")
    assert sequence.method.state_dict().keys() == {"tasks", *sequence.parameters}
