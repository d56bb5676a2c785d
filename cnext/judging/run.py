"""``cnext judge``: classifies the errors of runs as hallucination, instruction unfollowing or other."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnext import durable
from cnext.errors import UserError, check_range, printable, unknown
from cnext.judging import asking, cells, client, connection, output, statistics
from cnext.judging.cache import Verdicts
from cnext.judging.cases import Case
from cnext.judging.estimates import estimates
from cnext.judging.requests import REPLY_TOKENS, Prompts
from cnext.runs import judge_tables
from cnext.runs.checkpoint import write_json, write_text
from cnext.tables import aggregate

JUDGES = ("rules", "openai:URL", "replay:FILE")
BEYOND = "beyond the limit"
RANGES = {
    "limit": (0, 2**53 - 1),
    "concurrency": (1, 1000),
    "timeout": (0.001, 10**6),
    "tries": (1, 100),
    "max_tokens": (1, 10**9),
}
"""The least and the greatest value of each number."""


@dataclass(frozen=True)
class JudgeConfig:
    """The judge, and what it judges.

    judge: "rules" (free, offline), "openai:URL" (a model behind an OpenAI-compatible server, asked about errors that no
    rule decides) or "replay:FILE" (the verdicts in a file).  model: the judge behind the URL.
    name: of the files written.  limit: ask about at most so many errors, stratified by stage and task (0: all).
    every_stage: not only the stages that Avg.HAL, Avg.IUF and Avg.OTH need.  concurrency: requests at a time.
    timeout: seconds that a request may take in all.  tries: of each request.  max_tokens: of a reply.
    dry_run: print the number of requests and tokens, and stop.

    Raises: UserError for an unknown judge and values out of range.
    """

    judge: str = "rules"
    model: str = client.DEFAULT_MODEL
    name: str = ""
    limit: int = 0
    every_stage: bool = False
    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 5
    max_tokens: int = client.MAX_TOKENS
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.judge != "rules" and not (self.kind in ("openai", "replay") and self.where):
            raise unknown("judge", self.judge, JUDGES)
        for name, (least, most) in RANGES.items():
            check_range(name, getattr(self, name), least, most)
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
    """Labels by case, None where not judged; counts of the reasons for None; why judging ended early, or None.

    usage: see `client.Client`.
    """

    labels: dict[Case, str | None]
    reasons: Counter[str]
    judge: dict[str, Any]
    stopped: UserError | KeyboardInterrupt | None = None
    usage: Counter[str] = field(default_factory=Counter)


def left_out(result: dict[str, Any] | None) -> int:
    """How many errors a judge was to judge and did not; those beyond a limit do not count."""
    return sum(count for reason, count in result["reasons"].items() if reason != BEYOND) if result else 0


def judge_runs(given: Sequence[Path], config: JudgeConfig) -> bool:
    """Judges runs one after another. given: run folders, or folders that hold some.

    Returns:
        Whether all errors were judged, or all of a sample.

    Raises:
        UserError: as ``judge_run``, at the first run that fails.
    """
    runs, left = aggregate.find(given), 0
    for run in runs:
        if len(runs) > 1:
            print(printable(str(run)))
        left += left_out(judge_run(run, config))
    return left == 0


def judge_run(run: Path, config: JudgeConfig) -> dict[str, Any] | None:
    """Judges a run and writes ``judge/<name>.json`` (the table) and ``judge/<name>.jsonl`` (the verdicts) into it.

    An incomplete table never replaces a complete one of the same answers, see ``output.place``.

    Returns:
        The table, see ``cells.table``; None after a dry run, which writes nothing.

    Raises:
        UserError: the run's files are missing or invalid, as ``judge_cases``, or judging ended early; what was judged
            is written first.
        KeyboardInterrupt: likewise.
    """
    answers = cells.JudgedRun.read(run)
    judged = answers.cells if config.kind == "rules" or config.every_stage else answers.decisive()
    cases = [case for cell in judged for case in cell.errors]
    # Before the judge is asked, which may take hours.
    names = {str(cell.file.relative_to(run)): cell.file for cell in answers.cells}
    digests = {name: judge_tables.answers_digest(run, file) for name, file in names.items()}
    outcome = judge_cases(cases, config, run / "judge")
    if outcome is None:
        return None
    table = {**outcome.judge, **cells.table(answers, judged, outcome.labels), "reasons": dict(outcome.reasons)}
    if table["metrics"]["avg_hal"] is None and set(outcome.reasons) == {BEYOND}:
        table["estimates"] = estimates(answers, outcome.labels)
    about = {str(cell.file.relative_to(run)) for cell in judged}
    table["predictions"] = {name: digest for name, digest in digests.items() if name in about}
    durable.make_folder(run / "judge")
    usual = run / "judge" / f"{config.file_name}.json"
    file = output.place(usual, table, answers, digests, config.limit)
    if config.kind == "rules":
        rows = [
            {**{field: getattr(case, field) for field in ("stage", "task", "index", "id")}, "error": label}
            for case, label in outcome.labels.items()
        ]
        write_text(usual.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    if file is not None:
        if config.kind == "openai":
            table["usage"] = output.usage(file, table, outcome.usage)
        write_json(file, judge_tables.sealed(table))
    if isinstance(outcome.stopped, UserError):
        state = f"{file} is incomplete" if file else f"{usual}, which is complete, stays as it is"
        raise UserError(f"{outcome.stopped}; verdicts so far are saved, {state}: run the command again")
    if outcome.stopped is not None:
        raise outcome.stopped
    _show(table, outcome)
    if file != usual:
        print(f"{usual} is of all errors and stays as it is")
    if file is not None:
        print(file)
    return table


def _show(table: dict[str, Any], outcome: Outcome) -> None:
    print(cells.text(table))
    for reason, count in outcome.reasons.items():
        print(f"not judged: {count}, {reason}")
    if outcome.usage:
        print(f"used: {output.usage_text(outcome.usage)}")
    if left := left_out(table):
        advice = "give a file that has them" if table["judge"] == "replay" else "run the command again"
        print(f"{left} errors were to be judged and were not: {advice}")


def judge_cases(cases: Sequence[Case], config: JudgeConfig, folder: Path) -> Outcome | None:
    """Labels cases: by rules where these decide, else by the judge. Returns None after a dry run.

    Args:
        folder: keeps the verdicts of a model, as ``<name>.jsonl``.

    Raises:
        UserError: the file of verdicts is invalid or of another judge, or an image cannot be read.
    """
    if config.kind == "rules":
        if config.dry_run:
            print(f"{len(cases)} errors, all judged by rules; no tokens")
            return None
        return Outcome({case: case.by_rule for case in cases}, Counter(), {"judge": "rules"})
    prompts = Prompts()
    undecided = [case for case in cases if not case.decided]
    chosen = statistics.stratified(undecided, config.limit) if config.limit else undecided
    labels: dict[Case, str | None] = {case: case.by_rule for case in cases if case.decided}
    replayed = config.kind == "replay"
    path = Path(config.where) if replayed else folder / f"{config.file_name}.jsonl"
    with closing(Verdicts(path, prompts, None if replayed else config.model)) as verdicts:
        for note in verdicts.notes():
            print(f"note: {note}")
        keyed = asking.keys(chosen, verdicts)
        to_ask = {key: case for case, (key, _) in keyed.items() if verdicts.error_type(key) is None}
        counts = f"{len(cases)} errors: {len(labels)} judged by rules, {len(chosen)} for the judge"
        if replayed:
            print(f"{counts}, of which {len(to_ask)} are not in the file")
        else:
            tokens = sum(map(prompts.tokens, to_ask.values()))
            written = REPLY_TOKENS * len(to_ask)
            print(f"{counts}; {len(to_ask)} requests, about {tokens:,} tokens in and {written:,} out", flush=True)
        if config.dry_run:
            return None
        stopped, why, usage = None, {}, Counter[str]()
        if not replayed and to_ask:
            try:
                why = _ask(keyed, verdicts, config, prompts, len(to_ask), usage)
            except (connection.Unavailable, KeyboardInterrupt) as error:
                stopped = error
        found = {case: key for case, (key, _) in keyed.items()}
        labels |= {case: verdicts.error_type(key) for case, key in found.items()}
        parameters = verdicts.parameters(found.values())
    default = "no verdict in the file" if replayed else "judging ended early"
    reasons = Counter(why.get(key, default) for case, (key, _) in keyed.items() if labels[case] is None)
    reasons += Counter({BEYOND: len(undecided) - len(chosen)})
    judge = {"judge": config.kind, "model": verdicts.model}
    judge |= {"prompts": prompts.version, "prompts_sha256": prompts.sha256, "parameters": parameters}
    return Outcome(labels, reasons, judge, stopped, usage)


def _ask(
    keyed: dict[Case, tuple[str, str]],
    verdicts: Verdicts,
    config: JudgeConfig,
    prompts: Prompts,
    total: int,
    usage: Counter[str],
) -> dict[str, str]:
    """``asking.judge`` with a progress bar. usage: gets that of the requests, also where it raises."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)

    def warn(text: str) -> None:
        console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)

    server = client.Client(
        config.where, config.model, config.timeout, config.tries, max_tokens=config.max_tokens, warn=warn
    )
    with server, Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("judging", total=total)
        try:
            return asking.judge(keyed, verdicts, server, prompts, config.concurrency, lambda: bars.advance(bar))
        finally:
            usage.update(server.usage)
