"""Ablations and variants of MAGE and LoRA: what they train, and where they equal another method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import STEPS, Sequence, branches_of, same

from cnext import adapters
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.attention_lora import AttentionLora
from cnext.methods.ew import Ew
from cnext.methods.ew_ga import EwGa
from cnext.methods.two_split import TwoSplit
from cnext.tasks import suites

ROLES = {"text-general", "image-general", "text-expert", "image-expert"}


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        (Ew(), {"VQAv2": ROLES, "Flickr30k": ROLES, "HQEdit": ROLES}),
        (
            EwGa(),
            {
                "VQAv2": ROLES - {"image-expert"},
                "Flickr30k": {"text-general", "image-expert"},
                "HQEdit": ROLES - {"text-expert"},
            },
        ),
        (
            TwoSplit(),
            {
                "VQAv2": {"text-general", "image-general"},
                "Flickr30k": {"text-general"},
                "HQEdit": {"text-general", "image-general"},
            },
        ),
    ],
    ids=["ew", "ew-ga", "two-split"],
)
def test_the_branches_that_a_task_trains(tiny: TinyBackbone, method: Ew, trained: dict[str, set[str]]) -> None:
    method.setup(tiny, [], torch.Generator().manual_seed(0))
    for name, branches in trained.items():
        parameters = method.trainable(suites.load("next-tiny").task(name))
        assert branches_of(parameters) == branches
        assert {id(p) for p in tiny.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}


BOTH = ("VQAv2", "HQEdit")
PLAIN = {"scale": 1.0, "lr_factor": 1.0}
"""Without what is tuned for each method."""


@pytest.mark.parametrize(
    ("name", "values", "other", "tasks"),
    [
        ("ewc", {}, "lora", BOTH[:1]),
        ("pgp", {}, "lora", BOTH[:1]),
        ("lae", {}, "lora", BOTH),
        ("ew-ga", {}, "mage-paper", BOTH[:1]),
        ("ew-ga", {"average": "pema", "c": 2.0}, "mage-paper", BOTH),
        ("mage-pull", {"c": 2.0}, "mage-paper", BOTH[:1]),
        ("mage-pull", {"c": 2.0, "pull": 0.0}, "mage-paper", BOTH),
        ("mage-slow", {"slow": 1.0, "c": 2.0}, "mage-paper", BOTH),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:30],
)
def test_a_method_is_another_where_they_agree(
    name: str, values: dict[str, object], other: str, tasks: tuple[str, ...], data: Path
) -> None:
    """To the bit: on a first task, which has nothing to preserve, or at the hyperparameters that switch a part off."""
    one, two = Sequence(name, data, **PLAIN, **values), Sequence(other, data, **PLAIN)
    one.learn(*tasks)
    two.learn(*tasks)
    with one.method.for_eval():
        pass
    assert same(one.state(), two.state())


@pytest.mark.parametrize(
    ("name", "other"), [("ew-ga", "mage-paper"), ("mage-pull", "mage-paper"), ("ewc", "lora"), ("pgp", "lora")]
)
def test_a_second_task_differs(name: str, other: str, data: Path) -> None:
    one, two = Sequence(name, data, **PLAIN), Sequence(other, data, **PLAIN)
    one.learn(*BOTH)
    two.learn(*BOTH)
    assert not same(one.state(), two.state())


def joined(sequence: Sequence) -> dict[str, torch.Tensor]:
    """Sum of B A over the branches, for every layer."""
    layers = adapters.layers(sequence.tiny.language_model)
    return {name: sum(b.B @ b.A for b in layer.branches.values()).detach() for name, layer in layers.items()}


def test_equal_weights_are_lora(data: Path) -> None:
    """Four branches of rank 8 whose sum has weight one are one of rank 32: the same start, the same steps."""
    ends = []
    for name in ("ew", "lora"):
        sequence = Sequence(name, data, **PLAIN)
        sequence.learn("VQAv2", "HQEdit")
        ends.append(torch.cat([product.flatten() for product in joined(sequence).values()]))
    assert (ends[0] - ends[1]).norm() < 0.01 * ends[1].norm()


def test_equal_weights_with_pema_are_the_merge_of_a_plain_lora(data: Path) -> None:
    """The steps of no average, then beta = mu / (F_t + mu + damping) with mu = F_old / C, on all parameters."""
    plain, merged = Sequence("ew", data), Sequence("ew", data, average="pema", c=2.0)
    for sequence in (plain, merged):
        sequence.learn("VQAv2")
    start = {key: p.detach().clone() for key, p in merged.method.adapter_parameters().items()}
    before = {key: value.clone() for key, value in merged.method.rule.fisher_old.items()}
    assert before.keys() == start.keys()
    for sequence in (plain, merged):
        sequence.learn("HQEdit")
    for key, parameter in merged.method.adapter_parameters().items():
        mu, fisher = before[key] / 2.0, merged.method.rule.fisher_old[key] - before[key]
        beta = mu / (fisher + mu + 1e-5)
        expected = beta * start[key] + (1 - beta) * plain.method.adapter_parameters()[key]
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-3, atol=1e-5)
    assert merged.method.extra_bytes(2) > plain.method.extra_bytes(2) == 0


def test_attention_alone_buys_the_largest_rank_that_fits(tiny: TinyBackbone) -> None:
    """The budget: rank 32 in 28 layers of the tiny backbone, 9,760 in + out features; attention has 4,096."""
    method = AttentionLora()
    method.setup(tiny, [], torch.Generator().manual_seed(0))
    layers = adapters.layers(tiny.language_model)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {len(layer.branches["lora"].A) for layer in layers.values()} == {76}
    count = sum(p.numel() for p in method.adapter_parameters().values())
    assert count == 76 * 4096 <= 312_320 < count + 4096


def test_slow_branches_take_a_part_of_the_steps_of_adamw(data: Path) -> None:
    """Against AdamW with a smaller learning rate for the general branches, with weight decay."""
    slow = Sequence("mage-slow", data, slow=0.25, average="none", **PLAIN)
    trainer = slow.open("HQEdit")
    plain = Sequence("ew-ga", data, **PLAIN)
    reference = plain.open("HQEdit")
    general = [p for key, p in plain.parameters.items() if "-general." in key]
    others = [p for key, p in plain.parameters.items() if "-general." not in key]
    options = {k: v for k, v in reference.optimizer.defaults.items() if k in ("betas", "eps", "weight_decay")}
    reference.optimizer = torch.optim.AdamW(others, lr=1.0, fused=True, **options)
    second = torch.optim.AdamW(general, lr=1.0, fused=True, **options)
    step = reference.optimizer.step

    def both() -> None:
        for group in second.param_groups:
            group["lr"] = 0.25 * reference.optimizer.param_groups[0]["lr"]
        second.step()
        step()

    reference.optimizer.step = both
    start = {key: p.detach().clone() for key, p in slow.parameters.items()}
    for _ in range(STEPS):
        trainer.train_step()
        reference.train_step()
        second.zero_grad()
    assert max((p - start[key]).abs().max().item() for key, p in slow.parameters.items() if "-general." in key) > 2e-3
    for key, parameter in slow.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[key], rtol=1e-3, atol=1e-4)


def test_slow_zero_keeps_the_general_branches_still(data: Path) -> None:
    sequence = Sequence("mage-slow", data, slow=0.0)
    start = sequence.state()
    sequence.learn("VQAv2")
    assert branches_of({k: v for k, v in sequence.state().items() if not torch.equal(v, start[k])}) == {"text-expert"}
