"""Read a DeepSpeed ZeRO configuration of ``accelerate launch``, and make the optimizer that it implies.

Trained parameters are a few percent of the model and replicated, because methods read reduced gradients and change
parameters between steps. The stages, each including those before it:

* 1: the optimizer's moments are partitioned
* 2: nothing more, because gradients are replicated until a method has read them
* 3: the frozen model is partitioned, by DeepSpeed's own engine (`deepspeed_blocks`)

Any other setting is an error that names it, because it would have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from cnext.distributed import collectives
from cnext.errors import UserError, parse_json
from cnext.regular_files import read_bytes

ACCELERATE = "ACCELERATE_DEEPSPEED_"
SECTION = "zero_optimization"
STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu")
ENGINE = (
    "overlap_comm stage3_prefetch_bucket_size stage3_max_reuse_distance stage3_max_live_parameters "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_params "
    "stage3_allgather_sequential memory_efficient_linear log_trace_cache_warnings enable_sanity_checks"
).split()
"""Settings of DeepSpeed's parameter partitioning that stage 3 supports, beside offload_param."""
RECIPE = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping".split()
"""Settings of the recipe, which a configuration may repeat."""
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class ZeroConfig:
    """A ZeRO configuration. source: in words.  engine: settings of stage 3.  repeated: values the recipe must have."""

    source: str
    stage: int
    engine: dict[str, Any]
    repeated: dict[str, Any]

    def check(self, recipe: Any) -> None:
        """Raises UserError where the recipe differs from the configuration."""
        share = recipe.batch_size // collectives.world_size()
        micro = recipe.micro_batch_size or share
        values = (recipe.batch_size, micro, -(-share // micro), recipe.max_grad_norm)
        own = dict(zip(RECIPE, values, strict=True)) | {
            f"{name}.enabled": recipe.precision == precision for name, precision in PRECISIONS.items()
        }
        wrong = [f"{name} {value}, here {own[name]}" for name, value in self.repeated.items() if value != own[name]]
        if wrong:
            raise UserError(
                f"{self.source} does not match the run: {'; '.join(wrong)}\n"
                'give "auto" there, or the same by --batch-size, --micro-batch-size and --precision'
            )


def zero_config() -> ZeroConfig | None:
    """The configuration that ``accelerate launch`` set in the environment; None without DeepSpeed.

    Raises:
        UserError: it cannot be read or is not supported, or DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    if find_spec("deepspeed") is None:
        raise UserError(
            "accelerate launch is configured for DeepSpeed, which is not installed: pip install 'cnext[deepspeed]'"
        )
    source, config = _configuration()
    section = config.pop(SECTION, {})
    if not isinstance(section, dict):
        raise UserError(f"{source}: {SECTION}: expected an object, got {section!r}")
    stage = section.pop("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise UserError(f"{source}: {SECTION}.stage: expected one of 0, 1, 2 and 3, got {stage!r}")
    engine = _engine_settings(section) if stage == 3 else {}
    repeated = {name: config.pop(name) for name in RECIPE if name in config}
    for name in PRECISIONS:
        if isinstance(config.get(name), dict):
            # The loss scale of fp16 has no effect if it is off, and on never matches the recipe.
            precision = config.pop(name) if name == "fp16" else config[name]
            repeated[f"{name}.enabled"] = precision.pop("enabled", "auto")
    _check_supported(source, config, section)
    given = {name: value for name, value in repeated.items() if value != "auto"}
    return ZeroConfig(source, stage, {name: value for name, value in engine.items() if value != "auto"}, given)


def _engine_settings(section: dict[str, Any]) -> dict[str, Any]:
    """Takes the settings of stage 3 that DeepSpeed's engine supports out of a section zero_optimization."""
    engine = {name: section.pop(name) for name in ENGINE if name in section}
    offload = section.get("offload_param") or {}
    if isinstance(offload, dict) and offload.get("device", "none") in DEVICES:
        parts = {name: offload[name] for name in ("device", "pin_memory") if name in offload}
        engine |= {"offload_param": parts} if _has_effect(parts) else {}
        section["offload_param"] = {name: value for name, value in offload.items() if name not in parts}
    return engine


def _check_supported(source: str, config: dict[str, Any], section: dict[str, Any]) -> None:
    """Raises UserError naming the settings that are left and have an effect."""
    left = [name for name in config if _has_effect(config[name])]
    left += [f"{SECTION}.{name}" for name in section if _has_effect(section[name])]
    if left:
        raise UserError(
            f"{source} asks for settings that cnext does not support: {', '.join(left)}\n"
            'remove them or use "auto": optimizer, schedule and gradient reduction are cnext\'s own; of '
            f"{SECTION} it supports stage and, at stage 3, offload_param to the CPU, {', '.join(ENGINE)}"
        )


def _configuration() -> tuple[str, dict[str, Any]]:
    """Source and content of the configuration: DeepSpeed's own file, or else accelerate's settings."""
    given = {
        name.removeprefix(ACCELERATE).lower(): value
        for name, value in os.environ.items()
        if name.startswith(ACCELERATE) and value.lower() not in ("none", "false", "")
    }
    config: dict[str, Any]
    file = given.pop("config_file", None)
    if file is not None:
        try:
            config = parse_json(read_bytes(file))
        except (OSError, ValueError) as error:
            raise UserError(f"the DeepSpeed configuration {file} cannot be read: {error}") from error
        if not isinstance(config, dict) or SECTION not in config:
            raise UserError(f"the DeepSpeed configuration {file}: expected an object with {SECTION}")
        config[SECTION] = dict(config[SECTION]) if isinstance(config[SECTION], dict) else config[SECTION]
    else:
        # accelerate's default is stage 2.
        stage = given.pop("zero_stage", "2")
        section = {"stage": int(stage) if stage.isdecimal() else stage}
        config = {SECTION: section | {"offload_param": {"device": given.pop("offload_param_device", "none")}}}
    for name, kind in (("gradient_accumulation_steps", int), ("gradient_clipping", float)):
        value = os.environ.get(f"ACCELERATE_{name.upper()}", "auto")
        if value not in ("auto", "none"):
            config.setdefault(name, kind(value))
    return f"the DeepSpeed configuration {file}" if file else "accelerate's configuration", {**config, **given}


def _has_effect(value: Any) -> bool:
    """Whether a setting has an effect: it is not off, empty, or "auto"."""
    if isinstance(value, dict):
        return (
            value.get("enabled") is not False
            and value.get("device") != "none"
            and any(map(_has_effect, value.values()))
        )
    return value is not None and value is not False and value not in ("auto", [])


def adamw(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """AdamW; from ZeRO stage 1 on as PyTorch's ZeroRedundancyOptimizer, which partitions the moments.

    DeepSpeed's own optimizer steps from copies of the parameters, and would lose what a method changes in them.
    """
    zero = zero_config()
    if zero is None or zero.stage == 0 or collectives.world_size() == 1:
        return torch.optim.AdamW(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, **settings)


def moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict[str, Tensor]]:
    """The optimizer's state of each parameter; of partitioned ones on rank 0 only, {} on other ranks."""
    if isinstance(optimizer, torch.optim.AdamW):
        return [optimizer.state[parameter] for parameter in parameters]
    optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    found = optimizer.state_dict()["state"] if collectives.rank() == 0 else {}
    return [found.get(index, {}) for index, _ in enumerate(parameters)]


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW of this rank's partition of the parameters."""
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optim  # type: ignore[attr-defined]
