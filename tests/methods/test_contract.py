"""One contract for all methods: what a method may change and store, and that a resumed run ends with the same bits.

By default on one method of each kind; on all of them with ``-m ''``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, TASKS, VARIANTS, Sequence

from cnext import methods
from cnext.errors import UserError
from cnext.methods.base import Card
from cnext.methods.lora import Lora
from cnext.tasks import suites
from cnext.testing import METHOD_CHECKS, check_method
from cnext.testing.methods import LORA, old_samples_seen, resumes_to_the_same_bits

KINDS = {
    "lora": "one branch",
    "mage-experts": "branches by role, average, penalty, choice by the question",
    "prototype": "a branch per task, choice by frozen features",
    "mr-lora": "a branch per task, rehearsal, an additional phase",
    "lae": "evaluates other parameters than it trains",
    "pgp": "changes gradients and steps",
    "prompt-pool": "no low-rank branches",
    "osf": "parts of the weights, which are decomposed anew after each task",
    "sdft": "answers questions in training",
    "mage-paper with pema-kron": "reads gradients of frozen branches",
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in sorted({*methods.modules(), *VARIANTS})
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_has_the_parameters_of_lora_of_rank_32(name: str, data: Path) -> None:
    """Within 1%; routers come on top, a few per layer, and a task may train fewer."""
    sequence = Sequence(name, data)
    counts = []
    for task in TASKS:
        parameters = sequence.method.trainable(suites.load("next-tiny").task(task))
        counts.append(sum(p.numel() for key, p in parameters.items() if ".router." not in key))
    assert max(counts) <= 1.01 * LORA
    total = sum(p.numel() for key, p in sequence.method.adapter_parameters().items() if ".router." not in key)
    assert name == "zero-shot" or total >= 0.99 * LORA


@pytest.mark.parametrize("check", sorted(METHOD_CHECKS.keys() - {"resumes_to_the_same_bits"}))
def test_keeps_the_contract(name: str, check: str, data: Path) -> None:
    METHOD_CHECKS[check](lambda: Sequence(name, data))


def test_a_run_resumed_at_any_step_ends_with_the_same_bits(name: str, data: Path) -> None:
    resumes_to_the_same_bits(lambda: Sequence(name, data), (None, 0, 1, STEPS - 1))


def test_no_method_needs_the_task_at_test(name: str) -> None:
    assert not methods.load(VARIANTS.get(name, (name,))[0])().card.task_id_at_test


def test_the_sample_count_finds_samples_kept_in_secret(data: Path) -> None:
    sequence, kept = Sequence("lora", data), []
    sequence.method.before_step = lambda batch: kept.extend(batch if len(kept) < 4 else [])
    sequence.method.extra_loss = lambda batch: sequence.tiny.loss(kept[:4]).total
    assert old_samples_seen(sequence) == 4


@dataclass
class Faulty(Lora):
    """LoRA with one fault at a time."""

    fault: str = ""
    kept: list = field(default_factory=list, init=False)

    card = Card("of the tests")

    def attach(self, tasks, generator):
        super().attach(tasks, generator)
        if self.fault == "starts elsewhere":
            for parameter in self.adapter_parameters().values():
                torch.nn.init.normal_(parameter, generator=generator)

    def before_step(self, batch):
        if self.fault == "keeps samples":
            self.kept.extend(batch if len(self.kept) < 4 else [])

    def extra_loss(self, batch):
        return self.backbone.loss(self.kept[:4]).total if self.kept else None

    def after_step(self):
        if self.fault == "changes the model":
            with torch.no_grad():
                next(self.model.parameters()).add_(1e-3)
        if self.fault == "forgets to store":
            self.steps = getattr(self, "steps", 0) + 1
            for parameter in self.adapter_parameters().values():
                parameter.data.mul_(1 - 0.01 * self.steps)

    def state_dict(self):
        return {"big": torch.zeros(10**6)} if self.fault == "stores more" else {}


FAULTS = {
    "": "",
    "starts elsewhere": "before training the answers must be the pretrained model's",
    "keeps samples": "the method saw 4 samples of an earlier task, its card says rehearsal=0",
    "changes the model": "training on VQAv2 changed what `trainable` did not return: ",
    "forgets to store": "a run resumed between two tasks ends with other parameters: .*; `state_dict` and",
    "stores more": "stores 4,000,000 bytes beyond an adapter of rank 32, `extra_bytes` says at most 0",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_method_says_what_is_wrong(fault: str) -> None:
    if not fault:
        check_method(Faulty)
        return
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_method(Faulty, fault=fault)


def test_check_method_names_an_unknown_method() -> None:
    with pytest.raises(UserError, match="unknown method 'mgae'"):
        check_method("mgae")
