"""MAGE: trained and frozen branches, and the merge against a plain loop."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from methods.sequence import RECIPE, STEPS, Sequence, branches_of, opened, squares_of, train_rest

from cnext import adapters, methods
from cnext.averaging import RULES
from cnext.backbones.tiny.model import TinyBackbone
from cnext.config.schedules import SCHEDULES
from cnext.errors import UserError
from cnext.methods.mage import Mage
from cnext.methods.mage_paper import MagePaper
from cnext.tasks.base import Task


@pytest.mark.parametrize(
    ("reads", "writes", "frozen"),
    [
        (("text", "image"), ("text",), {"image-expert"}),
        (("text",), ("image",), {"image-general", "text-expert"}),
        (("text", "image"), ("image",), {"text-expert"}),
    ],
    ids=["comprehension", "generation", "editing"],
)
def test_the_modalities_and_not_the_name_decide(tiny: TinyBackbone, reads: tuple, writes: tuple, frozen: set) -> None:
    method = MagePaper()
    method.setup(tiny, [], torch.Generator().manual_seed(0))
    trained = method.trainable(Task("any name", reads, writes, "conversation", "short_answer", "", "", "", ""))
    still = adapters.branch_parameters(tiny.language_model, frozen)
    every = adapters.branch_parameters(tiny.language_model)
    assert trained.keys() == every.keys() - still.keys()
    assert not any(parameter.requires_grad for parameter in still.values())


def test_frozen_branches_have_no_gradient_and_no_decay(data: Path) -> None:
    """The recipe decays by 0.1; the released code shrinks its frozen branches with it."""
    sequence, trainer = opened("mage-paper", data, "HQEdit", "Flickr30k")
    assert trainer.optimizer.defaults["weight_decay"] > 0
    frozen = adapters.branch_parameters(sequence.tiny.language_model, ["image-general", "text-expert"])
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    assert any(parameter.abs().max() > 0 for name, parameter in frozen.items() if name.endswith("image-general.B"))
    train_rest(trainer)
    assert all(torch.equal(before[name], parameter) for name, parameter in frozen.items())
    assert all(parameter.grad is None for parameter in frozen.values())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(parameter) for parameter in frozen.values()}
    assert not {id(p) for p in trainer.optimizer.state} & {id(parameter) for parameter in frozen.values()}


def test_the_merge_against_a_plain_loop(data: Path) -> None:
    """Two tasks: beta = mu / (F_t + mu + damping) with mu = F_old / C, F_t the normalized mean of squared gradients
    over the second half of the steps; a branch that no task trained before keeps what it learnt."""
    sequence = Sequence("mage-paper", data)
    method = sequence.method
    fisher_old: dict[str, torch.Tensor] = {}
    for name in ("VQAv2", "HQEdit"):
        trainer = sequence.open(name)
        start = {key: p.detach().double() for key, p in sequence.parameters.items()}
        with squares_of(sequence, trainer) as squares:
            train_rest(trainer)
        end = {key: p.detach().double() for key, p in sequence.parameters.items()}
        method.after_task()
        mean = sum(s.sum() for s in squares.values()) / sum(s.numel() for s in squares.values())
        for key, parameter in sequence.parameters.items():
            fisher = squares[key] / mean
            mu = fisher_old.get(key, torch.zeros_like(fisher)) / method.c
            beta = mu / (fisher + mu + 1e-5)
            torch.testing.assert_close(
                parameter.detach().double(), beta * start[key] + (1 - beta) * end[key], rtol=1e-4, atol=1e-7
            )
            fisher_old[key] = fisher_old.get(key, 0) + fisher
    fresh = [key for key in sequence.parameters if ".image-expert." in key]
    assert fresh
    assert all(torch.equal(sequence.parameters[key].detach().double(), end[key]) for key in fresh)


@pytest.mark.parametrize("trains", ["roles", "all"])
def test_a_fixed_a_is_neither_trained_nor_read(data: Path, trains: str) -> None:
    """Over two tasks: A keeps its initial value to the bit, no optimizer and no average has it, and every B learns."""
    sequence = Sequence("mage", data, trains=trains, pull=0.1)
    added = sequence.method.adapter_parameters
    initial = {name: parameter.detach().clone() for name, parameter in added().items()}
    for name in ("VQAv2", "HQEdit"):
        trainer = sequence.open(name)
        optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        train_rest(trainer)
        assert optimized == {id(p) for name, p in added().items() if name in sequence.parameters}
        assert all(name.endswith(".B") for name in {**sequence.parameters, **sequence.method.observed})
        statistics = sequence.method.after_task()
    assert set(statistics) == branches_of(sequence.parameters)
    moved = {name for name, parameter in added().items() if not torch.equal(parameter, initial[name])}
    assert moved == {name for name in initial if name.endswith(".B")}
    kept = {name: tensor for name, tensor in sequence.method.state_dict().items() if tensor.ndim}
    assert sum(4 * tensor.numel() for tensor in kept.values()) == sequence.method.extra_bytes(3)
    assert not any(name.endswith("A") for name in kept)


def test_the_pull_follows_the_learning_rate(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, trainer = opened("mage", data, "VQAv2", "HQEdit", pull=0.1)
    rates: list[float] = []
    update = sequence.method.rule.update
    monkeypatch.setattr(sequence.method.rule, "update", lambda *, rate: (rates.append(rate), update(rate=rate)))
    train_rest(trainer)
    scheduled = [SCHEDULES["cosine"](RECIPE, step, STEPS) for step in range(STEPS)]
    assert rates == pytest.approx([rate / RECIPE.learning_rate for rate in scheduled])
    assert rates[0] == 1.0 > rates[-1]


def test_what_a_may_be(data: Path) -> None:
    with pytest.raises(UserError, match="unknown value of a 'frozen'; valid: fixed, trained"):
        Mage(a="frozen")


def test_statistics_are_of_the_branches_trained(data: Path) -> None:
    sequence, trainer = opened("mage-paper", data, "VQAv2", "Flickr30k")
    train_rest(trainer)
    statistics = sequence.method.after_task()
    assert set(statistics) == {"text-general", "image-expert"}
    assert 0 < statistics["text-general"]["mean"] < 1
    assert statistics["image-expert"] == {"mean": 0.0, "std": 0.0}


def test_the_flag_names_every_averaging_rule() -> None:
    [text] = [field.metadata["help"] for field in fields(methods.declared("mage")) if field.name == "average"]
    assert set(RULES) <= set(re.findall(r"[\w-]+", text))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:pema-literal")
def test_every_averaging_rule_learns_two_tasks(data: Path, rule: str) -> None:
    """With finite parameters."""
    sequence = Sequence("mage-paper", data, average=rule)
    for name in ("VQAv2", "HQEdit"):
        sequence.learn(name)
    assert all(torch.isfinite(tensor).all() for tensor in sequence.state().values())


@pytest.mark.parametrize(
    ("name", "values"), [("mage-paper", {"average": "pema-released"}), ("cia", {"after_optimizer": True})]
)
def test_a_released_average_is_updated_where_its_loop_does(
    name: str, values: dict[str, object], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per micro-batch, of which the last of a step is after the optimizer, or there alone; with the gradients there."""
    sequence, seen = Sequence(name, data, **values), []
    trainer = sequence.open("VQAv2", recipe=replace(RECIPE, micro_batch_size=2))
    rule = sequence.method.rule
    whole = STEPS * (2 if name == "mage-paper" else 1)
    assert rule.steps == whole
    update, step = rule.update, trainer.optimizer.step

    def watched(**given: float) -> None:
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in sequence.parameters.values())
        seen.append("update")
        update(**given)

    monkeypatch.setattr(rule, "update", watched)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (seen.append("step"), step()))
    train_rest(trainer)
    assert seen == [*(["update"] if name == "mage-paper" else []), "step", "update"] * STEPS
    sequence.method.after_task()
