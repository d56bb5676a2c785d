"""Public ops. Each has a reference in plain torch, and all but one have kernels; see `cnext.ops.dispatch`."""

from cnext.ops.averaging import (
    adamw_pema_step_,
    dema_step_,
    ema_step_,
    fisher_accumulate_,
    pema_literal_,
    pema_merge_,
    pema_released_,
    pema_step_,
    prepare,
    sums,
)
from cnext.ops.branches import dropout_mask, lora_branches, lora_branches_grouped
from cnext.ops.dispatch import last_path
from cnext.ops.foreach import Prepared
from cnext.ops.rules import GUARDS

__all__ = [
    "GUARDS",
    "Prepared",
    "adamw_pema_step_",
    "dema_step_",
    "dropout_mask",
    "ema_step_",
    "fisher_accumulate_",
    "last_path",
    "lora_branches",
    "lora_branches_grouped",
    "pema_literal_",
    "pema_merge_",
    "pema_released_",
    "pema_step_",
    "prepare",
    "sums",
]
