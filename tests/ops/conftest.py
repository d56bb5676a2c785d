"""Memory that an op forgets to write is NaN, so that nothing passes by luck."""

import os

import pytest
import torch

from cnext.ops import dispatch

ON_CPU = os.environ.get("CNEXT_TEST_DEVICE", "cpu") == "cpu"
CPP = ON_CPU and not dispatch.missing("cpp", "cpu") and os.environ.get("CNEXT_TEST_IMPL", "cpp") == "cpp"
# The stand-in of the first reads addresses of the host, and the second is of the C++ kernels.
collect_ignore = ["test_branches_launches.py"] * (not ON_CPU) + ["test_low_rank_kernels.py"] * (not CPP)


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
