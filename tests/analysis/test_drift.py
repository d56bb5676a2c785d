"""Drift of adapters against updates formed whole, and what its checkpoints may lack."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis.small_runs import TASKS, write, write_checkpoint

from cnext.analysis import ANALYSES
from cnext.analysis.groups import RunGroups
from cnext.analysis.result import Unavailable
from cnext.analysis.run import Run
from cnext.analysis.updates import inner_products, read
from cnext.cli import main
from cnext.errors import UserError
from cnext.runs.schemas import Init
from cnext.tables import aggregate

NAMES = [
    f"layers.{layer}.{projection}.{branch}"
    for layer in (0, 1, 10)
    for projection in ("mlp.up_proj", "self_attn.q_proj")
    for branch in ("general", "expert")
]


@pytest.fixture(scope="module")
def drifted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """A run's folder, and each branch's updates formed whole. The second task leaves the expert as it was."""
    torch.manual_seed(0)
    folder = write(tmp_path_factory.mktemp("drift") / "run")
    updates: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    a, b = ({name: torch.randn(*size) for name in NAMES} for size in ((2, 5), (7, 2)))
    before = {name: np.zeros((7, 5)) for name in NAMES}
    for stage in (1, 2, 3):
        for name in NAMES:
            if stage == 1 or (stage == 2) <= name.endswith("general"):
                a[name] = a[name] + 0.3 * torch.randn(2, 5)
                b[name] = b[name] + 0.3 * torch.randn(7, 2)
            product = b[name].double().numpy() @ a[name].double().numpy()
            updates[name].append(product - before[name])
            before[name] = product
        halves = ((name, half, of[name]) for name in NAMES for half, of in (("A", a), ("B", b)))
        write_checkpoint(folder, stage, {f"{name}.{half}": tensor.contiguous() for name, half, tensor in halves})
    return folder, updates


def flat(updates: dict[str, list[np.ndarray]], task: int, has: str = "") -> np.ndarray:
    return np.concatenate([of[task].ravel() for name, of in updates.items() if has in name])


def test_norms_cosines_and_distances(drifted: tuple[Path, dict]) -> None:
    folder, updates = drifted
    found = read(Run.read(folder))
    assert found.branches == ["expert", "general"]
    assert found.layers == [0, 1, 10]
    norms = found.norms()
    for name, of in updates.items():
        _, layer, *projection, branch = name.split(".")
        place = (found.branches.index(branch), slice(None), found.layers.index(int(layer)))
        expected = [np.linalg.norm(update) for update in of]
        assert norms[place][:, found.projections.index(".".join(projection))] == pytest.approx(expected, rel=1e-6)
    cosines, of_general = found.cosines(), found.cosines(found.of("general", [1, 10]))
    for s, t in itertools.combinations(range(3), 2):
        one, other = flat(updates, s), flat(updates, t)
        assert cosines[s, t] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-6)
        parts = [np.concatenate([flat(updates, task, f"layers.{n}.") for n in (1, 10)]) for task in (s, t)]
        kept = np.concatenate([np.tile("general" in name, 35) for name in NAMES if not name.startswith("layers.0.")])
        one, other = (part[kept] for part in parts)
        assert of_general[s, t] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-6)
        between = sum(flat(updates, task) for task in range(s + 1, t + 1))
        assert found.distances()[s + 1, t + 1] == pytest.approx(np.linalg.norm(between), rel=1e-6)
    assert found.distances()[0, 1] == pytest.approx(np.linalg.norm(flat(updates, 0)), rel=1e-6)


def test_a_branch_that_stayed_moved_by_nothing(drifted: tuple[Path, dict]) -> None:
    found = read(Run.read(drifted[0]))
    expert = found.branches.index("expert")
    assert (found.norms()[expert, 1] == 0).all()
    assert found.branch_shares()[expert, 1] == 0
    assert np.isnan(found.cosines(found.of("expert"))[0, 1])


def test_rounding_is_no_update() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 300).double().numpy(), torch.randn(200, 4).double().numpy()
    assert inner_products([a, a[::-1].copy()], [b, b[:, ::-1].copy()])[1, 1] == 0, "the same product, otherwise summed"


def test_what_tasks_share(drifted: tuple[Path, dict]) -> None:
    folder, updates = drifted
    shares = np.array([[(of[task] ** 2).sum() for task in range(3)] for of in updates.values()])
    shares /= shares.sum(0)
    overlap = {(s, t): np.minimum(shares[:, s], shares[:, t]).sum() for s, t in itertools.combinations(range(3), 2)}
    general = np.array([name.endswith("general") for name in updates])
    branches = np.array([shares[general].sum(0), shares[~general].sum(0)])
    found, moved, turned, apart, pairs, norms = ANALYSES["drift"](RunGroups.read(aggregate.find([folder])))
    rows = {row[2]: dict(zip(found.head[3:], row[3:], strict=True)) for row in found.rows}
    # say and name read and write the same; draw shares nothing with either.
    assert {relation: row["pairs"] for relation, row in rows.items()} == {"same input, same output": 1, "neither": 2}
    assert rows["same input, same output"]["shared"].mean == pytest.approx(100 * overlap[0, 2])
    assert rows["neither"]["shared"].mean == pytest.approx(50 * (overlap[0, 1] + overlap[1, 2]))
    whole = np.minimum(branches[:, 0], branches[:, 2]).sum()
    assert rows["same input, same output"]["branches shared"].mean == pytest.approx(100 * whole)
    assert [cell.mean for cell in moved.rows[0][3:]] == pytest.approx((100 * branches[1]).tolist())
    assert [row[2] for row in turned.rows] == list(TASKS[:2])
    assert apart.head == ["from stage", "1 say", "2 draw", "3 name"]
    assert len(norms.rows) == len(NAMES)
    assert pairs.head[3:] == ["layer 0", "layer 1", "layer 10", "mlp.up_proj", "self_attn.q_proj"]
    assert [tuple(row[:3]) for row in pairs.rows[:3]] == [
        ("expert", "say", "draw"),
        ("expert", "say", "name"),
        ("expert", "draw", "name"),
    ]
    for branch, first, second, *shown in pairs.rows:
        learnt = range(TASKS.index(first) + 1, TASKS.index(second) + 1)
        whole = {name: sum(of[task] for task in learnt) for name, of in updates.items() if name.endswith(branch)}
        for at, place in enumerate(("layers.0.", "layers.1.", "layers.10.", "up_proj", "q_proj")):
            norm = sum((of**2).sum() for name, of in whole.items() if place in name) ** 0.5
            assert shown[at] == pytest.approx(norm, abs=1e-9)


def with_checkpoints(folder: Path, branches: dict[int, str]) -> list[Path]:
    """A run with the checkpoint of one branch after each of these stages. Returns the files of the checkpoints."""
    write(folder)
    tensors = {name: {f"layers.0.up.{name}.{half}": torch.ones(2, 2) for half in "AB"} for name in branches.values()}
    return [write_checkpoint(folder, stage, tensors[name]) for stage, name in branches.items()]


def test_a_stage_without_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_checkpoints(tmp_path / "run", {1: "lora", 3: "lora"})
    with pytest.raises(Unavailable, match="checkpoints/ lacks 2_draw"):
        read(Run.read(tmp_path / "run"))
    assert main(["analyze", str(tmp_path / "run"), "--what", "drift"]) == 2
    assert "lacks 2_draw; copy the whole run folder, or run it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "tasks", "message"),
    [
        ("peft", ["say"], None),
        ("merged", [], None),
        ("peft", [], "it started from source, whose branches would count as its first task's"),
        (
            "run",
            ["say", "draw"],
            "it started from source as the state after say, draw, whose own are not in checkpoints/",
        ),
        ("merged", ["say"], "it started from source as the state after say, whose own are not in checkpoints/"),
        ("run of a merged model", ["say"], "it started from source as the state after say, whose own are not"),
    ],
)
def test_what_a_run_started_from_is_no_update_of_a_task(
    kind: str, tasks: list[str], message: str | None, tmp_path: Path
) -> None:
    with_checkpoints(tmp_path / "run", {1: "lora", 2: "lora", 3: "lora"})
    run = Run.read(tmp_path / "run")
    run.results.init = Init("source", kind.partition(" ")[0], "", tasks)
    if "merged" in kind:
        run.config["merged"] = {"path": "model", "sha256": ""}
    if message is None:
        assert read(run).tasks == list(TASKS)
    else:
        with pytest.raises(Unavailable, match=f"drift needs each task's own update; {message}"):
            read(run)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    files = with_checkpoints(tmp_path / "run", {1: "lora", 2: "lora", 3: "lora"})
    files[1].write_bytes(files[1].read_bytes()[:-4])
    with pytest.raises(UserError, match="is damaged") as caught:
        read(Run.read(tmp_path / "run"))
    assert str(files[1]) in str(caught.value)


def test_checkpoints_of_two_runs_are_refused(tmp_path: Path) -> None:
    with_checkpoints(tmp_path / "run", {1: "lora", 2: "lora", 3: "other"})
    with pytest.raises(UserError, match="they are of different runs"):
        read(Run.read(tmp_path / "run"))


def test_a_method_without_branches_is_left_out(drifted: tuple[Path, dict], tmp_path: Path) -> None:
    folder = write(tmp_path / "prompts", method="prompt-pool")
    for stage in (1, 2, 3):
        write_checkpoint(folder, stage, {"prompts": torch.ones(3)})
    found, *_ = ANALYSES["drift"](RunGroups.read([drifted[0], folder]))
    assert {row[0] for row in found.rows} == {"lora"}
    assert found.definition.endswith("Left out, without low-rank branches: prompt-pool.")
    with pytest.raises(Unavailable, match="low-rank branches"):
        ANALYSES["drift"](RunGroups.read([folder]))
