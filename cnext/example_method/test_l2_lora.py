"""The contract of all methods, and the mathematics of this one."""

from __future__ import annotations

import torch

from cnext.testing import check_method


def test_keeps_the_contract() -> None:
    check_method("l2-lora")


def test_the_penalty_is_the_squared_distance_to_the_old_values() -> None:
    from l2_lora import L2Lora

    method, parameter = L2Lora(strength=0.5), torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    method.before_task({"A": parameter}, steps=1, memory={})
    with torch.no_grad():
        parameter += torch.tensor([1.0, 2.0])
    assert torch.as_tensor(method.extra_loss([])).item() == 0.5 * (1.0 + 4.0)
