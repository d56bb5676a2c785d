"""What all tests share: one thread, a small suite in a folder of its own, and the tiny backbone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tested_versions
import torch

from cnext import report
from cnext.backbones.tiny.model import TinyBackbone
from cnext.tasks import suites, synthetic

torch.set_num_threads(1)
# A tenth of the time of a small run, and no power is cut here. What is synced, training/test_power_cuts.py checks.
os.fsync = lambda _: None
ROOT = Path(__file__).parent
TRAIN, TEST, STEPS = 32, 8, 4
LONG = (
    "distributed/test_processes", "methods/test_contract", "training/test_crashes", "distributed/test_lost_process",
    "training/test_init_from", "test_benchmarks", "integrations/test_transformers", "integrations/test_killed",
    "test_cli", "backbones/test_coded", "backbones/test_hf_runs", "training/test_trainer", "runs/test_command_line",
)  # fmt: skip
"""Files that take longer than a minute."""


def pytest_configure(config: pytest.Config) -> None:
    tested_versions.configure(config)


def pytest_report_header() -> str:
    return tested_versions.header()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to a process, so that what a module sets up is set up once, and in the order of collection. As --dist
    in addopts it would switch the benchmarks off."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: of several processes none is left alone with one at the end."""
    long = {ROOT / f"{name}.py" for name in LONG}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic suite's files, a few of each."""
    return synthetic.write_next_tiny(tmp_path_factory.mktemp("suite") / "data", TRAIN, TEST)


@pytest.fixture(scope="session")
def toy_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """next-tiny with a budget of a few steps and samples, as a suite folder of a user's own."""
    folder = tmp_path_factory.mktemp("suites") / "toy"
    shutil.copytree(suites.FOLDER / "next-tiny", folder)
    manifest = json.loads((folder / "suite.json").read_text())
    recipe = manifest["budgets"]["default"] | {"train_samples": TRAIN, "test_samples": TEST, "warmup_steps": 1}
    manifest["budgets"] = {"default": recipe | {"steps": dict.fromkeys(manifest["tasks"], STEPS)}}
    (folder / "suite.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def tiny() -> TinyBackbone:
    """The pretrained tiny backbone, fresh."""
    return TinyBackbone.load()


@pytest.fixture(scope="module")
def without_reports() -> Iterator[None]:
    """Runs write no report, which takes a third of the time of a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda run: (run / "report.html", run / "report.md"))
        yield
