"""A run in several processes, as torchrun or ``accelerate launch`` start them: joined, on their devices, sharded.

Each process has its share of every batch and of every task's test items, the same adapters, and the same random draws.
Gradients are added up before a method sees them, so that averages and Fisher information are the same in all. The
first process alone writes the run's folder.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

from cnext.distributed import collectives
from cnext.distributed.deepspeed import asked
from cnext.errors import GO_ON, UserError

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another, which may be scoring the answers of a task meanwhile."""
ROLL_CALL = (3.0, 30.0)
"""Seconds that those who are left have to say so when one is lost: at least, and at most while more than one is silent,
as on a loaded machine some hear of it late."""
LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells every process, beside how many there are."""
CUT_OFF = ("gloo", "Connection closed by peer", "Connection reset by peer")
"""Signs of an error of sending or receiving; gloo raises plain RuntimeErrors."""


def launched() -> int:
    """How many processes the launcher has started, by its environment; 1 without one."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not (given.isdecimal() and int(given)):
        raise UserError(f"WORLD_SIZE, which a launcher sets, must be a number of processes, got {given!r}; unset it")
    return int(given)


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the launcher's processes work together. Gives the device of this one. One process: nothing happens.

    Raises: UserError where the launcher asks for an engine that cnext has no use for, or for more GPUs than there are.
    """
    if launched() == 1 or collectives.world_size() > 1:
        yield own_device(device)
        return
    from accelerate import PartialState

    asked()
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and int(os.environ.get("LOCAL_RANK", "0")) >= gpus:
        raise UserError(f"{launched()} processes need a GPU each; torch sees {gpus} here: start fewer, or --device cpu")
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment says WORLD_SIZE={launched()} without {', '.join(missing)}: "
            "start by torchrun or accelerate launch, or unset it"
        )
    PartialState(cpu=device == "cpu", timeout=PATIENCE)
    try:
        yield own_device(device)
        # Nobody leaves while another still sends.
        distributed.barrier()
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or any(sign in str(error) for sign in CUT_OFF)):
            raise
        raise UserError(
            f"{_missing()} was lost (killed, out of memory, or ended by an error that it tells of itself): "
            f"all finished blocks are saved; {GO_ON}"
        ) from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        PartialState._reset_state()


def _missing() -> str:
    """Which process does not answer any more, in words. Leaves the group, so that none waits for this one."""
    store: Any = distributed.distributed_c10d._get_default_store()
    count, number = distributed.get_world_size(), distributed.get_rank()
    distributed.destroy_process_group()
    try:
        begun = time.monotonic()

        def passed(least: float) -> bool:
            return time.monotonic() - begun > least

        def silent(word: str) -> list[int]:
            return [other for other in range(count) if not store.check([f"cnext/{word}/{other}"])]

        store.set(f"cnext/here/{number}", "")
        while not passed(ROLL_CALL[0]) or (len(silent("here")) > 1 and not passed(ROLL_CALL[1])):
            time.sleep(0.1)
        gone = silent("here")
        store.set(f"cnext/seen/{number}", "")
        # The first has the store where no launcher's agent keeps it, and leaves when all have looked.
        while number == 0 and silent("seen") != gone and not passed(2 * ROLL_CALL[1]):
            time.sleep(0.1)
    except RuntimeError:
        # The store is gone with the process that has it, the first one where no launcher's agent keeps it.
        gone = [0]
    return f"process {', '.join(map(str, gone)) or 'unknown'} of {count} (counted from 0)"


def own_device(device: str) -> str:
    """The device of this process: of "cuda" the one with its number."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and collectives.world_size() > 1 else device


def check(recipes: Iterable[Any]) -> None:
    """Raises UserError where the processes cannot share a batch, or the launcher's configuration has another recipe."""
    zero = asked()
    for recipe in recipes:
        if recipe.batch_size % collectives.world_size():
            raise UserError(
                f"the batch size must be a multiple of the number of processes, {collectives.world_size()}, "
                f"got {recipe.batch_size}"
            )
        if zero:
            zero.check(recipe)


def sharded(model: nn.Module, trained: Iterable[nn.Parameter]) -> Callable[[], AbstractContextManager[None]]:
    """Divides the frozen parameters of a language model over the processes, where the launcher asks for it.

    By PyTorch's fully_shard (FSDP2) or DeepSpeed's ZeRO stage 3, block by block: a block's parameters are together
    while it computes, and a process holds its share at other times. Whole in every process are what is trained, a few
    percent at most, so that methods see plain tensors, and what is outside of the blocks: backbones look words up
    without a forward pass.

    Returns: what to enter where processes may call the model unequally often, as when they write answers.
    """
    zero = asked()
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if collectives.world_size() == 1 or not (fsdp or (zero and zero.stage == 3)):
        return nullcontext
    whole = set(trained)
    blocks: list[Any] = list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=()))
    if zero:
        from cnext.distributed.deepspeed_blocks import Blocks

        return _unevenly(model, Blocks(model, blocks, whole, zero.engine).take_part)
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            "accelerate launch asks for FSDP 1, which cannot hold frozen and trained parameters in one block; "
            "give --fsdp_version 2"
        )
    from torch.distributed.fsdp import fully_shard

    # What a language model returns is changed in place by nobody.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in blocks:
        fully_shard(block, ignored_params=whole)
    # The root of them all, with no share of its own: a block that is a root stays together for good after it computes.
    fully_shard(model, ignored_params=set(model.parameters()))

    def take_part() -> None:
        for block in blocks:
            block.unshard()
            block.reshard()

    return _unevenly(model, take_part)


def _unevenly(model: nn.Module, take_part: Callable[[], None]) -> Callable[[], AbstractContextManager[None]]:
    """A context of which a process leaves when all are done; until then it takes part in the others' forward passes."""
    device = next(model.parameters()).device

    def announce(*_: object) -> None:
        collectives.all_reduce(1.0, device=device)

    @contextmanager
    def together() -> Iterator[None]:
        hook = model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        while collectives.all_reduce(0.0, device=device) != (0.0,):
            take_part()

    return together
