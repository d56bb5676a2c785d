"""TensorBoard event files of a run, by torch's writer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnext.runs.schemas import StageScore, TrainStep
from cnext.runs.trackers.base import Tracker, Values, flat, scored, trained


class EventLog(Tracker):
    """Writes <run>/tensorboard over the optimizer steps of the whole run.

    The event files of a resumed run are rewritten from its logs, so that every step occurs once.

    Args:
        ends: as of `Tracker`.
        config: the content of config.json, shown with the metrics under HPARAMS.
    """

    def __init__(self, folder: Path, ends: Mapping[int, int], config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(ends)
        shutil.rmtree(folder, ignore_errors=True)
        self._config = dict(flat(config))
        # A running TensorBoard drops its events from this step on.
        self._writer = SummaryWriter(str(folder), purge_step=0)

    def steps(self, rows: Sequence[TrainStep]) -> None:
        for row in rows:
            for name, value in trained(row).items():
                self._writer.add_scalar(name, value, self._step(row))
        self._writer.flush()

    def score(self, row: StageScore) -> None:
        """At the last step of its stage."""
        for name, value in scored(row).items():
            self._writer.add_scalar(name, value, self._ends[row.stage])
        self._writer.flush()

    def metrics(self, values: Values) -> None:
        self._writer.add_hparams(self._config, values, run_name=".", global_step=max(self._ends.values()))

    def close(self) -> None:
        self._writer.close()
