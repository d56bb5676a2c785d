"""Bad results: tables, comparisons, reports, status and score matrices of damaged files are made or refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.mutations import BYTES, VALUES, dumped, mutated, mutated_bytes, mutated_value
from hypothesis import strategies as st
from report.fake_run import write_fake_run

from cnext.analysis import analyze
from cnext.analysis.groups import RunGroups
from cnext.errors import UserError
from cnext.monitoring import status
from cnext.monitoring.heartbeat import FILE, Heartbeat
from cnext.report import plots, write_report
from cnext.runs.run_folder import RunFolder
from cnext.scoring import matrix_file
from cnext.scoring.base import ERROR_TYPES
from cnext.scoring.metrics_text import metrics_text
from cnext.tables import aggregate, columns, columns_formats, compare, formats

Try = Callable[[Callable[[], object]], bool]
TASKS = ("VQAv2", "HQEdit")
FINGERPRINT = {"python": "3.11", "threads": 1, "sha256": "0"}
DIGESTS = [{"stage": 0, "trained": "zero-shot", "sha256": "a"}, {"stage": 1, "trained": "VQAv2", "sha256": "b"}]


@pytest.fixture(scope="module")
def study(place: Path) -> Path:
    """Two runs of one method and one of another, as tables, comparisons and reports read them."""
    for method, seed in (("mage", 0), ("mage", 1), ("lora", 0)):
        folder = place / "runs" / method / f"seed-{seed}"
        write_fake_run(folder, TASKS, method=method, samples=4)
        for name in ("results", "config"):
            value = json.loads((folder / f"{name}.json").read_text()) | {"seed": seed}
            value |= {"fingerprint": FINGERPRINT, "digests": DIGESTS} if name == "results" else {}
            (folder / f"{name}.json").write_text(json.dumps(value))
        Heartbeat(folder).update(stage=1, task="VQAv2", step=3, steps=9, left=3.0, whole=9.0, seconds_per_step=0.1)
    # What libraries look for once (fonts) is found before anyone watches.
    write_report(place / "runs" / "mage" / "seed-0")
    return place / "runs"


def restored(file: Path, work: Callable[[], None]) -> None:
    """Does something to a file and puts it back."""
    content = file.read_bytes()
    try:
        work()
    finally:
        file.write_bytes(content)


def used(study: Path) -> None:
    """Everything light that reads results."""
    table = aggregate.of_folders(aggregate.find([study]), None, mix=True)
    for render in formats.WRITERS.values():
        render(table)
    runs = aggregate.group(aggregate.finished(aggregate.find([study])), mix=True)
    chosen = columns.choose(runs, [name for name in columns.COLUMNS if name not in columns.GROUPS])
    for kind in formats.WRITERS:
        columns_formats.written(chosen, kind)


def compared(study: Path) -> None:
    here, there = (compare.of_run(study / "mage" / f"seed-{seed}") for seed in (0, 1))
    compare.text(compare.compare(here, there, anyway=True))


USES = {
    "tables": (used, "results.json", 700),
    "tables, config": (used, "config.json", 300),
    "compare": (compared, "results.json", 700),
    "status": (lambda study: status.text(status.of_folders([study])), FILE, 300),
    "status, results": (lambda study: status.text(status.of_folders([study])), "results.json", 300),
}


@pytest.mark.parametrize(("use", "file", "examples"), USES.values(), ids=USES.keys())
def test_results(use: Callable, file: str, examples: int, study: Path, fuzzed_and_restored: Callable) -> None:
    path = study / "mage" / "seed-0" / file
    change = functools.partial(mutated, path.read_bytes())
    fuzzed_and_restored(path, change, st.one_of(VALUES, BYTES), examples, lambda: use(study))


REPORTED = {
    "results.json": 500,
    "config.json": 100,
    "cost.json": 150,
    "environment.json": 60,
    "train.jsonl": 100,
    "predictions/1_VQAv2/VQAv2.jsonl": 150,
    "predictions/2_HQEdit/HQEdit.jsonl": 150,
}


@pytest.mark.parametrize(("file", "examples"), REPORTED.items(), ids=REPORTED.keys())
def test_reports(
    file: str, examples: int, study: Path, fuzzed_and_restored: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes most of a report's time, and sees numbers that have been checked."""
    for name, function in vars(plots).items():
        if hasattr(function, "__wrapped__"):
            monkeypatch.setattr(plots, name, lambda *_, **__: b"<svg></svg>")
    folder = study / "mage" / "seed-0"
    path = folder / file
    lines = path.read_bytes().splitlines(keepends=True) if file.endswith("jsonl") else [path.read_bytes()]

    def use() -> None:
        write_report(folder)
        analyze(RunGroups.read([folder]))

    def change(drawn: tuple[list, float]) -> bytes:
        mutations, share = drawn
        at = int(share * len(lines))
        return b"".join([*lines[:at], mutated(lines[at], mutations) + b"\n", *lines[at + 1 :]])

    strategy = st.tuples(st.one_of(VALUES, BYTES), st.floats(0, 1, exclude_max=True))
    fuzzed_and_restored(path, change, strategy, examples, use)


CSV = b"after,A,B\nzero-shot,10,20\nA,60,25\nB,40,70\n"
MATRIX = {
    "score_matrix": [[60, None], [40, 70.5]], "zero_shot": [10, 20], "tasks": ["A", "B"],
    "writes": {"A": ["text"], "B": ["image"]}, "single": [50, 60], "joint": [70, 70], "chance": [0, 0],
    "held_out": {"before": [1, 2], "after": [3, 4]},
    "error_matrix": {
        "hallucination": [[30, None], [40, 20]],
        "instruction_unfollowing": [[10, None], [20, 9.5]],
        "other": [[0, None], [0, 0]],
    },
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_matrices(suffix: str, place: Path, fuzzed_and_restored: Callable) -> None:
    path = place / f"matrix.{suffix}"
    path.write_bytes(CSV if suffix == "csv" else dumped(MATRIX))
    change, strategy = functools.partial(mutated_bytes, CSV), BYTES
    if suffix == "json":
        change, strategy = lambda mutations: dumped(mutated_value(MATRIX, mutations)), VALUES

    def use() -> None:
        metrics_text(matrix_file.read(path))
        here = compare.of(path)
        compare.text(compare.compare(here, compare.of(path, scale="percent")))

    fuzzed_and_restored(path, change, strategy, 900, use)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b'{"a":1}{', b""])
def test_no_json_at_all(content: bytes, study: Path, refused_or_taken: Try) -> None:
    """And a cell of the CSV with more digits than anyone waits for."""
    folder = study / "mage" / "seed-0"
    for name, use in (("results.json", used), ("config.json", used), ("results.json", compared)):
        restored(
            folder / name, lambda name=name, use=use: _refused(folder / name, content, use, study, refused_or_taken)
        )
    (study.parent / "matrix.csv").write_bytes(b"A,B\n" + b"1" * 100_000 + b"x,2\n1,2\n")
    assert not refused_or_taken(lambda: matrix_file.read(study.parent / "matrix.csv"))


def _refused(path: Path, content: bytes, use: Callable[[Path], None], study: Path, guard: Try) -> None:
    path.write_bytes(content)
    assert not guard(lambda: use(study))


@pytest.mark.parametrize("path", ["../../other/secret.png", "/etc/passwd", "predictions/../../../x.png"])
def test_pictures_of_a_run_from_elsewhere_are_in_it(path: str, study: Path, refused_or_taken: Try) -> None:
    """Predictions that name a file outside the run folder are refused, and so are tasks whose names are paths."""
    folder = study / "mage" / "seed-0"
    answers = folder / "predictions/2_HQEdit/HQEdit.jsonl"

    def change() -> None:
        rows = [json.loads(line) | {"image": path} for line in answers.read_text().splitlines()]
        answers.write_bytes(b"".join(dumped(row) + b"\n" for row in rows))
        assert not refused_or_taken(lambda: write_report(folder))

    restored(answers, change)

    def rename() -> None:
        results = json.loads((folder / "results.json").read_text()) | {"tasks": ["VQAv2", path]}
        (folder / "results.json").write_text(json.dumps(results))
        assert not refused_or_taken(lambda: write_report(folder))

    restored(folder / "results.json", rename)


SHARES = dict.fromkeys(ERROR_TYPES, 0.0)
LOGGED = {"stage": 0, "step": 1, "loss": 1.0, "trained": "zero-shot", "task": "VQAv2", "scorer": "vqa", "samples": 4}
LOGGED |= {"strict": 5.0, "paper": 5.0, "errors": {"strict": SHARES, "paper": SHARES}}


@pytest.mark.parametrize("name", ["train.jsonl", "scores.jsonl", "config.json"])
def test_logs_of_a_run_that_goes_on(name: str, place: Path, fuzzed: Callable, refused_or_taken: Try) -> None:
    """A log is read up to its first row that is not whole, and a configuration that is not one is refused."""
    row = dumped(LOGGED)

    def use() -> None:
        folder = RunFolder(place / "going", {"a": 1})
        try:
            folder.cut(1, (1, 1), lambda line: None)
        finally:
            folder.close()

    shutil.rmtree(place / "going", ignore_errors=True)
    assert refused_or_taken(use)
    change = lambda mutations: mutated(row, mutations) + b"\n" + row + b"\n"  # noqa: E731
    fuzzed(place / "going" / name, change, st.one_of(VALUES, BYTES), 300, use)


def test_a_taken_matrix_has_shares_of_a_hundred(place: Path) -> None:
    (place / "matrix.json").write_bytes(dumped({**MATRIX, "score_matrix": [[101, None], [1, 2]]}))
    with pytest.raises(UserError, match="from 0 to 100, got 101"):
        matrix_file.read(place / "matrix.json")
