"""TensorBoard event files: what train.jsonl and scores.jsonl hold, while it is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from cnext.runs.schemas import StageScore, TrainStep
from cnext.scoring.base import PROFILES

TRAINING = ("loss", "text_loss", "image_loss", "learning_rate", "grad_norm")


class EventLog:
    """Writes <run>/tensorboard over the optimizer steps of the whole run.

    An interrupted run's event files are written again from its logs, so that every step is there once.

    Args:
        ends: optimizer steps done by the end of each stage, 0 included.
    """

    def __init__(self, folder: Path, ends: Mapping[int, int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        self._ends = dict(ends)
        # A TensorBoard that is looking on drops what it has from this step on.
        self._writer = SummaryWriter(str(folder), purge_step=0)

    def steps(self, rows: Iterable[TrainStep]) -> None:
        """Adds rows of train.jsonl."""
        for row in rows:
            before = max(end for stage, end in self._ends.items() if stage < row.stage)
            for name in TRAINING:
                if (value := getattr(row, name)) is not None:
                    self._writer.add_scalar(f"train/{name}", value, before + row.step)
        self._writer.flush()

    def score(self, row: StageScore) -> None:
        """Adds a row of scores.jsonl, at the last step of its stage."""
        for profile in PROFILES:
            self._writer.add_scalar(f"{profile}/{row.task}", row.score(profile), self._ends[row.stage])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
