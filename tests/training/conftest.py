"""Configurations of the toy suite, and one finished run for all tests that only read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cnext import RunConfig, run

Make = Callable[..., RunConfig]
Runs = Callable[..., Path]
ORDER = ("VQAv2", "Flickr30k", "HQEdit")


@pytest.fixture(scope="session")
def config(data: Path, toy_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a configuration, in a folder of its own unless ``out`` is given."""

    def make(**changes: object) -> RunConfig:
        values = {"suite": str(toy_suite), "data": data, "order": ",".join(ORDER), "device": "cpu"}
        values |= {"out": changes.get("out") or tmp_path_factory.mktemp("runs"), "checkpoint_interval": 1}
        return RunConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def finished(config: Make) -> Path:
    """The folder of a run that was never interrupted."""
    made = config()
    run(made)
    return made.folder


@pytest.fixture(scope="session")
def runs(config: Make) -> Runs:
    """The folder of a finished run of a method with these options; each is done once."""
    done: dict[str, Path] = {}

    def folder(method: str, **changes: object) -> Path:
        key = f"{method} {sorted(changes.items())}"
        if key not in done:
            made = config(method=method, **changes)
            run(made)
            done[key] = made.folder
        return done[key]

    return folder
