"""Public ops on tensors: moving averages, and linear layers with low-rank branches.

Each has a reference in plain torch, and all but `pema_released_` have kernels (csrc, kernels/triton). Modules, and all
that knows of tasks, are in cnext.adapters and cnext.averaging.
"""

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
from cnext.ops.averaging_table import GUARDS, Guard
from cnext.ops.branches import dropout_mask, lora_branches, lora_branches_grouped
from cnext.ops.dispatch import BRANCH_IMPLS, IMPLS, BranchImpl, Impl, last_path
from cnext.ops.foreach import Prepared
from cnext.ops.kron import kron_accumulate_, kron_merge_, kron_pull_

__all__ = [
    "BRANCH_IMPLS",
    "GUARDS",
    "IMPLS",
    "BranchImpl",
    "Guard",
    "Impl",
    "Prepared",
    "adamw_pema_step_",
    "dema_step_",
    "dropout_mask",
    "ema_step_",
    "fisher_accumulate_",
    "kron_accumulate_",
    "kron_merge_",
    "kron_pull_",
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
