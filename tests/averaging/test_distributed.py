"""Two processes over gloo: every rule gives both ranks the same average, the one that a single process would get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from cnext.averaging import RULES

STEPS, RANKS, BATCH = 6, 2, 4


def train(rule: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Two tasks; rank None: one process sees what both ranks see together. Returns parameters and state."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    network = plain if rank is None else DistributedDataParallel(plain)
    average = RULES[rule]()
    for task in range(2):
        # Plain descent: Adam would blow the last bit's difference between two summations up to a step's size.
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        average.begin_task(dict(plain.named_parameters()), STEPS)
        for step in range(STEPS):
            seen = torch.randn(RANKS, BATCH, 5, generator=torch.Generator().manual_seed(100 * task + step))
            batch = seen.flatten(0, 1) if rank is None else seen[rank]
            (network(batch) - task).square().mean().backward()
            average.update()
            optimizer.step()
            optimizer.zero_grad()
        average.end_task()
    return {**{name: p.detach().clone() for name, p in plain.named_parameters()}, **average.state_dict()}


def worker(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS)
    for rule in RULES:
        save_file(train(rule, rank), folder / f"{rule}-{rank}.safetensors")
    # No rank may leave while another is still in a collective: gloo's threads would be torn down under it.
    distributed.barrier()
    distributed.destroy_process_group()
    # What is left is torch's teardown at the interpreter's end, where a thread of gloo's that still runs aborts it.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from waiting import outputs  # which this file does not find as a program of its own

    made = tmp_path_factory.mktemp("ranks")
    commands = [[sys.executable, "-W", "ignore", __file__, str(rank), str(made)] for rank in range(RANKS)]
    processes = [subprocess.Popen(command) for command in commands]
    outputs(processes)
    assert [process.returncode for process in processes] == [0] * RANKS
    return made


@pytest.mark.parametrize("rule", RULES)
def test_both_ranks_have_the_same_bits(rule: str, folder: Path) -> None:
    one, other = (load_file(folder / f"{rule}-{rank}.safetensors") for rank in range(RANKS))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore:pema-literal")
def test_ranks_agree_with_one_process(rule: str, folder: Path) -> None:
    ranked, single = load_file(folder / f"{rule}-0.safetensors"), train(rule, None)
    assert ranked.keys() == single.keys()
    for key in single:
        torch.testing.assert_close(ranked[key], single[key], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
