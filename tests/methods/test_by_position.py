"""MAGE-routed and MoDE: the branch used at each position, and the distillation of MoDE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.sequence import Sequence, branches_of, opened, train_rest

from cnext import adapters
from cnext.adapters import BRANCH_ROLES
from cnext.adapters.by_position import ByPosition
from cnext.backbones.tiny.model import TinyBackbone
from cnext.methods.mage_routed import MageRouted
from cnext.methods.mode import Mode

LAYER = "layers.1.mlp.up_proj"


def prepared(tiny: TinyBackbone, method: MageRouted | Mode) -> tuple[adapters.AdapterLinear, torch.Tensor]:
    """A layer with random branches, a backbone with positions of all roles, and inputs."""
    generator = torch.Generator().manual_seed(0)
    method.setup(tiny, [], generator)
    layer = adapters.layers(tiny.language_model)[LAYER]
    with torch.no_grad():
        for branch in layer.branches.values():
            branch.B.copy_(torch.randn(branch.B.shape, generator=generator))
    tiny.positions = torch.tensor([[0, 1, 2, 3], [3, 2, 2, 0]])
    return layer, torch.randn(2, 4, layer.base.in_features, generator=generator)


def test_each_position_runs_through_the_branch_of_its_role(tiny: TinyBackbone) -> None:
    layer, x = prepared(tiny, MageRouted(scale=0.5))
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        branch = layer.branches[BRANCH_ROLES[tiny.positions[row, column]].name]
        token = x[row, column].double()
        expected = layer.base.weight.double() @ token + 0.5 * branch.B.double() @ (branch.A.double() @ token)
        torch.testing.assert_close(layer(x)[row, column].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_image_expert_acts_where_an_image_is_written(tiny: TinyBackbone) -> None:
    layer, x = prepared(tiny, Mode(scale=0.5))
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        token = x[row, column].double()
        gates = dict(zip(layer.branches, (layer.router.weight.double() @ token).softmax(0).tolist(), strict=False))
        if tiny.positions[row, column] == 3:
            gates = {"image": 1.0}
        added = [
            gate * layer.branches[k].B.double() @ (layer.branches[k].A.double() @ token) for k, gate in gates.items()
        ]
        expected = layer.base.weight.double() @ token + 0.5 * sum(added)
        torch.testing.assert_close(layer(x)[row, column].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "idle"),
    [("mage-routed", {"image-expert"}), ("mode", {"image"})],
    ids=["mage-routed", "mode"],
)
def test_text_answers_do_not_depend_on_the_image_expert(name: str, idle: set[str], data: Path) -> None:
    """Neither in training nor in generation token by token. Image outputs do."""
    sequence = Sequence(name, data)
    sequence.learn("VQAv2")
    sequence.tiny.eval()
    text, picture = (sequence.samples(task)[:4] for task in ("VQAv2", "Flickr30k"))
    encoded = [sequence.tiny.encode(samples) for samples in (text, picture)]

    def results() -> tuple[list[str], torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits, drawn = sequence.tiny.output(encoded[0]).logits, sequence.tiny.output(encoded[1]).image_pred
        return [answer.text for answer in sequence.tiny.generate(text, 6)], logits, drawn

    before = results()
    with torch.no_grad():
        for parameter in adapters.branch_parameters(sequence.tiny.language_model, idle).values():
            parameter.add_(1.0)
    after = results()
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_generation_routes_as_training_does(data: Path) -> None:
    """The first generated token is the most likely one of the training pass at that position."""
    sequence = Sequence("mage-routed", data)
    sequence.learn("VQAv2")
    with torch.no_grad():
        for parameter in adapters.branch_parameters(sequence.tiny.language_model, ["text-expert"]).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    sequence.tiny.eval()
    samples = sequence.samples("VQAv2")[:6]
    with torch.no_grad():
        outputs = [sequence.tiny.output(sequence.tiny.encode([sample])) for sample in samples]
    firsts = [int(output.logits[0].argmax()) for output in outputs]
    answers = [answer.text for answer in sequence.tiny.generate(samples, 1)]
    assert answers == [sequence.tiny.tokenizer.decode([token]) for token in firsts]


def test_weights_are_made_once_per_pass() -> None:
    positions = [torch.tensor([[0, 1]])]
    router = ByPosition(lambda: positions[-1], torch.eye(4))
    first = router(torch.zeros(1, 2, 3))
    assert first is router(torch.zeros(1, 2, 5))
    positions.append(torch.tensor([[3]]))
    assert torch.equal(router(torch.zeros(1, 1, 3)), torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))


def test_mode_trains_what_a_task_runs_through(data: Path) -> None:
    sequence = Sequence("mode", data)
    texts = {"text-0", "text-1", "text-2", "router"}
    for task, expected in (("VQAv2", texts), ("Flickr30k", texts | {"image"})):
        trainer = sequence.open(task)
        assert branches_of(sequence.parameters) == expected
        before = {key: p.detach().clone() for key, p in sequence.parameters.items()}
        train_rest(trainer)
        moved = {key: p for key, p in sequence.parameters.items() if not torch.equal(before[key], p)}
        assert branches_of(moved) == expected


def test_mode_distils_pictures_from_the_pretrained_model(data: Path) -> None:
    """0.3 times KL(p_0 || p) per token and the features' mean squared error, written out, with its gradient."""
    sequence, trainer = opened("mode", data, "Flickr30k", "Flickr30k")
    batch = trainer.batches.encoded[:4]
    with torch.no_grad():
        wanted = TinyBackbone.load().output(batch)
    given = sequence.tiny.output(batch)
    logs, old = given.logits.double().log_softmax(-1), wanted.logits.double().log_softmax(-1)
    text = sum((old[i].exp() * (old[i] - logs[i])).sum() for i in range(len(logs))) / len(logs)
    image = ((given.image_pred - wanted.image_pred) ** 2).double().mean()
    expected = 0.3 * (text + sequence.tiny.image_loss_weight * image)
    loss = sequence.method.extra_loss(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 1e-3
    parameters = [p for key, p in sequence.parameters.items() if key.startswith(LAYER)]
    for mine, plain in zip(*(torch.autograd.grad(value, parameters) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-6)


def test_mode_does_not_distil_text(data: Path) -> None:
    sequence, trainer = opened("mode", data, "VQAv2")
    assert sequence.method.extra_loss(trainer.batches.encoded[:2]) is None
