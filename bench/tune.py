"""Tunes the main hyperparameter of every method on validation items, with a separate seed: three values each.

    python bench/tune.py --out runs/tune              # all methods, two runs at a time
    python bench/tune.py --out runs/tune --method ewc

Writes the metrics of each value to results/next-tiny/tuning.json; the value with the best Avg.ACC becomes the default.
The learning rate was tuned with lora and is the same for all methods, as are rank and budget. Run again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "next-tiny" / "tuning.json"
SEED = 10
SHOWN = ("avg_acc", "forgetting", "new_acc")
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "mage-pull": ("pull", (0.003, 0.01, 0.03)),
    "moelora": ("scale", (1, 2, 4)),
    "lae": ("decay", (0.95, 0.98, 0.99)),
    "ewc": ("penalty", (0.003, 0.01, 0.03)),
    "mage": ("c", (2, 5, 10)),
    "pgp": ("epsilon", (0.5, 0.9, 0.97)),
    "replay": ("weight", (0.3, 1, 3)),
    "distillation": ("weight", (0.3, 1, 3)),
    "o-lora": ("penalty", (0.005, 0.05, 0.5)),
    "reglora": ("penalty", (25, 250, 2500)),
    "mage-routed": ("c", (2, 5, 10)),
    "mage-slow": ("slow", (0.1, 0.2, 0.5)),
    "mage-experts": ("scale", (1, 3, 6)),
    "mr-lora": ("router_steps", (20, 40, 80)),
    "prompt-pool": ("scale", (10, 30, 100)),
    "mode": ("distill", (0.1, 0.3, 1)),
    "cia": ("factor", (0.01, 0.1, 2)),
}
"""Method to its main hyperparameter and the values to try; methods without one are left out."""


def tried(out: Path, method: str, name: str, value: float) -> dict[str, float]:
    """Metrics of one run in a subprocess, or of an earlier finished one."""
    folder = out.absolute() / f"{method}-{name}-{value:g}"
    flag = f"--{method}.{name.replace('_', '-')}"
    command = ["-m", "cnext.cli", "run", "--method", method, "--split", "validation", "--seeds", str(SEED)]
    command = [sys.executable, *command, "--out", str(folder), flag, f"{value:g}"]
    # From a folder where the installed cnext is imported, not a source tree.
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} with {flag} {value:g} failed:\n{done.stderr}")
    metrics = json.loads((folder / method / "paper" / f"seed-{SEED}" / "results.json").read_text())["metrics"]
    print(f"{method:<14} {name} {value:<8g}" + "".join(f"{metrics[key]:8.2f}" for key in SHOWN), flush=True)
    return {key: metrics[key] for key in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tune"), help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=GRID,
        default=list(GRID),
        metavar="METHOD",
        help=f"methods to tune (default: all): {', '.join(GRID)}",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    arguments = parser.parse_args()
    runs = [(method, GRID[method][0], value) for method in arguments.method for value in GRID[method][1]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda run: tried(arguments.out, *run), runs))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for method in arguments.method:
        name, values = GRID[method]
        rows = {
            f"{value:g}": metrics
            for run, metrics in zip(runs, found, strict=True)
            if run[0] == method
            for value in run[2:]
        }
        best = max(values, key=lambda value: rows[f"{value:g}"]["avg_acc"])
        table[method] = {"hyperparameter": name, "chosen": best, "seed": SEED, "split": "validation", "values": rows}
    RESULTS.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n")


if __name__ == "__main__":
    main()
