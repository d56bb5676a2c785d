"""Tunes all methods by one protocol, on validation items, with the same number of runs for each.

    python bench/tune.py                       # every method
    python bench/tune.py --method ewc --jobs 1
    python bench/tune.py --suite next-real --coarse

Successive halving over the grid that a method's card declares (`cnext.methods.base.Card`):

1. Every combination, about 12, with seed 10 in the paper's order.
2. The best three also with seeds 11 and 12, and with seed 10 in reverse order: 9 runs.

The combination with the best mean Avg.ACC over its four runs is chosen; of those within half a point of the best, the
one with the smallest scale. With --coarse each method has the first rung alone, on every other value of its last
hyperparameter: 6 runs. Test items are never read. Every run is written to results/<suite>/tuning.json as it comes; run
again, the program continues there. Runs of one process share data, encoded samples and the frozen model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cnext import methods
from cnext.config.run_config import RunConfig

RESULTS = Path(__file__).resolve().parent.parent / "results"
FIRST = (10, "paper")
MORE = ((11, "paper"), (12, "paper"), (10, "reverse"))
FINALISTS = 3
TIE = 0.5
"""Avg.ACC of settings within half a point counts as equal."""
Run = tuple[str, dict[str, float], int, str]
"""Method, hyperparameters, seed and order."""

_TRIALS: Any = None


def _load(suite: str, preset: str) -> None:
    """Loads, in a worker, what its runs share."""
    global _TRIALS
    from trials import Trials

    _TRIALS = Trials(RunConfig(suite=suite, split="validation", preset=preset))


def _run(method: str, settings: dict[str, float], seed: int, order: str) -> dict[str, float]:
    return _TRIALS.run(method, settings, seed, order)


def grid(method: str, coarse: bool = False) -> list[dict[str, float]]:
    """All settings of the first rung. coarse: with every other value of the last hyperparameter."""
    card = methods.load(method)().card
    if coarse and card.grid:
        name, values = [*card.grid.items()][-1]
        card = dataclasses.replace(card, grid={**card.grid, name: values[::2]})
    return card.settings()


class Table:
    """The runs in a file, by method."""

    def __init__(self, path: Path, coarse: bool = False) -> None:
        self.path, self.coarse, self.lock = path, coarse, threading.Lock()
        self.methods: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    def score(self, method: str, settings: dict[str, float], seed: int, order: str) -> float | None:
        """Avg.ACC of a run; None where it has not been run."""
        for row in self.methods.get(method, {}).get("runs", ()):
            if (row["settings"], row["seed"], row["order"]) == (settings, seed, order):
                return row["avg_acc"]
        return None

    def add(self, run: Run, metrics: dict[str, float]) -> None:
        method, settings, seed, order = run
        row = {"settings": settings, "seed": seed, "order": order, **metrics}
        with self.lock:
            self.methods.setdefault(method, {"chosen": None, "runs": []})["runs"].append(row)
            self.write()

    def choose(self, method: str) -> dict[str, float]:
        """The settings with the best mean over their runs, recorded as chosen."""
        means = {}
        for settings in finalists(self, method):
            runs = (FIRST,) if self.coarse else (FIRST, *MORE)
            scores = [self.score(method, settings, seed, order) for seed, order in runs]
            means[json.dumps(settings)] = sum(score for score in scores if score is not None) / len(scores)
        tied = [json.loads(text) for text, mean in means.items() if mean >= max(means.values()) - TIE]
        chosen = min(tied, key=lambda settings: (settings.get("scale", 0), -means[json.dumps(settings)]))
        with self.lock:
            self.methods[method] |= {"chosen": chosen, "mean": means[json.dumps(chosen)]}
            self.write()
        return chosen

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(dict(sorted(self.methods.items())), indent=1) + "\n")
        os.replace(part, self.path)


def finalists(table: Table, method: str) -> list[dict[str, float]]:
    """The best settings of the first rung."""
    scored = [(table.score(method, settings, *FIRST), settings) for settings in grid(method, table.coarse)]
    return [settings for _, settings in sorted(scored, key=lambda one: -one[0])[:FINALISTS]]  # type: ignore[operator]


def rungs(table: Table, method: str) -> Iterator[list[Run]]:
    """The runs of a method, rung by rung; the second depends on the scores of the first."""
    yield [(method, settings, *FIRST) for settings in grid(method, table.coarse)]
    if not table.coarse:
        yield [(method, settings, *where) for settings in finalists(table, method) for where in MORE]


def one(processes: Any, table: Table, name: str) -> None:
    """Makes the runs of a method that the table lacks, and chooses."""
    for rung in rungs(table, name):
        pending = {processes.submit(_run, *run): run for run in rung if table.score(*run) is None}
        for future in as_completed(pending):
            run, metrics = pending[future], future.result()
            table.add(run, metrics)
            words = " ".join(f"{key}={value:g}" for key, value in run[1].items())
            print(f"{name:<14} {words:<32} {run[2]} {run[3]:<8} {metrics['avg_acc']:6.2f}", flush=True)
    print(f"{name:<14} chosen: {table.choose(name)}", flush=True)


def tune(names: list[str], table: Table, suite: str, preset: str, jobs: int) -> None:
    """Tunes several methods at a time. Where one fails, that is shown at once, and raised when the others are done."""

    def tuned(name: str) -> None:
        try:
            one(processes, table, name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            raise

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _load, (suite, preset)) as processes, ThreadPoolExecutor(jobs) as threads:
        list(threads.map(tuned, names))


def main() -> None:
    tunable = sorted(name for name in methods.modules() if methods.load(name)().card.grid)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ", ".join(tunable)
    parser.add_argument(
        "--method", nargs="+", choices=tunable, default=tunable, metavar="METHOD", help=f"default: all of {listed}"
    )
    parser.add_argument("--suite", default="next-tiny", help="suite of the runs (default: %(default)s)")
    parser.add_argument("--coarse", action="store_true", help="6 runs of each method, one of each setting")
    parser.add_argument("--preset", default="default", help="training settings of the runs (default: %(default)s)")
    help = "file of all runs (default: results/<suite>/tuning.json)"
    parser.add_argument("--out", type=Path, help=help)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / arguments.suite / "tuning.json"
    if out.is_dir():
        parser.error(f"expected a file for the runs, {out} is a folder; give another --out")
    tune(arguments.method, Table(out, arguments.coarse), arguments.suite, arguments.preset, arguments.jobs)


if __name__ == "__main__":
    main()
