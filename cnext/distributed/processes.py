"""Set up a run in several processes, as torchrun or ``accelerate launch`` start them: process group, device, sharding.

Data parallel: each rank has its shard of every batch and of every task's test samples, and the same adapters. Gradients
are reduced before a method sees them, so averages and Fisher information are the same on all ranks. Only rank 0 writes
the run folder.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from cnext.distributed import collectives, start_check
from cnext.distributed.deepspeed import zero_config
from cnext.errors import RESUME, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Of a collective: rank 0 may be scoring the answers of a task while the others wait."""
REFUSED = timedelta(seconds=60)
"""That a process which cannot start waits for the others, to say so."""
REPORT_WITHIN = (3.0, 30.0)
"""Seconds, at least and at most, that surviving ranks have to report after one is lost. The longest is for loaded
machines, where some learn of it late."""
LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a launcher sets beside WORLD_SIZE."""
CONNECTION_ERRORS = ("gloo", "Connection closed by peer", "Connection reset by peer")
"""Words of errors of sending or receiving, which gloo raises as plain RuntimeErrors."""


def launched() -> int:
    """The number of processes that a launcher has started, from WORLD_SIZE; 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not (given.isdecimal() and int(given)):
        raise UserError(f"WORLD_SIZE, which a launcher sets, must be a number of processes, got {given!r}; unset it")
    return int(given)


@contextmanager
def refusals() -> Iterator[None]:
    """Context of what precedes `process_group`: a UserError of one process ends the others with its words."""
    try:
        yield
    except UserError as error:
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and collectives.world_size() == 1:
            # What the others say, or that they cannot be reached, is less than this.
            with suppress(UserError):
                _meet({}, str(error), REFUSED)
        raise


def _meet(settings: Mapping[str, Any], problem: str = "", timeout: timedelta = TIMEOUT) -> distributed.Store:
    """The store in which all processes have found that they were started alike. Raises UserError as `attend`."""
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment says WORLD_SIZE={launched()} without {', '.join(missing)}: "
            "start by torchrun or accelerate launch, or unset it"
        )
    rank = int(os.environ["RANK"])
    store = start_check.open_store(rank, launched(), timeout)
    start_check.attend(store, rank, launched(), settings, problem)
    return store


def _check_here(device: str) -> None:
    """Raises UserError where this process cannot take part."""
    if ":" in device:
        raise UserError(f"{device} is one GPU, and {launched()} processes need one each; give --device cuda")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("a run in several processes needs accelerate, not installed here: pip install 'cnext[hf]'")
    zero_config()
    gpus = torch.cuda.device_count()
    if device.startswith("cuda") and int(os.environ.get("LOCAL_RANK", "0")) >= gpus:
        raise UserError(f"{launched()} processes need a GPU each; torch sees {gpus} here: start fewer, or --device cpu")


def compare(settings: Mapping[str, Any], what: str) -> None:
    """Raises UserError on every rank where one has other settings than rank 0. what: what these are, in words."""
    if said := start_check.verdict(dict(enumerate(collectives.gather_shards([settings]))), what):
        raise UserError(said)


@contextmanager
def agreed() -> Iterator[None]:
    """Context without collectives: a UserError or OSError in it on one rank is a UserError on the others."""
    problem: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as error:
        problem = error
    said = collectives.gather_shards([str(problem) if problem else ""])
    if problem:
        raise problem
    if others := [f"rank {rank} cannot go on: {text}" for rank, text in enumerate(said) if text]:
        raise UserError("\n".join(others))


def first_alone(action: Callable[[], T]) -> T | None:
    """What rank 0 gets by an action, which it does alone; None on the others, which its error ends too."""
    with agreed():
        return None if collectives.rank() else action()


@contextmanager
def process_group(device: str, settings: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Context with a process group of the launcher's processes. Yields this rank's device.

    Without a launcher there is no group.

    Args:
        device: "cpu", or "cuda" for the GPU of each local rank.
        settings: what all processes must have been started with, as JSON takes it.

    Raises:
        UserError: the launcher's environment is incomplete, its port is in use, processes were started with other
            settings or versions, there are too few GPUs, the DeepSpeed configuration is not supported, or a process of
            the group was lost.
    """
    if launched() == 1 or collectives.world_size() > 1:
        compare(settings or {}, start_check.SETTINGS)
        yield own_device(device)
        return
    with refusals():
        _check_here(device)
    from accelerate import PartialState

    store = _meet({**start_check.environment(), **(settings or {})})
    PartialState(cpu=device == "cpu", timeout=TIMEOUT)
    del store  # whose server the group's store shares
    try:
        # No rank leaves, as one does whose configuration is refused, while another still connects.
        distributed.barrier()
        yield own_device(device)
        # No rank leaves while another still sends.
        distributed.barrier()
    except RuntimeError as error:
        if not (isinstance(error, distributed.DistError) or any(sign in str(error) for sign in CONNECTION_ERRORS)):
            raise
        raise UserError(
            f"{_lost_ranks()} was lost (killed, out of memory, or ended by an error that it shows itself): "
            f"everything up to the last checkpoint is saved; {RESUME}"
        ) from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        PartialState._reset_state()


def _lost_ranks() -> str:
    """The ranks that do not respond, in words. Leaves the group, so that no rank waits for this one.

    Every surviving rank reports in the group's store, and looks there for the others.
    """
    store: Any = distributed.distributed_c10d._get_default_store()
    size, rank = distributed.get_world_size(), distributed.get_rank()
    distributed.destroy_process_group()
    try:
        started = time.monotonic()

        def passed(least: float) -> bool:
            return time.monotonic() - started > least

        def silent(word: str) -> list[int]:
            return [other for other in range(size) if not store.check([f"cnext/{word}/{other}"])]

        store.set(f"cnext/here/{rank}", "")
        while not passed(REPORT_WITHIN[0]) or (len(silent("here")) > 1 and not passed(REPORT_WITHIN[1])):
            time.sleep(0.1)
        lost = silent("here")
        store.set(f"cnext/seen/{rank}", "")
        # Unless a launcher's agent keeps the store, rank 0 does, and leaves when all have looked.
        while rank == 0 and silent("seen") != lost and not passed(2 * REPORT_WITHIN[1]):
            time.sleep(0.1)
    except RuntimeError:
        # The store was lost with rank 0.
        lost = [0]
    return f"rank {', '.join(map(str, lost)) or 'unknown'} of {size}"


def own_device(device: str) -> str:
    """The device of this rank: "cuda" is the GPU of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and collectives.world_size() > 1 else device


def check(recipes: Iterable[Any]) -> None:
    """Raises UserError where a batch size is no multiple of the world size, or a DeepSpeed configuration differs."""
    zero = zero_config()
    for recipe in recipes:
        if recipe.batch_size % collectives.world_size():
            raise UserError(
                f"the batch size must be a multiple of the number of processes, {collectives.world_size()}, "
                f"got {recipe.batch_size}"
            )
        if zero:
            zero.check(recipe)


def sharded(model: nn.Module, trained: Iterable[nn.Parameter]) -> Callable[[], AbstractContextManager[None]]:
    """Shards the frozen parameters of a language model over all ranks, if the launcher is configured for it.

    By PyTorch's fully_shard (FSDP2) or DeepSpeed's ZeRO stage 3, one unit per transformer block, whose parameters are
    gathered while it computes. Replicated are trained parameters, a few percent, so that methods see plain tensors, and
    parameters outside the blocks, because backbones embed tokens without a forward pass.

    Args:
        trained: parameters to replicate.

    Returns:
        A context in which ranks may call the model a different number of times, as in generation.
    """
    zero = zero_config()
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if collectives.world_size() == 1 or not (fsdp or (zero and zero.stage == 3)):
        return nullcontext
    replicated = set(trained)
    blocks: list[Any] = list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=()))
    if zero:
        from cnext.distributed.deepspeed_blocks import Blocks

        return _uneven(model, Blocks(model, blocks, replicated, zero.engine).take_part)
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            "accelerate launch is configured for FSDP 1, which cannot have frozen and trained parameters in one block; "
            "use --fsdp_version 2"
        )
    from torch.distributed.fsdp import fully_shard

    # Nothing changes the output of a language model in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in blocks:
        fully_shard(block, ignored_params=replicated)
    # The root shards nothing itself. A block that is a root would not be resharded after its forward pass.
    fully_shard(model, ignored_params=set(model.parameters()))

    def take_part() -> None:
        for block in blocks:
            block.unshard()
            block.reshard()

    return _uneven(model, take_part)


@torch.no_grad()
def copy_whole(tensor: Tensor, parameter: nn.Parameter) -> None:
    """Copies a tensor into a parameter, which may be sharded as by `sharded`. Every rank has the whole tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = tensor.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.copy_(value)


@torch.no_grad()
def whole(parameter: nn.Parameter) -> Tensor:
    """The value of a parameter, which may be sharded as by `sharded`. Every rank calls this, and gets all of it."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed

        held: Any = parameter
        if held.ds_active_sub_modules:
            # Gathered, as the first block's after a backward pass, which the next forward pass ends.
            return parameter.detach().clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _uneven(model: nn.Module, take_part: Callable[[], None]) -> Callable[[], AbstractContextManager[None]]:
    """Context at whose end a rank takes part in the forward passes of the others, until all are done."""
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
