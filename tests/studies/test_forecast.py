"""The forecast against counts made by hand; that it loads nothing is seen from the meta device."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from cnext import RunConfig
from cnext.backbones.base import Backbone
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import run_main
from cnext.config.run_config import plan
from cnext.errors import UserError
from cnext.studies import forecast


def config(**changes: object) -> RunConfig:
    return RunConfig(**({"order": "VQAv2,HQEdit", "device": "cpu"} | changes))


def test_counts_by_hand() -> None:
    planned = plan(config(method="lora"))
    lines = forecast.text(planned, 2, 1e-6).splitlines()
    tiny = TinyBackbone.load()
    language = sum(parameter.numel() for parameter in tiny.language_model.parameters()) + 312_320
    assert f"{language:,} of them in the language model; 312,320 are trained (branches)" in lines[1]
    row = next(line for line in lines if line.startswith("HQEdit")).split()
    steps, length = 80, forecast.TEXT_TOKENS + 18 + 17
    hours = 2 * 2 * language * steps * 16 * length / (2 * 1e6) / 3600
    assert row[1:] == [
        f"{steps}",
        "16",
        f"{steps * 16:,}",
        f"{steps * 16 / 2400:.1f}",
        f"{steps * 16 * length:,}",
        f"{hours:.1f}",
    ]
    # VQAv2 is asked zero-shot, after itself and after HQEdit; HQEdit zero-shot and after itself. 200 items each.
    assert any(line.startswith("evaluation: 1,000 questions, 400 of them answered by a picture") for line in lines)
    size = float(re.search(r"disk: ([0-9.]+) GB", "\n".join(lines)).group(1))
    assert size == pytest.approx((2 * 4 + 2 * 12) * 312_320 / 1e9, abs=0.05)


def test_checkpointing_costs_time_and_saves_memory() -> None:
    planned = plan(config())
    kept = dataclasses.replace(planned, recipe=dataclasses.replace(planned.recipe, batch_size=4096))
    again = dataclasses.replace(kept, recipe=dataclasses.replace(kept.recipe, checkpointing=True))
    values = [
        [
            float(re.search(pattern, forecast.text(one, 1, 1e-6)).group(1))
            for pattern in (r"time: ([0-9.]+)", r"GPU: ([0-9.]+)")
        ]
        for one in (kept, again)
    ]
    assert values[1][0] > 1.2 * values[0][0]
    assert values[1][1] < 0.7 * values[0][1]


def test_from_the_command_line_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--suite", "continual-next", "--backbone", "seed-x", "--dry-run", "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert "768,000" in shown
    assert "960,000" in shown
    # What the spec counts: rank-32 branches, both resamplers and the any-resolution embedding.
    assert f"{125_173_760 + 126_197_760 + 88_375_296 + 20_480:,} are trained (connections)" in shown
    assert max(map(len, shown.splitlines())) <= 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "goes with --dry-run"),
        (["--dry-run", "--gpus", "0"], "--gpus must be at least 1"),
        (["--dry-run", "--gpus", "3"], "cannot share the batches of VQAv2"),
    ],
    ids=["no dry run", "none", "uneven"],
)
def test_bad_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_backbone_of_unknown_size_says_so() -> None:
    class Unknown(TinyBackbone):
        name = "unknown"
        meta = classmethod(Backbone.meta.__func__)

    with pytest.raises(UserError, match="the sizes of backbone unknown are not known here; give --weights"):
        Unknown.meta(Path("nowhere"))
