"""DeepSpeed configurations: supported settings, those compared with the run, and those refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cnext.distributed import deepspeed
from cnext.errors import UserError
from cnext.tasks.base import Recipe

RECIPE = Recipe({"task": 4}, batch_size=8, micro_batch_size=2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Sets the environment as ``accelerate launch`` does: with DeepSpeed's own file, or accelerate's settings."""
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: name)

    def ask(file: object = None, **settings: str) -> deepspeed.Zero:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        if file is not None:
            (tmp_path / "zero.json").write_text(file if isinstance(file, str) else json.dumps(file))
            settings["CONFIG_FILE"] = str(tmp_path / "zero.json")
        for name, value in settings.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
        found = deepspeed.asked()
        assert found is not None
        return found

    return ask


def test_nothing_is_asked_without_accelerate() -> None:
    assert deepspeed.asked() is None


def test_without_deepspeed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cnext\[deepspeed\]'"):
        deepspeed.asked()


def test_settings_of_accelerate(asked: Any) -> None:
    found = asked(ZERO_STAGE="3", OFFLOAD_PARAM_DEVICE="cpu", OFFLOAD_OPTIMIZER_DEVICE="none", ZERO3_INIT="false")
    assert (found.stage, found.engine) == (3, {"offload_param": {"device": "cpu"}})


def test_accelerates_stage_where_none_is_given(asked: Any) -> None:
    assert asked().stage == 2


def test_a_file_of_deepspeed(asked: Any) -> None:
    section = {"stage": 3, "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e6}
    section |= {"reduce_bucket_size": "auto", "offload_optimizer": {"device": "none"}, "contiguous_gradients": False}
    found = asked({"zero_optimization": section, "train_batch_size": "auto", "bf16": {"enabled": "auto"}})
    assert (found.stage, found.engine, found.repeated) == (3, {"stage3_max_live_parameters": 1e6}, {})


REFUSED = {
    "optimizer": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
    "scheduler": {"scheduler": {"type": "WarmupLR"}},
    "steps_per_print": {"steps_per_print": 2000},
    "zero_optimization.contiguous_gradients": {"zero_optimization": {"stage": 3, "contiguous_gradients": True}},
    "zero_optimization.offload_param": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/a"}}
    },
    "zero_optimization.offload_optimizer": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "zero_optimization.overlap_comm": {"zero_optimization": {"stage": 1, "overlap_comm": True}},
    "bf16": {"bf16": {"enabled": True, "immediate_grad_update": True}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_settings_are_named(name: str, asked: Any) -> None:
    with pytest.raises(UserError, match=f"asks for settings that cnext does not support: {name}\n"):
        asked({"zero_optimization": {"stage": 2}} | REFUSED[name])


@pytest.mark.parametrize(
    ("name", "value"), [("ZERO3_INIT", "true"), ("OFFLOAD_OPTIMIZER_DEVICE", "cpu"), ("OFFLOAD_PARAM_DEVICE", "cpu")]
)
def test_unsupported_settings_of_accelerate_are_named(name: str, value: str, asked: Any) -> None:
    with pytest.raises(UserError, match=f"accelerate's configuration asks for .*{name.lower().split('_device')[0]}"):
        asked(ZERO_STAGE="2", **{name: value})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "expected an object with zero_optimization"),
        ({"zero_optimization": 3}, "expected an object, got 3"),
        ({"zero_optimization": {"stage": 4}}, "expected one of 0, 1, 2 and 3, got 4"),
    ],
    ids=["no JSON", "no object", "no section", "no stage"],
)
def test_a_bad_file_is_refused(config: object, words: str, asked: Any) -> None:
    with pytest.raises(UserError, match=words):
        asked(config)


def test_settings_of_the_recipe_are_compared(asked: Any) -> None:
    same = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    more = {"gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": "auto", "loss_scale": 0}}
    asked({"zero_optimization": {"stage": 1}} | same | more).check(RECIPE)
    other = asked({"zero_optimization": {"stage": 1}, "train_batch_size": 16, "fp16": {"enabled": True}})
    with pytest.raises(UserError, match=r"train_batch_size 16, here 8; fp16.enabled True, here False"):
        other.check(RECIPE)


def test_accelerates_own_accumulation_is_compared(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(UserError, match="gradient_accumulation_steps 1, here 4"):
        asked(ZERO_STAGE="2").check(RECIPE)
