"""Every call for a file fails once: the command ends in one line, and the same command then ends with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from failing_calls import SOME, Command, fails_once
from training.toy import copy_suite

from cnext import RunConfig, cli, report
from cnext.monitoring.progress import Progress
from cnext.training import runner


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path, data: Path) -> RunConfig:
    """One task of two steps, with answers that are pictures."""
    folder = tmp_path_factory.mktemp("failing")
    suite = copy_suite(toy_suite, folder / "micro", train_samples=4, test_samples=2, batch_size=2, steps={"HQEdit": 2})
    shared = {"suite": str(suite), "data": data, "order": "HQEdit", "device": "cpu", "checkpoint_interval": 1}
    return RunConfig(out=folder / "runs", method="lora", hyperparameters={"rank": 1}, **shared)


def run_once(config: RunConfig) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda run: (run / "report.html", run / "report.md"))
        return cli._exit_status([], lambda: int(runner.run(config, Progress(quiet=True)) is None))


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> Path:
    assert run_once(config) == 0
    return config.folder.rename(config.out / "finished")


@SOME
def test_a_run(some: int | None, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    def begin() -> None:
        shutil.rmtree(config.folder, ignore_errors=True)

    command = Command(config.folder, begin, lambda: run_once(config))
    assert fails_once(command, capsys, some) > 30


def verb(finished: Path, *words: str) -> Command:
    """One of ``cnext`` on a copy of the finished run."""
    folder = finished.with_name("copy")

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder / "run")

    return Command(folder, begin, lambda: cli.main([word.replace("RUN", str(folder / "run")) for word in words]))


VERBS = (
    ("report", "RUN"),
    ("table", "RUN", "--out", "RUN/table.json"),
    ("judge", "RUN"),
    ("export", "RUN", "--to", "RUN/exported", "--format", "authors"),
)


@SOME
@pytest.mark.parametrize("words", VERBS, ids=[words[0] for words in VERBS])
def test_a_verb(words: tuple[str, ...], some: int | None, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails_once(verb(finished, *words), capsys, some)
