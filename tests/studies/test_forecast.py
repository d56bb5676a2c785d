"""Forecasts against published parameter counts, FLOPs counted by torch, and the counts of a real run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from cnext import RunConfig, run
from cnext.backbones.base import Backbone
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import run_main
from cnext.config.plan import Plan, plan
from cnext.errors import UserError
from cnext.studies import forecast

LLAMA_2_13B = 13_015_864_320
"""Parameters of LLaMA-2-13B as published, with a vocabulary of 32,000 and vectors of 5,120."""


def config(**changes: object) -> RunConfig:
    return RunConfig(**({"order": "VQAv2,HQEdit", "device": "cpu"} | changes))


def figure(planned: Plan, pattern: str, teraflops: float = 1e-6) -> float:
    """The first number of a forecast after some words."""
    return float(re.search(pattern + r" ([0-9.,]+)", forecast.text(planned, 1, teraflops))[1].replace(",", ""))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_of_training_are_those_that_torch_counts(checkpointing: bool) -> None:
    """Of a frozen LLaMA whose first layer's input needs a gradient; attention scores are not in the formula."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, attn_implementation="eager")).requires_grad_(False)

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=inputs, use_cache=False).logits

    inputs = torch.randn(1, 16, 256, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        outputs = checkpoint(logits, inputs, use_reentrant=False) if checkpointing else logits(inputs)
        outputs.sum().backward()
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name)
    expected = forecast.training_flops(parameters, 16, checkpointing)
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_parameters_and_samples_of_seed_x_as_published(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--suite", "continual-next", "--backbone", "seed-x", "--dry-run", "--gpus", "8"]
    assert run_main([*flags, "--method", "mage-paper"]) == 0
    shown = capsys.readouterr().out
    # The paper's optimizer steps and batch sizes: 3,000 of 256, for editing 10,000 of 96.
    assert "768,000" in shown
    assert "960,000" in shown
    # Rank-32 branches, both resamplers and the any-resolution embedding.
    branches = 125_173_760
    assert f"{branches + 126_197_760 + 88_375_296 + 20_480:,} trained (connections)" in shown
    # The layers and the output head, of SEED-X's vocabulary of 32,330.
    language = LLAMA_2_13B - 2 * 32_000 * 5_120 + 32_330 * 5_120 + branches
    assert f"{language:,} of them in the language model" in shown
    assert max(map(len, shown.splitlines())) <= 200
    # A of shape (32, in) is fixed in mage: 40 layers, six matrices of width 5,120 and one of 13,824.
    assert run_main([*flags, "--method", "mage"]) == 0
    fixed = 40 * 32 * (6 * 5_120 + 13_824)
    assert f"{branches - fixed + 126_197_760 + 88_375_296 + 20_480:,} trained (connections)" in capsys.readouterr().out
    assert run_main([*flags, "--method", "mr-lora"]) == 0
    own = 7 * branches
    assert f"{own + 126_197_760 + 88_375_296 + 20_480:,} trained (connections)" in capsys.readouterr().out


def test_counts_are_those_of_a_run(toy_suite: Path, data: Path, tmp_path: Path) -> None:
    """Trained parameters, answers and samples, with 4 steps of 16 samples and 8 test samples per task."""
    made = config(method="lora", suite=str(toy_suite), data=data, out=tmp_path)
    results = run(made)
    planned = plan(made)
    assert figure(planned, "model;") == results["cost"]["adapter_parameters"]
    asked = (
        "8 answers: twice zero-shot, after VQAv2, two after HQEdit; HQEdit before it is learnt, Skills at each stage"
    )
    assert figure(planned, "evaluation:") == 8 * (3 + 2 + 1 + 3), asked
    row = next(line for line in forecast.text(planned, 1, 1.0).splitlines() if line.startswith("HQEdit")).split()
    assert row[1:4] == ["4", "16", "64"]


def test_gpus_share_the_work() -> None:
    planned = plan(config())
    one, two = (float(re.search(r"\ntime: ([0-9.]+)", forecast.text(planned, gpus, 1e-6))[1]) for gpus in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.01)


def test_checkpointing_costs_time_and_saves_memory() -> None:
    planned = plan(config())
    without = dataclasses.replace(planned, recipe=dataclasses.replace(planned.recipe, batch_size=4096))
    with_it = dataclasses.replace(without, recipe=dataclasses.replace(without.recipe, checkpointing=True))
    assert figure(with_it, "\ntime:") > 1.2 * figure(without, "\ntime:")
    assert figure(with_it, "GPU:") < 0.7 * figure(without, "GPU:")


def test_a_backbone_of_unknown_size_is_an_error() -> None:
    class Unknown(TinyBackbone):
        name = "unknown"
        meta = classmethod(Backbone.meta.__func__)

    with pytest.raises(UserError, match="the sizes of backbone unknown are not known here; give --weights"):
        Unknown.meta(Path("nowhere"))
