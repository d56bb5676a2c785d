"""What digests of the data cost: seconds of one core to read a suite, to digest its rows, and to check the cache.

python bench/data_digests.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cnext import RunConfig
from cnext.config.plan import plan
from cnext.tasks import data_digest
from cnext.training.setup import data_folder, read_suite


def timed(what: str, action: Callable[[], Any]) -> Any:
    """The result of an action, whose seconds are printed."""
    started = time.process_time()
    found = action()
    print(f"{what}: {time.process_time() - started:.2f} s")
    return found


def main() -> None:
    """Prints the seconds for the suite next-tiny, whose data are generated first."""
    planned = plan(RunConfig(device="cpu"))
    data_folder(planned)
    folder = timed("checking the cache", lambda: data_folder(planned))
    samples = timed("reading the rows", lambda: read_suite(planned, folder))
    digests = timed("digests", lambda: data_digest.of_samples(samples))
    print(f"rows: {sum(one.count for splits in digests.values() for one in splits.values()):,}")


if __name__ == "__main__":
    main()
