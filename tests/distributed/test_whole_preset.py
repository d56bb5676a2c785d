"""The preset `released` as a whole: six tasks of 40 rows in the released layout, on a small SEED-X."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from backbones.seed_x.released import write_released
from distributed.launched import finish, start
from tasks.official import write_continual_next

from cnext.cli import main
from cnext.tasks import suites

TASKS = [task.name for task in suites.load("continual-next").tasks]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The preset with two steps of small batches, two micro-batches each in each of two processes."""
    root = tmp_path_factory.mktemp("whole")
    suite = root / "continual-next"
    shutil.copytree(suites.FOLDER / "continual-next", suite)
    manifest = json.loads((suite / "suite.json").read_text())
    recipe = manifest["budgets"]["released"]
    recipe |= {"steps": dict.fromkeys(TASKS, 2), "batch_size": 8, "micro_batch_size": 2}
    recipe["by_task"]["HQEdit"] |= {"batch_size": 4, "micro_batch_size": 1}
    manifest["clip"] = "tiny"
    (suite / "suite.json").write_text(json.dumps(manifest))
    data = write_continual_next(root / "data", train=38, tests=2)
    weights = write_released(root / "weights")
    given = {"--suite": suite, "--data": data, "--weights": weights, "--backbone": "seed-x", "--preset": "released"}
    given |= {"--method": "mage-paper", "--device": "cpu", "--checkpoint-interval": 1}
    return [*(str(part) for pair in given.items() for part in pair), "--backbone-options", "resolution=8", "steps=1"]


@pytest.mark.slow
def test_six_tasks_in_two_processes_resumed_judged_and_reported(flags: list[str], tmp_path: Path) -> None:
    command = ["-m", "cnext.cli", "run", *flags, "--out", str(tmp_path)]
    finish(start(command))
    [folder] = tmp_path.glob("mage-paper/*/seed-0")
    results = (folder / "results.json").read_bytes()
    assert json.loads(results)["finished"]

    for path in (*folder.glob("checkpoints/6_*"), folder / "results.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert finish(start(command))[0].count("resuming from 5_RefCOCO") == 1
    assert (folder / "results.json").read_bytes() == results

    assert main(["judge", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert all(task in text for task in TASKS)
