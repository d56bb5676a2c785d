"""Memory that an op forgets to write is NaN, so that nothing passes by luck."""

import os

import pytest
import torch

# Its stand-in reads addresses of the host.
collect_ignore = ["test_branches_launches.py"] if os.environ.get("CNEXT_TEST_DEVICE", "cpu") != "cpu" else []


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.detach().fill_(float("nan"))
            return tensor

        monkeypatch.setattr(owner, name, poisoned)
