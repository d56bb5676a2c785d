"""The small backbone: its weights in 8 bits, its sizes, and what it can do before it is trained."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from cnext import backbones
from cnext.backbones.small.model import FOLDER, SmallBackbone, packed, unpacked
from cnext.backbones.tiny.model import WEIGHTS
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.scoring.base import make_scorers
from cnext.tasks import formats, suites
from cnext.tasks.next_real.examples import GENERATOR

SUITE = suites.load("next-real")


@pytest.fixture(scope="module")
def small() -> SmallBackbone:
    return SmallBackbone.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GENERATOR.write(tmp_path_factory.mktemp("real") / "data", 4, 60)


def test_packed_tensors_differ_by_half_a_step_at_most() -> None:
    state = {"matrix": torch.randn(5, 7) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [2.0]]), "bias": torch.randn(3)}
    stored = packed(state)
    assert stored["matrix"].dtype == torch.int8
    back = unpacked(stored)
    assert back.keys() == state.keys()
    scale = state["matrix"].abs().amax(1) / 127
    assert ((back["matrix"] - state["matrix"]).abs() <= (0.5 + 0.07) * scale[:, None] + 1e-7).all()
    torch.testing.assert_close(back["bias"], state["bias"], rtol=1e-3, atol=1e-3)
    assert unpacked({"plain": torch.ones(2, 2)})["plain"].dtype == torch.float32


def test_it_has_about_three_million_parameters_in_less_than_five_megabytes(small: SmallBackbone) -> None:
    assert 2.8e6 < sum(parameter.numel() for parameter in small.parameters()) < 3.8e6
    assert (FOLDER / "weights.safetensors").stat().st_size < 5e6
    assert backbones.load("small") is SmallBackbone


def test_it_is_the_backbone_of_next_real_and_tiny_of_the_others() -> None:
    assert plan(RunConfig(method="lora", suite="next-real")).config.backbone == "small"
    assert plan(RunConfig(method="lora")).config.backbone == "tiny"
    assert plan(RunConfig(method="lora", suite="next-real", backbone="tiny")).config.backbone == "tiny"


def test_weights_of_another_model_are_refused_with_the_program_that_makes_its_own() -> None:
    with pytest.raises(UserError, match=r"expected weights of the small backbone, from bench/pretrain_small\.py"):
        SmallBackbone.load(weights=WEIGHTS)


def test_it_writes_pictures_of_96_pixels(small: SmallBackbone, folder: Path) -> None:
    samples = formats.read_samples(SUITE.task("Flickr30k"), folder, "test")[:4]
    pictures = [one.image for one in small.generate(samples, 8)]
    assert all(image is not None and image.shape == (96, 96, 3) and image.dtype == numpy.uint8 for image in pictures)


def test_it_can_do_something_of_every_task_and_not_much(small: SmallBackbone, folder: Path) -> None:
    """It knows a quarter of the wordings, and of each task a part."""
    scorers, means = make_scorers(SUITE.clip), {}
    for task in SUITE.sets:
        samples = formats.read_samples(task, folder, "test")
        scores = scorers[task.scorer](task, samples, small.generate(samples, task.max_new_tokens))
        means[task.name] = sum(score.strict for score in scores) / len(scores)
    assert means.pop("Skills") > 45
    assert all(5 < mean < 80 for mean in means.values()), means
