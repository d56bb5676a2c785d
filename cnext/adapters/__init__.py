"""Adapters: low-rank branches in linear layers, soft prompts, and their exchange with PEFT and the released files.

Here are the layers, attaching and detaching, and what decides which branches take part; not what trains them, which is
``cnext.methods``, nor the kernels, which are ``cnext.ops``.
"""

from cnext.adapters.attach import (
    SHARED,
    activate,
    activated,
    adapter_parameters,
    attach,
    branch_parameters,
    check_ranges,
    detach,
    holding,
    layers,
    set_trainable,
    trained_like,
)
from cnext.adapters.linear import AdapterLinear, Branch
from cnext.adapters.loading import load
from cnext.adapters.mage import AttachedMage, attach_mage
from cnext.adapters.roles import (
    BRANCH_ROLES,
    MODALITIES,
    BranchRole,
    branch_roles,
    check_modalities,
    modalities_of,
    position_roles,
    roles_of,
)
from cnext.adapters.shared_input import joined

__all__ = [
    "BRANCH_ROLES",
    "MODALITIES",
    "SHARED",
    "AdapterLinear",
    "AttachedMage",
    "Branch",
    "BranchRole",
    "activate",
    "activated",
    "adapter_parameters",
    "attach",
    "attach_mage",
    "branch_parameters",
    "branch_roles",
    "check_modalities",
    "check_ranges",
    "detach",
    "holding",
    "joined",
    "layers",
    "load",
    "modalities_of",
    "position_roles",
    "roles_of",
    "set_trainable",
    "trained_like",
]
