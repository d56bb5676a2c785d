"""``python bench/pretrain_small.py``: pretrain the small backbone and its CLIP from scratch (about 70 minutes)."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretraining.small import pretrain


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python bench/pretrain_small.py", description=pretrain.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the model card")
    parser.add_argument("--seed", type=int, default=0, help="random seed of data and initialization (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of each stage (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    given = parser.parse_args(arguments)
    try:
        pretrain(given.out, given.seed, given.scale, given.threads)
    except OSError as error:
        parser.exit(2, f"error: {error.strerror}: {error.filename}\n")


if __name__ == "__main__":
    main()
