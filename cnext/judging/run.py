"""``cnext judge``: books what a run's answers fell short of to hallucination, instruction unfollowing or other."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnext.errors import UserError, unknown
from cnext.judging import asking, cells, client, estimates, sampling
from cnext.judging.cache import Verdicts
from cnext.judging.cases import Case
from cnext.judging.requests import REPLY_TOKENS, Prompts
from cnext.runs.checkpoint import write_json, write_text
from cnext.tables import aggregate

JUDGES = ("rules", "openai:URL", "replay:FILE")
BEYOND = "beyond the limit"


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and how much.

    judge: "rules" (free, offline), "openai:URL" (a model behind an OpenAI-compatible server, for all that no rule
    decides) or "replay:FILE" (the verdicts of such a file alone).
    model: the judge behind the URL.  name: of the files written.  limit: judge at most so many answers, as many of
    every stage and task (0: all).  every_stage: not only the cells that Avg.HAL, IUF and OTH are made of.
    """

    judge: str = "rules"
    model: str = client.DEFAULT_MODEL
    name: str = ""
    limit: int = 0
    every_stage: bool = False
    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 5
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.judge != "rules" and not (self.kind in ("openai", "replay") and self.where):
            raise unknown("judge", self.judge, JUDGES)
        for field, least in (("limit", 0), ("concurrency", 1), ("tries", 1)):
            if getattr(self, field) < least:
                raise UserError(f"{field} must be at least {least}, got {getattr(self, field)}")
        if self.timeout <= 0:
            raise UserError(f"timeout must be more than 0 seconds, got {self.timeout}")
        if self.name and not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")

    @property
    def kind(self) -> str:
        return self.judge.partition(":")[0]

    @property
    def where(self) -> str:
        return self.judge.partition(":")[2]

    @property
    def file_name(self) -> str:
        """The name of the files, without extension: "rules", "replay", or that of the model."""
        return self.name or (self.kind if self.kind != "openai" else re.sub(r"[^\w.-]+", "-", self.model).lower())


@dataclass(frozen=True)
class Outcome:
    """What was judged. labels: by case.  reasons: why some are not.  stopped: why the judging ended early, or None."""

    labels: dict[Case, str | None]
    reasons: Counter[str]
    judge: dict[str, Any]
    stopped: UserError | None = None


def judge_runs(given: Sequence[Path], config: JudgeConfig) -> None:
    """Judges the run folders given and those inside other folders given, one after another; of several says which.

    Raises: UserError as ``judge_run``, at the first run of which it holds.
    """
    runs = aggregate.find(given)
    for run in runs:
        if len(runs) > 1:
            print(run)
        judge_run(run, config)


def judge_run(run: Path, config: JudgeConfig) -> dict[str, Any] | None:
    """Judges a run and writes ``judge/<name>.json`` (the table) and ``judge/<name>.jsonl`` (the verdicts).

    Returns: the table; None after a dry run, which writes nothing.
    Raises: UserError, also where the judging ended early, after what was judged has been written.
    """
    answers = cells.JudgedRun.read(run)
    judged = answers.cells if config.kind == "rules" or config.every_stage else answers.decisive()
    cases = [case for cell in judged for case in cell.errors]
    outcome = judge_cases(cases, config, run / "judge")
    if outcome is None:
        return None
    table = {**outcome.judge, **cells.booked(answers, judged, outcome.labels), "reasons": dict(outcome.reasons)}
    if table["metrics"]["avg_hal"] is None and set(outcome.reasons) == {BEYOND}:
        table["estimates"] = estimates.estimates(answers, outcome.labels)
    (run / "judge").mkdir(exist_ok=True)
    file = run / "judge" / f"{config.file_name}.json"
    if config.kind == "rules":
        rows = [
            {**{field: getattr(case, field) for field in ("stage", "task", "index", "id")}, "error": label}
            for case, label in outcome.labels.items()
        ]
        write_text(file.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_json(file, table)
    if outcome.stopped is not None:
        raise UserError(
            f"{outcome.stopped}; what was judged is kept, {file} is marked incomplete, and the same command goes on"
        )
    print(cells.text(table))
    for reason, count in outcome.reasons.items():
        print(f"not judged: {count}, {reason}")
    print(file)
    return table


def judge_cases(cases: Sequence[Case], config: JudgeConfig, folder: Path) -> Outcome | None:
    """Labels for the cases: by rule where one decides, by the judge elsewhere. None after a dry run.

    Args: folder: where the verdicts of a model are kept, as ``<name>.jsonl``.
    """
    if config.kind == "rules":
        if config.dry_run:
            print(f"{len(cases)} errors, all judged by rules; no tokens")
            return None
        return Outcome({case: case.by_rule for case in cases}, Counter(), {"judge": "rules"})
    prompts = Prompts()
    open_cases = [case for case in cases if not case.decided]
    chosen = sampling.stratified(open_cases, config.limit) if config.limit else open_cases
    labels: dict[Case, str | None] = {case: case.by_rule for case in cases if case.decided}
    replayed = config.kind == "replay"
    path = Path(config.where) if replayed else folder / f"{config.file_name}.jsonl"
    with closing(Verdicts(path, prompts, None if replayed else config.model)) as verdicts:
        named = asking.keys(chosen, verdicts)
        asked = {name: case for case, (name, _) in named.items() if verdicts.error_type(name) is None}
        _estimate(len(cases), len(labels), len(chosen), list(asked.values()), replayed, prompts)
        if config.dry_run:
            return None
        stopped, why = None, {}
        if not replayed and asked:
            try:
                why = _ask(named, verdicts, config, prompts, len(asked))
            except client.Unavailable as error:
                stopped = error
        labels |= {case: verdicts.error_type(name) for case, (name, _) in named.items()}
    default = "no verdict in the file" if replayed else "the judging ended early"
    reasons = Counter(why.get(name, default) for case, (name, _) in named.items() if labels[case] is None)
    reasons += Counter({BEYOND: len(open_cases) - len(chosen)})
    who = {"judge": config.kind, "model": verdicts.model, "prompts": prompts.version, "prompts_sha256": prompts.sha256}
    return Outcome(labels, reasons, who, stopped)


def _estimate(errors: int, ruled: int, chosen: int, asked: Sequence[Case], replayed: bool, prompts: Prompts) -> None:
    kept = f"{errors} errors: {ruled} judged by rules, {chosen} for the judge"
    if replayed:
        print(f"{kept}, of which {len(asked)} are not in the file")
        return
    counts = [prompts.tokens(case) for case in asked]
    total = sum(request for request, _ in counts)
    print(
        f"{kept}, {len(asked)} requests to make: about {total:,} tokens to read and {REPLY_TOKENS * len(asked):,} to "
        "write, by estimate",
        flush=True,
    )


def _ask(
    named: dict[Case, tuple[str, str]], verdicts: Verdicts, config: JudgeConfig, prompts: Prompts, total: int
) -> dict[str, str]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    server = client.Client(config.where, config.model, config.timeout, config.tries)
    with server, Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("judging", total=total)
        return asking.ask(named, verdicts, server, prompts, config.concurrency, lambda: bars.advance(bar))
