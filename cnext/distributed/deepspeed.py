"""DeepSpeed's ZeRO as ``accelerate launch`` asks for it: what of its configuration there is to obey, and the optimizer.

What a method trains is a few percent of the model and whole in every process, for methods read summed gradients and
change parameters between steps. So the stages mean, each with those before it:

* 1: the optimizer's moments are divided over the processes
* 2: gradients are whole until a method has read them, so that there is no more to divide
* 3: the frozen model is divided, by DeepSpeed's own engine (`zero_blocks.py`)

Everything else that a configuration asks for is refused by its name, for nothing would come of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnext.distributed import collectives
from cnext.errors import UserError, parse_json

ACCELERATE = "ACCELERATE_DEEPSPEED_"
SECTION = "zero_optimization"
STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu")
ENGINE = (
    "overlap_comm stage3_prefetch_bucket_size stage3_max_reuse_distance stage3_max_live_parameters "
    "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_params "
    "stage3_allgather_sequential memory_efficient_linear log_trace_cache_warnings enable_sanity_checks"
).split()
"""Settings of DeepSpeed's parameter partitioning, which stage 3 obeys, beside offload_param."""
RECIPE = "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping".split()
"""What the run's own settings decide: a configuration may repeat it."""
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Zero:
    """What is asked for. source: by what.  engine: settings of stage 3.  repeated: what the recipe has to be."""

    source: str
    stage: int
    engine: dict[str, Any]
    repeated: dict[str, Any]

    def check(self, recipe: Any) -> None:
        """Raises UserError where the recipe is another one than the configuration says."""
        share = recipe.batch_size // collectives.world_size()
        micro = recipe.micro_batch_size or share
        values = (recipe.batch_size, micro, -(-share // micro), recipe.max_grad_norm)
        own = dict(zip(RECIPE, values, strict=True)) | {
            f"{name}.enabled": recipe.precision == precision for name, precision in PRECISIONS.items()
        }
        wrong = [f"{name} {value}, here {own[name]}" for name, value in self.repeated.items() if value != own[name]]
        if wrong:
            raise UserError(
                f"{self.source} is for another run: {'; '.join(wrong)}\n"
                'give "auto" there, or the same by --batch-size, --micro-batch-size and --precision'
            )


def asked() -> Zero | None:
    """What accelerate has been asked for, where it has been asked for DeepSpeed.

    Raises: UserError for a configuration that cannot be read or obeyed, and where DeepSpeed is not installed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    if find_spec("deepspeed") is None:
        raise UserError("accelerate launch asks for DeepSpeed, which is not installed: pip install 'cnext[deepspeed]'")
    source, config = _configuration()
    section = config.pop(SECTION, {})
    if not isinstance(section, dict):
        raise UserError(f"{source}: {SECTION}: expected an object, got {section!r}")
    stage = section.pop("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise UserError(f"{source}: {SECTION}.stage: expected one of 0, 1, 2 and 3, got {stage!r}")
    engine = {name: section.pop(name) for name in ENGINE if name in section} if stage == 3 else {}
    offload = section.get("offload_param") or {}
    if stage == 3 and isinstance(offload, dict) and offload.get("device", "none") in DEVICES:
        parts = {name: offload[name] for name in ("device", "pin_memory") if name in offload}
        engine |= {"offload_param": parts} if _asks(parts) else {}
        section["offload_param"] = {name: value for name, value in offload.items() if name not in parts}
    repeated = {name: config.pop(name) for name in RECIPE if name in config}
    for name in PRECISIONS:
        if isinstance(config.get(name), dict):
            # How float16 would be scaled says nothing where it is off, and on is refused for the recipe's precision.
            precision = config.pop(name) if name == "fp16" else config[name]
            repeated[f"{name}.enabled"] = precision.pop("enabled", "auto")
    left = [*(name for name in config if _asks(config[name]))]
    left += [f"{SECTION}.{name}" for name in section if _asks(section[name])]
    if left:
        raise UserError(
            f"{source} asks for what cnext cannot give: {', '.join(left)}\n"
            'take it out, or give "auto": the optimizer, its schedule and the sums of gradients are cnext\'s own; of '
            f"{SECTION} it obeys stage and, at stage 3, offload_param to the CPU, {', '.join(ENGINE)}"
        )
    given = {name: value for name, value in repeated.items() if value != "auto"}
    return Zero(source, stage, {name: value for name, value in engine.items() if value != "auto"}, given)


def _configuration() -> tuple[str, dict[str, Any]]:
    """Where the configuration is from, and what is in it: DeepSpeed's own file, or else accelerate's settings."""
    given = {
        name.removeprefix(ACCELERATE).lower(): value
        for name, value in os.environ.items()
        if name.startswith(ACCELERATE) and value.lower() not in ("none", "false", "")
    }
    config: dict[str, Any]
    file = given.pop("config_file", None)
    if file is not None:
        try:
            config = parse_json(Path(file).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"the DeepSpeed configuration {file} cannot be read: {error}") from error
        if not isinstance(config, dict) or SECTION not in config:
            raise UserError(f"the DeepSpeed configuration {file}: expected an object with {SECTION}")
        config[SECTION] = dict(config[SECTION]) if isinstance(config[SECTION], dict) else config[SECTION]
    else:
        # As accelerate does, which takes stage 2 where none is given.
        stage = given.pop("zero_stage", "2")
        section = {"stage": int(stage) if stage.isdecimal() else stage}
        config = {SECTION: section | {"offload_param": {"device": given.pop("offload_param_device", "none")}}}
    for name, kind in (("gradient_accumulation_steps", int), ("gradient_clipping", float)):
        value = os.environ.get(f"ACCELERATE_{name.upper()}", "auto")
        if value not in ("auto", "none"):
            config.setdefault(name, kind(value))
    return f"the DeepSpeed configuration {file}" if file else "accelerate's configuration", {**config, **given}


def _asks(value: Any) -> bool:
    """Whether a setting asks for anything: no, where it is off, empty, or left to the program."""
    if isinstance(value, dict):
        return value.get("enabled") is not False and value.get("device") != "none" and any(map(_asks, value.values()))
    return value is not None and value is not False and value not in ("auto", [])


def adamw(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """AdamW. From stage 1 on a process holds the moments of its share of the parameters, and tells the others what
    has become of them: by PyTorch's ZeroRedundancyOptimizer, for DeepSpeed's own would step from copies that it keeps
    of the parameters, and forget what a method has changed in them."""
    zero = asked()
    if zero is None or zero.stage == 0 or collectives.world_size() == 1:
        return torch.optim.AdamW(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, **settings)


def moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[dict[str, Tensor]]:
    """What the optimizer keeps of each parameter: of divided ones in the first process alone, which writes them."""
    if isinstance(optimizer, torch.optim.AdamW):
        return [optimizer.state[parameter] for parameter in parameters]
    optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    found = optimizer.state_dict()["state"] if collectives.rank() == 0 else {}
    return [found.get(index, {}) for index, _ in enumerate(parameters)]


def held(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of this process's own share."""
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optim  # type: ignore[attr-defined]
