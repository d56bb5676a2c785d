"""A checkpoint whose seals fit, and whose tensors are not the run's: refused with the tensor named, nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnext.errors import UserError
from cnext.runs import checkpoint, state_digests
from cnext.training.runner import Runner
from cnext.training.state import RunState


class Method:
    """Keeps what it is given, of the names it knows."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {"count": torch.tensor(0)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.kept

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.kept = {"count": torch.tensor(int(state["count"])), "mean": state["mean"] + torch.zeros(3)}


Tensors = dict[str, dict[str, Tensor]]


def stored() -> Tensors:
    """What a checkpoint within a task has."""
    return {
        "adapters": {"a.A": torch.ones(2, 3), "a.B": torch.ones(4, 2)},
        "method": {"count": torch.tensor(3), "mean": torch.ones(3)},
        "optimizer": {"step:a.B": torch.tensor(5.0), "exp_avg:a.B": torch.ones(4, 2)},
    }


def put(kind: str, name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[kind].__setitem__(name, tensor)


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "shape": (put("adapters", "a.B", torch.ones(2, 4)), r"a.B is float32 \(2, 4\), expected float32 \(4, 2\)"),
    "one value": (put("adapters", "a.B", torch.ones(1)), r"a.B is float32 \(1,\), expected float32 \(4, 2\)"),
    "dtype": (put("adapters", "a.A", torch.ones(2, 3).half()), r"a.A is float16 \(2, 3\), expected float32"),
    "integers": (put("adapters", "a.A", torch.ones(2, 3, dtype=torch.int32)), r"a.A is int32"),
    "missing": (lambda tensors: tensors["adapters"].pop("a.A"), r"a.A is missing, expected float32 \(2, 3\)"),
    "strange": (put("adapters", "b.A", torch.ones(1)), r"b.A is float32 \(1,\), expected no such tensor"),
    "no method": (lambda tensors: tensors.pop("method"), r"lacks method.safetensors"),
    "no adapters": (lambda tensors: tensors.pop("adapters"), r"lacks adapters.safetensors"),
    "moment": (
        put("optimizer", "exp_avg:a.B", torch.ones(2)),
        r"exp_avg:a.B is float32 \(2,\), expected float32",
    ),
    "moment of none": (put("optimizer", "exp_avg:c", torch.ones(2)), r"exp_avg:c is .*, expected no such parameter"),
    "steps": (put("optimizer", "step:a.B", torch.ones(2)), r"step:a.B is float32 \(2,\), expected float32 \(\)"),
    "method's name": (put("method", "other", torch.ones(3)), r"other is float32 \(3,\), expected no such tensor"),
    "method lacks": (lambda tensors: tensors["method"].pop("count"), r"does not fit the method: KeyError: 'count'"),
    "method's shape": (put("method", "mean", torch.ones(2)), r"does not fit the method: RuntimeError"),
    "method's value": (put("method", "mean", torch.ones(1)), r"mean is float32 \(1,\), expected float32 \(3,\)"),
}


def runner(path: Path, said: list[str]) -> Runner:
    """A runner with the state that `resume` needs, on a checkpoint as `RunFolder.furthest` returns it."""
    made = object.__new__(Runner)
    made.parameters = {name: nn.Parameter(torch.zeros_like(each)) for name, each in stored()["adapters"].items()}
    made.ready, made.method, made.state = SimpleNamespace(initial=None), Method(), RunState()  # pyright: ignore
    made.progress = SimpleNamespace(say=said.append)  # pyright: ignore
    made.folder = SimpleNamespace(run=None, furthest=lambda _: (path, *checkpoint.load(path)))  # pyright: ignore
    made.data = {}
    made._cut_logs = lambda folder: None
    return made


def saved(tmp_path: Path, tensors: Tensors, digests: list[dict[str, Any]] | None = None, step: int = 0) -> Path:
    values = {"tasks_done": 1, "step": step, "ledger": {"digests": digests or []}}
    checkpoint.save(tmp_path / "1_a", tensors, values)
    return tmp_path / "1_a"


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_fit_is_named_and_not_copied(case: str, tmp_path: Path) -> None:
    change, message = CHANGES[case]
    tensors = stored()
    change(tensors)
    resuming = runner(saved(tmp_path, tensors), [])
    with pytest.raises(UserError, match=message) as error:
        resuming.resume()
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    if "method" not in case:
        assert not any(parameter.any() for parameter in resuming.parameters.values())


def test_what_fits_is_restored(tmp_path: Path) -> None:
    """Also of an earlier version, without digests."""
    tensors, said = stored(), []
    known = [{"stage": 1, "trained": "a", "sha256": state_digests.digest(tensors)}]
    for digests in (None, known):
        resuming = runner(saved(tmp_path, tensors, digests), said)
        resuming.resume()
        assert all(torch.equal(each, tensors["adapters"][name]) for name, each in resuming.parameters.items())
        assert int(resuming.method.state_dict()["count"]) == 3
    assert said == ["resuming from 1_a"] * 2


def test_tensors_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    """The files and their checksums are another run's, the ledger is this one's."""
    tensors = stored()
    known = [{"stage": 1, "trained": "a", "sha256": state_digests.digest(tensors)}]
    tensors["adapters"]["a.A"] += 1
    with pytest.raises(UserError, match=r"1_a: its tensors are not those of the digest in its manifest.json"):
        runner(saved(tmp_path, tensors, known), []).resume()
    runner(saved(tmp_path, tensors, known, step=2), []).resume()
