"""ZeRO stage 3 for the frozen model: transformer blocks partitioned by DeepSpeed, trained parameters replicated.

DeepSpeed gets one module per block, which holds the block's frozen parameters, and is called before and after the
block's forward and backward passes. It gathers the parameters, prefetching where it knows the order, and releases them.
The block's own modules and trained parameters are not changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnext.errors import UserError


class Blocks:
    """Partitions the blocks of a model over all ranks. A block's parameters are gathered while it computes.

    Args:
        model: the module whose forward pass calls the blocks, each once.
        replicated: parameters that stay whole on every rank.
        settings: of a DeepSpeed configuration's section zero_optimization.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], replicated: set[nn.Parameter], settings: Mapping[str, Any]
    ) -> None:
        self.shares = {block: nn.Module() for block in blocks}
        for block, share in self.shares.items():
            for number, parameter in enumerate(p for p in block.parameters() if p not in replicated):
                share.register_parameter(str(number), parameter)
        self.engine = _engine(nn.ModuleList(self.shares.values()), settings)
        self.backward: set[nn.Module] = set()
        """Blocks in their backward pass, which may recompute activations."""
        model.register_forward_pre_hook(lambda *_: self._begin())
        for block in self.shares:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)

    def take_part(self) -> None:
        """Takes part in the collectives of a forward pass on another rank."""
        self._begin()
        for share in self.shares.values():
            self.engine.pre_sub_module_forward_function(share)
            self.engine.post_sub_module_forward_function(share)

    def _begin(self) -> None:
        # The first block's input needs no gradient, so no hook has ended its backward pass.
        for block in list(self.backward):
            self._end_backward(block)
        self.engine.get_param_coordinator().reset_step()

    def _enter(self, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if block in self.backward:
            return
        self.engine.pre_sub_module_forward_function(self.shares[block])
        _when_gradient((*arguments, *named.values()), lambda: self._end_backward(block))

    def _leave(self, block: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if block in self.backward:
            return
        self.engine.post_sub_module_forward_function(self.shares[block])
        _when_gradient(output if isinstance(output, tuple) else (output,), lambda: self._begin_backward(block))

    def _begin_backward(self, block: nn.Module) -> None:
        if block not in self.backward:
            self.backward.add(block)
            self.engine.pre_sub_module_backward_function(self.shares[block])

    def _end_backward(self, block: nn.Module) -> None:
        if block in self.backward:
            self.backward.remove(block)
            self.engine.post_sub_module_backward_function(self.shares[block])


def _when_gradient(values: Iterable[Any], do: Callable[[], None]) -> None:
    """Calls ``do`` in the backward pass when the gradient of any of the tensors is computed."""
    for value in values if torch.is_grad_enabled() else ():
        if isinstance(value, Tensor) and value.requires_grad:
            # A hook that returns None leaves the gradient as it is.
            value.register_hook(lambda _: do())


def _engine(shares: nn.Module, settings: Mapping[str, Any]) -> Any:
    """DeepSpeed's parameter partitioning over all ranks. Raises UserError for settings that it does not take."""
    kind = next(shares.parameters()).device.type
    os.environ.setdefault("DS_ACCELERATOR", kind)
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    # Off by default: it replaces torch's linear everywhere, which layers with adapters do not call.
    section = {"memory_efficient_linear": False, **settings, "stage": 3}
    try:
        zero = DeepSpeedZeroConfig(**section)
    except ValueError as error:
        raise UserError(f"DeepSpeed does not take these settings of zero_optimization:\n{error}") from error
    if kind == "cpu":
        # It would compile a kernel for about a minute, for an operation that is not used.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(verbose=False)
    return DeepSpeedZeRoOffload(
        module=shares,
        timers=None,
        ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": section},
        overlap_comm=bool(zero.overlap_comm),
        prefetch_bucket_size=zero.prefetch_bucket_size,
        max_reuse_distance=zero.max_reuse_distance,
        max_live_parameters=zero.max_live_parameters,
        param_persistence_threshold=zero.param_persistence_threshold,
        model_persistence_threshold=zero.model_persistence_threshold,
        offload_param_config=zero.offload_param,
        log_trace_cache_warnings=zero.log_trace_cache_warnings,
    )
