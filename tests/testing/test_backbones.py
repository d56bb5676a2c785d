"""One contract for all backbones, and what `check_backbone` says of faulty ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones.seed_x.released import write_released
from backbones.small_folders import WRITERS
from backbones.small_vlms import write_llama, write_llava

from cnext.backbones.base import Backbone
from cnext.backbones.tiny.model import TinyBackbone
from cnext.testing import BACKBONE_CHECKS, check_backbone
from cnext.testing.backbones import Material, material


@pytest.fixture(scope="module", params=["tiny", *WRITERS, "seed-x", "hf", "hf-text"])
def made(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Each backbone with small random weights; the tiny one with its own."""
    name, folder = request.param, tmp_path_factory.mktemp("weights") / request.param
    if name == "tiny":
        return material(name, data)
    if name == "seed-x":
        return material(name, data, write_released(folder), steps=2)
    if name == "hf":
        return material(name, data, write_llava(folder))
    if name == "hf-text":
        return material("hf", data, write_llama(folder))
    return material(name, data, WRITERS[name](folder))


@pytest.mark.parametrize("check", BACKBONE_CHECKS)
def test_keeps_the_contract(made: Material, check: str) -> None:
    BACKBONE_CHECKS[check](made)


class Trained(TinyBackbone):
    @classmethod
    def load(cls, *arguments, **options):
        return super().load(*arguments, **options).requires_grad_()


class Target(TinyBackbone):
    targets = ("q_proj", "w_proj")


class Counts(TinyBackbone):
    def supervised(self, encoded):
        tokens, images = super().supervised(encoded)
        return tokens + 1, images


class Reads(TinyBackbone):
    def generate(self, samples, max_new_tokens):
        answers = super().generate(samples, max_new_tokens)
        return [type(one)(sample.turns[0].answer) for sample, one in zip(samples, answers, strict=True)]


class Padded(TinyBackbone):
    def output(self, encoded):
        found = super().output(encoded)
        return type(found)(found.logits * len(encoded), found.labels, found.image_pred, found.image_target)


class Unplaced(TinyBackbone):
    def output(self, encoded):
        hook = self.language_model.register_forward_pre_hook(
            lambda *_: setattr(self, "positions", torch.zeros_like(self.positions)), prepend=True
        )
        try:
            return super().output(encoded)
        finally:
            hook.remove()


class Unfinished(Backbone):
    name = "unfinished"


FAULTS = {
    Trained: "`load` must freeze every parameter; these require a gradient: ",
    Target: "`targets` name no linear layers of `language_model`: w_proj",
    Counts: "`supervised` says",
    Reads: "without their reference answers and target images",
    Padded: "logits of a batch differ from those of its samples one by one",
    Unplaced: r"`positions` of text lack 2 \(text written\)",
    Unfinished: "Unfinished lacks members of cnext.backbones.base.Backbone: encode_prepared, ",
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_check_backbone_says_what_is_wrong(kind: type) -> None:
    with pytest.raises(AssertionError, match=FAULTS[kind]):
        check_backbone(kind)


def test_check_backbone_takes_a_name_and_kinds_of_samples() -> None:
    check_backbone("tiny", kinds=["text"])
