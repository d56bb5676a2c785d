"""SDFT: sampling, the divergence, what the teacher reads and what it is, and that a text task learns from it alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from methods.sequence import RECIPE, Sequence, opened, questions
from torch.nn import functional as F

from cnext import adapters
from cnext.backbones.base import Output
from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import UserError
from cnext.methods.sdft import Sdft, divergence, sampled
from cnext.tasks.base import Turn


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_the_divergence_against_a_plain_loop(direction: str) -> None:
    """A mean over samples of means over their tokens: a long answer counts as a short one."""
    torch.manual_seed(0)
    student, teacher, counts = torch.randn(6, 5).double(), torch.randn(6, 5).double(), [1, 3, 2]
    expected, start = 0.0, 0
    for count in counts:
        for token in range(start, start + count):
            q, p = student[token].softmax(0).tolist(), teacher[token].softmax(0).tolist()
            first, second = (q, p) if direction == "reverse" else (p, q)
            expected += sum(a * math.log(a / b) for a, b in zip(first, second, strict=True)) / count / len(counts)
        start += count
    assert divergence(student, teacher, counts, direction).item() == pytest.approx(expected)
    assert divergence(student, student, counts, direction).item() == 0


def test_tokens_are_sampled_from_their_distribution(tiny: TinyBackbone, data: Path) -> None:
    """First tokens of one question, drawn 600 times; without the context the most likely one is written."""
    (question,) = questions(data, "VQAv2", 1)
    answered = dataclasses.replace(question, turns=(Turn(question.turns[0].instruction, "red"),))
    with torch.no_grad():
        given = tiny.output(tiny.encode([answered]))
    logits = given.logits[0].index_fill(0, torch.tensor(tiny.banned_ids), -torch.inf)
    likely = logits.softmax(0)
    drawn: Counter[str] = Counter()
    for start in range(0, 600, 100):
        with sampled(tiny, range(start, start + 100)):
            drawn.update(answer.text for answer in tiny.generate([question] * 100, 1))
    for token in likely.topk(3).indices.tolist():
        p = float(likely[token])
        share = drawn[tiny.tokenizer.decode([token])] / 600
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 600) + 0.01
    assert not tiny.lm_head._forward_hooks
    assert tiny.generate([question], 1)[0].text == tiny.tokenizer.decode([int(logits.argmax())])


def test_an_answer_follows_from_its_own_seed(tiny: TinyBackbone, data: Path) -> None:
    asked = questions(data, "VQAv2", 4)
    with sampled(tiny, [5, 6, 7, 8]):
        together = [answer.text for answer in tiny.generate(asked, 6)]
    for question, seed, text in zip(asked, (5, 6, 7, 8), together, strict=True):
        with sampled(tiny, [seed]):
            assert tiny.generate([question], 6)[0].text == text
    with sampled(tiny, range(50)):
        assert len({answer.text for answer in tiny.generate(asked[:1] * 50, 6)}) > 1


def test_the_loss_is_that_of_the_teacher_with_the_demonstration(data: Path) -> None:
    """On the model's own answers, which both read; the teacher's parameters are others."""
    sequence, trainer = opened("sdft", data, "VQAv2", dropout=0.5, template="say {demonstration} . {question}")
    method, tiny = sequence.method, sequence.tiny
    trainer.train_step()
    trainer.train_step()
    samples = trainer.batches.samples_at(2)
    method.batch_samples = samples
    own, shown = method.rollouts(samples)
    now = {name: p.detach().clone() for name, p in sequence.parameters.items()}
    assert any(not torch.equal(now[name], value) for name, value in method.teacher.items())
    expected = 0.0
    for sample, mine, demonstrated in zip(samples, own, shown, strict=True):
        turn, answer = sample.turns[0], mine.turns[0].answer
        assert mine.turns == (Turn(turn.instruction, answer),)
        assert demonstrated.turns == (Turn(f"say {turn.answer} . {turn.instruction}", answer),)
        tiny.eval()
        with torch.no_grad(), adapters.holding(sequence.parameters, method.teacher):
            wanted = tiny.output(tiny.encode([demonstrated])).logits
        with torch.no_grad():
            given = tiny.output(tiny.encode([mine])).logits
        assert len(given) == len(tiny.tokenizer.encode(answer)) + 1
        q, p = given.log_softmax(-1), wanted.log_softmax(-1)
        expected += float((q.exp() * (q - p)).sum(-1).mean()) / len(samples)
    for layer in adapters.layers(tiny.language_model).values():
        layer.dropout = 0.0
    tiny.train()
    found = method.extra_loss(trainer.batches.at(2, 4))
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert found.item() > 1e-3
    assert all(module.training for module in tiny.modules())
    assert all(torch.equal(p, now[name]) for name, p in sequence.parameters.items())


def test_no_pull_where_the_demonstration_changes_nothing(data: Path) -> None:
    """The teacher is the model itself at a task's start, and the prompt the question: nothing to learn."""
    sequence, trainer = opened("sdft", data, "Flickr30k", "VQAv2")
    sequence.method.prompt = lambda turn: turn.instruction
    sequence.method.batch_samples = trainer.batches.samples_at(0)
    loss = sequence.method.extra_loss(trainer.batches.at(0, 1))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(parameter.grad.abs().max() for parameter in sequence.parameters.values()) < 1e-5


def test_a_text_task_learns_from_its_teacher_alone(data: Path) -> None:
    """Whatever the task loss is: its gradient is dropped, and what is added is that of the divergence."""
    sequence, trainer = opened("sdft", data, "VQAv2")
    seen = {}
    taken = sequence.method.transform_gradients

    def spy(parameters: dict) -> None:
        seen["before"] = max(float(p.grad.abs().max()) for p in parameters.values())
        taken(parameters)
        seen["after"] = max(float(p.grad.abs().max()) for p in parameters.values())

    sequence.method.transform_gradients = spy
    sequence.method.prompt = lambda turn: turn.instruction
    before = {name: p.detach().clone() for name, p in sequence.parameters.items()}
    trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
    trainer.train_step()
    assert seen["before"] > 1e-4
    assert seen["after"] == 0
    # Adam makes a step of the learning rate of any rounding; B is at zero, so A has no gradient at all.
    assert all(torch.equal(p, before[name]) for name, p in sequence.parameters.items() if name.endswith("A"))


def test_it_comes_to_answer_as_a_fixed_teacher_does(data: Path) -> None:
    """The divergence on one batch goes down."""
    sequence, trainer = opened("sdft", data, "VQAv2", ema=0.0)
    method, batch = sequence.method, trainer.batches.at(0, 1)
    method.batch_samples = trainer.batches.samples_at(0)
    optimizer, losses = torch.optim.Adam(sequence.parameters.values(), 2e-3), []
    own, shown = method.rollouts(method.batch_samples)
    method.rollouts = lambda samples: (own, shown)
    for _ in range(12):
        loss = method.extra_loss(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_task_that_writes_images_is_trained_by_its_loss(data: Path) -> None:
    sequence, trainer = opened("sdft", data, "Flickr30k")
    plain, others = opened("lora", data, "Flickr30k", scale=sequence.method.scale)
    assert sequence.method.extra_loss(trainer.batches.at(0, 1)) is None
    for one in (trainer, others):
        one.train_step()
    assert sequence.method.teacher == {}
    for name, parameter in sequence.parameters.items():
        assert torch.equal(parameter, plain.parameters[name])


def test_the_teacher_is_a_moving_average_from_the_tasks_start(data: Path) -> None:
    sequence, trainer = opened("sdft", data, "Flickr30k", "VQAv2", ema=0.3)
    expected = {name: p.detach().double() for name, p in sequence.parameters.items()}
    assert all(torch.equal(sequence.method.teacher[name].double(), value) for name, value in expected.items())
    for _ in range(3):
        trainer.train_step()
        expected = {n: 0.7 * value + 0.3 * sequence.parameters[n].detach().double() for n, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(sequence.method.teacher[name].double(), value, rtol=1e-5, atol=1e-7)
    sequence.finish(trainer)
    assert sequence.method.teacher == {}


def test_the_samples_are_those_of_the_batch(data: Path) -> None:
    """In their order, micro-batch by micro-batch."""
    sequence = Sequence("sdft", data)
    trainer = sequence.open("VQAv2", dataclasses.replace(RECIPE, micro_batch_size=3))
    tiny, sizes = sequence.tiny, []

    def check(batch: list) -> None:
        sizes.append(len(batch))
        for item, again in zip(batch, tiny.encode(sequence.method.batch_samples), strict=True):
            assert torch.equal(item.ids, again.ids)
            torch.testing.assert_close(item.features, again.features)

    sequence.method.before_step = check
    trainer.train_step()
    trainer.train_step()
    assert sizes == [3, 1, 3, 1]


def test_the_template_is_filled_once() -> None:
    method = Sdft(template="{demonstration}: {question} {x} {demonstration}")
    assert method.prompt(Turn("{demonstration}?", "a {question}")) == "a {question}: {demonstration}? {x} a {question}"


def test_another_number_of_tokens_after_the_demonstration_is_an_error(data: Path) -> None:
    sequence, trainer = opened("sdft", data, "VQAv2")
    method, plain = sequence.method, sequence.tiny.output
    method.batch_samples = trainer.batches.samples_at(0)
    calls = []

    def shorter(encoded: list) -> Output:
        output = plain(encoded)
        calls.append(len(output.logits))
        return dataclasses.replace(output, logits=output.logits[1:]) if len(calls) == 1 else output

    sequence.tiny.output = shorter
    with pytest.raises(UserError, match="an answer has another number of tokens after the demonstration"):
        method.extra_loss([])


def test_forward_and_reverse_differ() -> None:
    student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    found = [divergence(student, teacher, [1], direction) for direction in ("reverse", "forward")]
    reverse = F.kl_div(teacher.log_softmax(-1), student.softmax(-1), reduction="sum")
    assert found[0].item() == pytest.approx(float(reverse))
    assert found[0] < found[1]
