"""Sampling of codes against transformers' logits processors and the distribution itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from backbones import stock
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from cnext.backbones.sampling import CodeSampling, image_seed, uniform
from cnext.tasks.base import Sample, Turn


def logits(rows: int = 3, codes: int = 50) -> torch.Tensor:
    return 2 * torch.randn(rows, codes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 1), (1.0, 7), (2.0, 7), (1.0, 50), (1.0, 99)]
)
def test_codes_are_drawn_from_the_distribution_of_transformers(temperature: float, top_k: int) -> None:
    for row in logits():
        scores = TemperatureLogitsWarper(temperature)(None, row[None])
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        expected = scores[0].double().softmax(-1)
        found = stock.shares(CodeSampling(temperature=temperature, top_k=top_k), row)
        assert (found - expected).abs().max() <= 1 / stock.COUNT
        assert not found[expected == 0].any()


def test_codes_as_likely_as_the_last_one_are_kept() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    kept = TopKLogitsWarper(2)(None, row[None])[0] > -math.inf
    assert (
        (stock.shares(CodeSampling(top_k=2), row) > 0).tolist()
        == kept.tolist()
        == [False, True, True, True, False, True]
    )


def test_extreme_numbers_never_give_an_impossible_code() -> None:
    row = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1 - 2**-50], dtype=torch.float64)
    assert CodeSampling().choose(row, numbers).tolist() == [1, 3]
    assert CodeSampling(top_k=1).choose(row, numbers).tolist() == [3, 3]


def test_without_sampling_the_most_likely_code_is_chosen() -> None:
    given = logits()
    assert torch.equal(CodeSampling(sample=False, top_k=3).choose(given, torch.full((3,), 0.9)), given.argmax(-1))


def test_numbers_follow_from_the_seed_of_their_row() -> None:
    torch.manual_seed(0)
    together, state = uniform([1, 2, 3], 100), torch.get_rng_state()
    assert torch.equal(together[[2, 0]], uniform([3, 1], 100))
    assert not torch.equal(together[0], together[1])
    assert together.dtype == torch.float64
    assert 0 <= together.min() < 0.1
    assert 0.9 < together.max() < 1
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"


def test_the_seed_of_an_image_is_of_the_run_and_the_question() -> None:
    def asked(text: str = "draw", image: str | None = "/data/a.png") -> Sample:
        return Sample("", (Turn(text),), image and Path(image))

    known = image_seed(0, asked())
    assert known == image_seed(0, asked(image="/elsewhere/a.png")), "the data folder may move"
    others = [image_seed(1, asked()), image_seed(0, asked("paint")), image_seed(0, asked(image=None))]
    assert len({known, *others, image_seed(0, asked(image="/data/b.png"))}) == 5
    assert image_seed(0, asked("\ud800")) >= 0, "text that is no Unicode"
