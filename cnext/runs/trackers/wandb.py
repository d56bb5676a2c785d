"""Weights & Biases, by its own library: the run is one of wandb's too, however often it is resumed."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import field

from cnext import records
from cnext.records import Count, Record, plain
from cnext.runs import schemas
from cnext.runs.checkpoint import write_json
from cnext.runs.schemas import StageScore, TrainStep
from cnext.runs.trackers.base import Tracker, Values, scored, trained

FILE = "wandb.json"
PROJECT = "cnext"
FINISH_TIMEOUT = 300.0
"""Seconds that the end of a run waits for its upload. What is left is in the run folder, for ``wandb sync``."""


class Sent(Record):
    """wandb.json: the run's id there and what was logged, so that a resumed run logs nothing twice.

    rows: of wandb's history.  step: the last optimizer step.  scores: "stage/task".  finished: metrics too.
    """

    id: str
    rows: Count = 0
    step: Count = 0
    scores: list[str] = field(default_factory=list)
    finished: bool = False


class WandbLog(Tracker):
    """Logs over the optimizer steps of the whole run. Where wandb fails, one line says so, and nothing more is logged.

    wandb's environment variables hold, WANDB_MODE=offline above all, but not those of a run's id.

    Args:
        folder: the run folder, which gets wandb.json and wandb's own folder.
        ends: as of `Tracker`.
        config: the content of config.json.
        name: of the run; its first part is the method.
        study: the name that the runs of a study have in common.
        say: shows a line.
    """

    def __init__(
        self,
        folder: Path,
        ends: Mapping[int, int],
        config: Mapping[str, Any],
        name: str,
        study: str,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(ends)
        self._file, self._say = folder / FILE, say
        self._sent = (
            records.read(self._file, Sent, schemas.ADVICE) if self._file.is_file() else Sent(uuid.uuid4().hex[:12])
        )
        self._run: Any = None
        if not self._sent.finished:
            with self._or_without():
                self._run = self._begin(folder, config, name, study)

    def _begin(self, folder: Path, config: Mapping[str, Any], name: str, study: str) -> Any:
        """The run of wandb; None where WANDB_MODE is disabled."""
        import wandb

        with _no_questions():
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=os.environ.get("WANDB_DIR", str(folder)),
                group=os.environ.get("WANDB_RUN_GROUP", study),
                id=self._sent.id,
                resume="allow",
                name=name,
                job_type=name.partition("/")[0],
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_TIMEOUT),
            )
        if run.disabled:
            return None
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        where = f"offline; to upload: wandb sync {Path(run.dir).parent}" if run.offline else run.url
        self._say(f"wandb: {where}")
        return run

    def steps(self, rows: Sequence[TrainStep]) -> None:
        new = [(self._step(row), row) for row in rows if self._step(row) > self._sent.step]
        if new:
            values = [{"step": step, "stage": row.stage, **trained(row)} for step, row in new]
            self._log(values, step=new[-1][0])

    def score(self, row: StageScore) -> None:
        """At the last step of its stage."""
        if (place := f"{row.stage}/{row.task}") not in self._sent.scores:
            values = {"step": self._ends[row.stage], "stage": row.stage, **scored(row)}
            self._log([values], scores=[*self._sent.scores, place])

    def metrics(self, values: Values) -> None:
        """As the run's summary."""
        if self._run is not None:
            with self._or_without():
                self._run.summary.update(values)
                self._note(finished=True)

    def close(self) -> None:
        if self._run is not None:
            with self._or_without():
                self._run.finish(exit_code=int(not self._sent.finished))
            self._run = None

    def _log(self, rows: list[dict[str, Any]], **sent: Any) -> None:
        """Logs rows of history. Noted first: of a run that is killed here, rows may be missing, and none is twice."""
        if self._run is None:
            return
        first = self._sent.rows
        with self._or_without():
            self._note(rows=first + len(rows), **sent)
            # A number of its own, as wandb drops a row whose number is not above that of the one before.
            for number, row in enumerate(rows, first):
                self._run.log(row, step=number)

    def _note(self, **sent: Any) -> None:
        for name, value in sent.items():
            setattr(self._sent, name, value)
        write_json(self._file, plain(self._sent))

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        """Inside, an error of wandb's ends its use, with one line."""
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        try:
            yield
        except (wandb.Error, OSError, RuntimeError, HandleAbandonedError, MailboxClosedError) as error:
            self._run = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(
                f"wandb failed ({reason}): the run goes on without it, and train.jsonl and scores.jsonl have "
                "everything; without an account or a network, set WANDB_MODE=offline"
            )


@contextlib.contextmanager
def _no_questions() -> Iterator[None]:
    """Inside, wandb sees no terminal, where it would wait for someone to log in."""
    before = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
