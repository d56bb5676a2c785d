"""Two tasks with an averaging rule in one process or several; a program: torchrun processes.py RULE FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from integrations.trainers import TASKS, arguments, assert_equal, attached, train, values
from safetensors.torch import save_file
from torch import Tensor, distributed

from cnext.distributed import collectives
from cnext.integrations.transformers import AveragingCallback


def trained(rule: str, folder: Path, accumulation: int) -> dict[str, Tensor]:
    """The parameters and the average's state; the second task is also resumed, which changes nothing."""
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    if "WORLD_SIZE" in os.environ:
        saves |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    # epsilon: Adam would make whole steps of gradients as small as what sums in another order differ by.
    options = {**saves, "gradient_accumulation_steps": accumulation, "adam_epsilon": 1e-4}
    handle, callback = attached(), AveragingCallback(rule)
    for task, (reads, writes) in enumerate(TASKS):
        handle.train_on(reads, writes)
        train(handle.model, arguments(folder / str(task), **options), task, callback)
    again, other = attached(), AveragingCallback(rule)
    other.load(folder / "0" / "checkpoint-6")
    again.train_on(*TASKS[1])
    train(again.model, arguments(folder / "1", **options), 1, other, resume=str(folder / "1" / "checkpoint-4"))
    assert_equal(values(again.model), values(handle.model))
    return values(handle.model) | {f"average.{n}": tensor for n, tensor in callback.average.state_dict().items()}


def main(rule: str, folder: Path) -> None:
    torch.set_num_threads(1)
    found = trained(rule, folder, accumulation=2)
    flat = torch.cat([tensor.double().reshape(-1) for tensor in found.values()])
    assert torch.equal(*collectives.all_gather(flat[None])), "the processes differ"
    if distributed.get_rank() == 0:
        save_file(found, folder / "found.safetensors")
    if distributed.is_initialized():
        distributed.barrier()
        # DistributedDataParallel keeps the group beyond its destruction. A thread of gloo that releases a tensor while
        # the interpreter ends now and then aborts the process, so the interpreter does not end.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
