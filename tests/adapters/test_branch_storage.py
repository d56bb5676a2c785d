"""Branch parameters when a model is moved, copied, loaded, optimized, distributed or merged."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters.test_adapters import filled
from waiting import outputs

from cnext.adapters import AdapterLinear
from cnext.errors import UserError


def layer(ranks: tuple[int, ...] = (2, 3, 1), dtype: torch.dtype = torch.float32, **options: float) -> AdapterLinear:
    torch.manual_seed(0)
    return filled(5, 7, {str(i): rank for i, rank in enumerate(ranks)}, **options).to(dtype)


def joined(made: AdapterLinear) -> bool:
    """Whether every A begins where the one before ends."""
    parts = [branch.A for branch in made.branches.values()]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    return ends[:-1] == [part.data_ptr() for part in parts[1:]]


def by_hand(made: AdapterLinear, x: torch.Tensor) -> torch.Tensor:
    terms = [made.scale * (x @ branch.A.T) @ branch.B.T for branch in made.branches.values()]
    return torch.nn.functional.linear(x, made.base.weight, made.base.bias) + sum(terms)


@torch.no_grad()
def moved(made: AdapterLinear, how: str) -> AdapterLinear:
    if how == "deepcopy":
        return copy.deepcopy(made)
    if how == "to":
        return made.to(torch.float64).to(torch.float32)
    if how == "load":
        other = layer()
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(made.state_dict())
        return other
    if how == "assign":
        other = layer()
        other.load_state_dict({name: tensor.clone() for name, tensor in made.state_dict().items()}, assign=True)
        return other
    return made


@pytest.mark.parametrize("how", ["as made", "deepcopy", "to", "load", "assign"])
def test_every_a_is_a_view_of_one_matrix(how: str) -> None:
    made = layer(scale=0.5)
    other, x = moved(made, how), torch.randn(4, 7)
    assert joined(other) == (how != "assign")
    assert all(part.is_contiguous() for part in other.parameters())
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in made.parameters()} or other is made
    other.scale = 0.5
    torch.testing.assert_close(other(x), by_hand(made, x))
    with torch.no_grad():
        other.branches["1"].A.add_(1.0)
    torch.testing.assert_close(other(x), by_hand(other, x))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_an_optimizer_changes_only_trainable_branches(options: dict[str, bool]) -> None:
    made, x = layer(), torch.randn(4, 7)
    made.branches["1"].requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
    live = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=0.1, **options)
    for _ in range(2):
        made(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in made.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"branches.{branch}.{part}" for branch in "02" for part in "AB"}
    assert joined(made)
    torch.testing.assert_close(made(x), by_hand(made, x))


def test_gradients_do_not_share_memory_across_branches() -> None:
    made = layer()
    made(torch.randn(4, 7)).sum().backward()
    grads = [p.grad for p in made.parameters() if p.requires_grad]
    kept = [grad.clone() for grad in grads[1:]]
    grads[0].zero_()
    assert all(torch.equal(one, other) for one, other in zip(grads[1:], kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_sums_in_float32_and_unmerge_is_exact(dtype: torch.dtype) -> None:
    made = layer(dtype=dtype, scale=0.5)
    original = made.base.weight.detach().clone()
    delta = sum(branch.B.float() @ branch.A.float() for branch in made.branches.values())
    made.merge()
    assert made.merged
    assert not torch.equal(made.base.weight, original)
    torch.testing.assert_close(made.base.weight, (original.float() + 0.5 * delta).to(dtype), rtol=1e-2, atol=1e-6)
    x = torch.randn(4, 7, dtype=dtype)
    assert torch.equal(made(x), made.base(x))
    with pytest.raises(UserError, match="merged already"):
        made.merge()
    made.unmerge()
    assert torch.equal(made.base.weight, original)
    with pytest.raises(UserError, match="not merged"):
        made.unmerge()


def test_merged_and_unmerged_agree() -> None:
    made, x = layer(dropout=0.5).double().eval(), torch.randn(4, 7, dtype=torch.float64)
    before = made(x)
    made.merge()
    torch.testing.assert_close(made(x), before)


def test_a_merged_layer_may_be_moved_and_copied() -> None:
    made = layer()
    original = made.base.weight.detach().clone()
    made.merge()
    other = copy.deepcopy(made).double().float()
    other.unmerge()
    made.unmerge()
    assert torch.equal(other.base.weight, original)


def test_an_independent_mask_differs_from_a_shared_one() -> None:
    outputs = {}
    for independent in (False, True):
        made = layer(dropout=0.5, independent=independent)
        torch.manual_seed(1)
        outputs[independent] = made(torch.ones(4, 7))
    assert not torch.equal(outputs[False], outputs[True])


DISTRIBUTED = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
here = os.path.dirname(sys.argv[1])
sys.path[:0] = [here, os.path.dirname(here)]
from test_branch_storage import layer

torch.set_num_threads(1)
rank, how = int(sys.argv[2]), sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
torch.manual_seed(5)
x = torch.randn(8, 7)
alone, made = layer(), layer()
for one in (alone, made):
    one.branches["1"].requires_grad_(False)
wrapped = DistributedDataParallel(made) if how == "ddp" else fully_shard(made, mesh=init_device_mesh("cpu", (2,)))
if how == "fsdp":
    # Before torch 2.15 at least gloo gives the sum where FSDP asks it for the mean.
    wrapped.set_force_sum_reduction_for_comms(True)
for model, data in ((wrapped, x[rank * 4 : rank * 4 + 4]), (alone, x)):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
for (name, one), (_, other) in zip(made.named_parameters(), alone.named_parameters(), strict=True):
    whole = one.full_tensor() if how == "fsdp" else one
    torch.testing.assert_close(whole.detach(), other.detach(), msg=name)
# No rank may leave while another is still in a collective: gloo's threads would be torn down under it.
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(how: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISTRIBUTED, __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), how],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [error for _, error in outputs(ranks)]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)[-4000:]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch before 2.9's own
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_layer_is_one_graph(dropout: float) -> None:
    made, x = layer(dropout=dropout), torch.randn(4, 7, requires_grad=True)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in made.branches.parameters())
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), by_hand(made, x))
