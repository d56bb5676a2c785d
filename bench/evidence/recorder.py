"""Recording of a part's results as JSON lines."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import timing
import torch


class Recorder:
    """The rows of one part.

    Args:
        file: JSON lines, appended to.
        part: name of the part.
        gpu: False with --rehearse: small sizes on a CPU.
    """

    def __init__(self, file: Path, part: str, gpu: bool) -> None:
        self.file, self.part, self.gpu = file, part, gpu
        self.device = "cuda" if gpu else "cpu"
        self.impls = ("cuda", "triton") if gpu else ("cpp",)

    def put(self, **row: object) -> None:
        """Appends a row."""
        line = json.dumps({"part": self.part, **row}, default=str)
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line[:300], flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Records an exception as a row with an error, and goes on; after a CUDA error it re-raises."""
        try:
            yield
        except Exception as error:
            self.put(name=name, error=f"{type(error).__name__}: {error}"[:800])
            traceback.print_exc()
            if self.gpu:
                if isinstance(error, RuntimeError) and ("CUDA error" in str(error) or "illegal" in str(error)):
                    raise
                torch.cuda.empty_cache()

    def race(
        self, candidates: Mapping[str, Callable[[], object]], rounds: int, graph: bool = True
    ) -> dict[str, dict[str, float]]:
        """Milliseconds of each candidate, alternating; see `timing.race` and `timing.percentiles`."""
        found = timing.race(candidates, rounds if self.gpu else 2, graph=graph)
        return {name: timing.percentiles(times) for name, times in found.items()}


def error(mine: torch.Tensor, exact: torch.Tensor) -> float:
    """|mine - exact| / |exact|, Euclidean, in float64."""
    scale = float(exact.double().norm())
    return float((mine.double() - exact.double()).norm()) / (scale or 1.0)
