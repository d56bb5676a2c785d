"""The contract of methods: what one may change and store, and that a resumed run ends with the same bits."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cnext import adapters
from cnext.backbones.tiny.model import TinyBackbone
from cnext.errors import listed
from cnext.methods.base import Card, Method
from cnext.tasks import synthetic
from cnext.testing.sequence import TASKS, TEST, TRAIN, Sequence, resumed, same

LORA = 312_320
"""Parameters of one branch of rank 32 in every target of the tiny backbone."""
COUNTERS = 64
"""Bytes that a method may store beyond what it says: a few numbers."""
Make = Callable[[], Sequence]


def declares_itself(make: Make) -> None:
    """A method is a dataclass, all of whose hyperparameters have defaults, and has a card."""
    method = make().method
    kind = type(method).__name__
    assert isinstance(method, Method), f"{kind} must derive from cnext.methods.base.Method"
    assert dataclasses.is_dataclass(method), f"{kind} must be a dataclass: decorate it with @dataclass"
    card = getattr(method, "card", None)
    assert isinstance(card, Card), f"{kind}.card must be a cnext.methods.base.Card, it is {card!r}"


def starts_as_the_pretrained_model(make: Make) -> None:
    """Before any training, the model with the method's adapters answers as it does without them."""
    sequence = make()
    shown = sequence.questions("VQAv2")
    expected = [answer.text for answer in TinyBackbone.load().generate(shown, 8)]
    task = None
    with sequence.method.for_eval():
        found = [answer.text for answer in sequence.method.answer(shown, 8, task)]
    assert found == expected, f"before training the answers must be the pretrained model's, {expected}; got {found}"


def changes_what_it_declares_and_nothing_else(make: Make) -> None:
    """A task changes only parameters that `trainable` returned or that require a gradient.

    With the adapters removed, the model is the pretrained one.
    """
    sequence = make()
    for task in TASKS:
        before = sequence.state()
        sequence.learn(task)
        changed = {key for key, value in sequence.state().items() if not torch.equal(before[key], value)}
        added = {f"method:{key}": parameter for key, parameter in sequence.method.adapter_parameters().items()}
        declared = {id(parameter) for parameter in sequence.parameters.values()}
        named = (dict(sequence.tiny.named_parameters()) | added).items()
        trained = {key for key, p in named if id(p) in declared or p.requires_grad}
        undeclared = sorted(changed - trained)
        assert not undeclared, f"training on {task} changed what `trainable` did not return: {listed(undeclared)}"
        count = len(sequence.parameters)
        assert bool(changed) == bool(count), (
            f"`trainable` returned {count} parameters for {task}, and training changed {len(changed)}"
        )
    adapters.detach(sequence.tiny.language_model)
    pretrained = TinyBackbone.load().state_dict()
    left = sequence.tiny.state_dict()
    assert left.keys() == pretrained.keys(), (
        f"with the adapters removed, the model has other tensors: {listed(sorted(left.keys() ^ pretrained.keys()))}"
    )
    different = [name for name in left if not torch.equal(left[name], pretrained[name])]
    assert not different, f"with the adapters removed, these tensors differ from the pretrained: {listed(different)}"


def old_samples_seen(sequence: Sequence) -> int:
    """Number of samples of a first task that a method encodes or puts through the model while it trains on a second."""
    tiny: Any = sequence.tiny
    encoded, passed = [], []
    passing = ("output", "question_features", "question_means")
    plain = {name: getattr(tiny, name) for name in ("encode", *passing)}

    def encode(samples: list) -> list:
        encoded.extend((sample.image, sample.turns[0].instruction) for sample in samples)
        return plain["encode"](samples)

    def watched(name: str) -> Callable:
        def call(batch: list, *rest: object) -> object:
            passed.append(list(batch))
            return plain[name](batch, *rest)

        return call

    tiny.encode = encode
    for method in passing:
        setattr(tiny, method, watched(method))
    sequence.learn(TASKS[0])
    assert not sequence.parameters or passed, "training must put its batches through the backbone's `output`"
    first = {id(item): item for batch in passed for item in batch}
    encoded.clear()
    passed.clear()
    sequence.learn(TASKS[1])
    old = {(sample.image, sample.turns[0].instruction) for sample in sequence.samples(TASKS[0])}
    instructions = {instruction for _, instruction in old}
    named = {one for one in encoded if one in old or any(one[1].startswith(known) for known in instructions)}
    return max(len(named), len(first.keys() & {id(item) for batch in passed for item in batch}))


def sees_no_more_old_samples_than_its_card_says(make: Make) -> None:
    """While it trains on a second task, it sees at most ``card.rehearsal`` samples of the first, and one at least if
    the card asks for any."""
    sequence = make()
    seen, allowed = old_samples_seen(sequence), sequence.method.card.rehearsal
    assert seen <= allowed, f"the method saw {seen} samples of an earlier task, its card says rehearsal={allowed}"
    assert allowed == 0 or seen, f"the card says rehearsal={allowed}, and no old sample was used; say 0"


def needs_no_task_unless_its_card_says_so(make: Make) -> None:
    """Questions of two tasks in one call get the answers that they get apart; no name or task comes with them."""
    sequence = make()
    method = sequence.method
    if method.card.task_id_at_test:
        return
    sequence.learn(*TASKS[:2])
    sequence.tiny.eval()
    groups = [sequence.questions(task, 3) for task in TASKS[:2]]
    with method.for_eval():
        apart = [answer.text for group in groups for answer in method.answer(group, 6, None)]
        together = [answer.text for answer in method.answer([*groups[0], *groups[1]][::-1], 6, None)[::-1]]
    assert together == apart, (
        f"questions of two tasks in one call are answered {together}, and {apart} task by task; "
        "an answer may depend on its question alone, or the card says task_id_at_test=True"
    )


def keeps_no_more_bytes_than_it_says(make: Make) -> None:
    """What it stores beyond one adapter of rank 32 is at most `extra_bytes`, and no less than 10% below it."""
    sequence = make()
    sequence.learn(*TASKS)
    kept = [*sequence.method.state_dict().values(), *sequence.method.adapter_parameters().values()]
    extra = max(0, sum(t.numel() * t.element_size() for t in kept) - 4 * LORA * bool(sequence.parameters))
    bound = sequence.method.extra_bytes(len(TASKS))
    told = f"after {len(TASKS)} tasks the method stores {extra:,} bytes beyond an adapter of rank 32"
    assert extra <= bound + COUNTERS, f"{told}, `extra_bytes` says at most {bound:,}"
    assert extra >= bound / 1.1 - COUNTERS, f"{told}, `extra_bytes` says {bound:,}, which is far more"


def resumes_to_the_same_bits(make: Make, stops: tuple[int | None, ...] = (None, 1)) -> None:
    """A run interrupted between two tasks, or after a task's first step, ends with the tensors of one that is not.

    stops: as of `resumed`.
    """
    whole = make()
    whole.learn(*TASKS)
    for stop, second in zip(stops, resumed(make, stops), strict=True):
        where = "between two tasks" if stop is None else f"after step {stop} of a task"
        advice = "`state_dict` and `adapter_parameters` must have all that a resumed run needs"
        one, other = second.state(), whole.state()
        different = [name for name in other if name not in one or not torch.equal(one[name], other[name])]
        assert same(one, other), f"a run resumed {where} ends with other parameters: {listed(different)}; {advice}"
        assert same(second.method.state_dict(), whole.method.state_dict()), (
            f"a run resumed {where} ends with another `state_dict` of the method; {advice}"
        )


METHOD_CHECKS: dict[str, Callable[[Make], None]] = {
    check.__name__: check
    for check in (
        declares_itself,
        starts_as_the_pretrained_model,
        changes_what_it_declares_and_nothing_else,
        sees_no_more_old_samples_than_its_card_says,
        needs_no_task_unless_its_card_says_so,
        keeps_no_more_bytes_than_it_says,
        resumes_to_the_same_bits,
    )
}
"""The checks of `check_method` by name: functions of a function that makes a `cnext.testing.sequence.Sequence`."""


def check_method(method: str | type, **hyperparameters: Any) -> None:
    """Checks that a method keeps the contract of methods, on the tiny backbone and three tasks of next-tiny.

    It may change what it declares and nothing else, starts as the pretrained model, resumes bit for bit, and needs no
    more old samples, bytes or task names than its card says. About ten seconds on a CPU.

    Args:
        method: its class, or the name that `cnext list` shows.
        hyperparameters: those that differ from their defaults, for example to shorten additional phases.

    Raises:
        AssertionError: says what was expected, what came, and what to do.
        UserError: an unknown name, or a value that the method refuses.

    Example:
        >>> from cnext.testing import check_method
        >>> check_method("l2-lora", strength=0.1)
    """
    with tempfile.TemporaryDirectory() as scratch:
        data = synthetic.write_next_tiny(Path(scratch) / "data", TRAIN, TEST)
        for check in METHOD_CHECKS.values():
            check(lambda: Sequence(method, data, **hyperparameters))
