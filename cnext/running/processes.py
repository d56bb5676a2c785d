"""A run in several processes, as torchrun or ``accelerate launch`` start them: joined, on their devices, sharded.

Each process has its share of every batch and of every task's test items, the same adapters, and the same random draws.
Gradients are added up before a method sees them, so that averages and Fisher information are the same in all. The
first process alone writes the run's folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cnext import ranks
from cnext.errors import UserError


def launched() -> int:
    """How many processes the launcher has started, by its environment; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the launcher's processes work together. Gives the device of this one. One process: nothing happens.

    Raises: UserError where the launcher asks for an engine that cnext has no use for, or for more GPUs than there are.
    """
    if launched() == 1 or ranks.count() > 1:
        yield own_device(device)
        return
    from accelerate import PartialState
    from torch import distributed

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "accelerate launch asks for DeepSpeed, which cnext does not run: only the adapters are trained, so that "
            "there is little optimizer state to divide; for a model that is too large for one device divide the frozen "
            "model, by accelerate launch --use_fsdp --fsdp_version 2"
        )
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and int(os.environ.get("LOCAL_RANK", "0")) >= gpus:
        raise UserError(f"{launched()} processes need a GPU each; torch sees {gpus} here: start fewer, or --device cpu")
    PartialState(cpu=device == "cpu")
    try:
        yield own_device(device)
        # Nobody leaves while another still sends.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
        PartialState._reset_state()


def own_device(device: str) -> str:
    """The device of this process: of "cuda" the one with its number."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and ranks.count() > 1 else device


def sharded(model: nn.Module, trained: Iterable[nn.Parameter]) -> nn.Module:
    """Divides the frozen parameters of a language model over the processes, where the launcher asks for FSDP.

    By PyTorch's fully_shard (FSDP2), block by block: a block's parameters are together while it computes, and a
    process holds its share at other times. Whole in every process are what is trained, a few percent at most, so that
    methods see plain tensors, and what is outside of the blocks: backbones look words up without a forward pass.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") != "true" or ranks.count() == 1:
        return model
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            "accelerate launch asks for FSDP 1, which cannot hold frozen and trained parameters in one block; "
            "give --fsdp_version 2"
        )
    from torch.distributed.fsdp import fully_shard

    whole = set(trained)
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    for block in blocks:
        fully_shard(block, ignored_params=whole)
    return model
