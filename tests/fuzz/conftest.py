"""Settings of the fuzz tests: short and repeatable; CNEXT_FUZZ=N runs N times as many examples, different each time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from fuzz.guard import Guard
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("CNEXT_FUZZ", "1"))
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "cnext-hypothesis")
settings.register_profile(
    "cnext",
    derandomize=FACTOR == 1,
    database=None,
    # Input of a few bytes that takes seconds would hang with a few more.
    deadline=timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
settings.load_profile("cnext")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that may be used, beside one that may not."""
    base = tmp_path_factory.mktemp("fuzz")
    for name in ("given", "other"):
        (base / name).mkdir()
    (base / "other" / "secret.txt").write_text("secret")
    return base / "given"


@pytest.fixture(scope="module")
def refused_or_taken(place: Path) -> Iterator[Guard]:
    """Runs a function on bad input and tells whether it succeeded. Fails on any error but UserError, and on file access
    outside of the given folder."""
    guard = Guard(place)
    yield guard
    assert (place.parent / "other" / "secret.txt").read_text() == "secret"
    assert {path.name for path in place.parent.iterdir()} == {"given", "other"}


@pytest.fixture(scope="module")
def fuzzed(refused_or_taken: Guard) -> Callable[..., list[bool]]:
    """Runs the work on many changed versions of a file, and returns which were taken."""

    def on(path: Path, change: Callable, strategy: st.SearchStrategy, examples: int, work: Callable) -> list[bool]:
        taken: list[bool] = []

        @settings(max_examples=examples * FACTOR)
        @given(strategy)
        def try_one(mutations: list | tuple) -> None:
            path.write_bytes(change(mutations))
            taken.append(refused_or_taken(work))

        try_one()
        assert len(taken) >= examples * FACTOR
        return taken

    return on


@pytest.fixture(scope="module")
def fuzzed_and_restored(fuzzed: Callable, refused_or_taken: Guard) -> Callable[..., list[bool]]:
    """The same on a file that is valid as it is found, which is how it is left."""

    def on(path: Path, change: Callable, strategy: st.SearchStrategy, examples: int, work: Callable) -> list[bool]:
        content = path.read_bytes()
        try:
            taken = fuzzed(path, change, strategy, examples, work)
        finally:
            path.write_bytes(content)
        assert refused_or_taken(work), "the original file is accepted"
        return taken

    return on
