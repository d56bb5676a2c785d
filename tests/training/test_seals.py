"""Every file of a run folder is as it was written, or reading it is refused: bits flipped, files of other runs."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnext import open_run, run
from cnext.analysis import updates
from cnext.analysis.run import Run
from cnext.cli import run_main
from cnext.config import init_source
from cnext.errors import UserError
from cnext.judging.cells import JudgedRun
from cnext.monitoring import status
from cnext.report.samples import images
from cnext.runs import checkpoint, seals
from cnext.runs.run_folder import RunFolder
from cnext.scoring import matrix_file
from cnext.tables import aggregate, compare

FLIPS, SWAPS = 500, 100
SHOWN = ("report_files", "report.html", "report.md", "run.log", "run.yaml", ".lock")
"""What no command reads again but as text to show, or as settings of one's own."""

Make = Callable[..., Any]


def everything(folder: Path) -> list[Any]:
    """What the commands read of a run: table, status, report, analyze, compare, metrics, judge, export, --init-from."""
    read = Run.read(folder)
    pictures = [frame.content for strip in images(read).blocks for frame in _frames(strip)]
    answers = [read.predictions(stage, task) for stage in range(len(read.tasks) + 1) for task in read.tasks]
    kept = [checkpoint.load(path) for path in sorted(folder.glob("checkpoints/[!.]*"))]
    states = [[sorted((k, t.numpy().tobytes()) for k, t in part.items()) for part in one.values()] for one, _ in kept]
    return [
        *(read.results, read.cost, read.config, read.environment, read.options, read.left_out, read.separability),
        *({stage: losses.tolist() for stage, losses in read.losses.items()}, pictures, answers, states),
        *([values for _, values in kept], updates.read(read).products.tolist(), open_run(folder).content),
        *(_status(folder), aggregate.read(folder), vars(compare.of_run(folder))),
        *(matrix_file.read(folder), JudgedRun.read(folder), init_source.find(folder)),
    ]


def text(folder: Path) -> str:
    """Everything, without the addresses of objects, whose content is in another part as well."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(everything(folder)))


def _frames(block: Any) -> list[Any]:
    return getattr(block, "frames", [])


def _status(folder: Path) -> dict[str, Any]:
    """Raises UserError where `cnext status` says that it does not know."""
    found = status.of_run(folder, 0.0)
    if found.state == status.UNKNOWN:
        raise UserError(found.why)
    return {name: value for name, value in vars(found).items() if name not in ("heard", "log")}


@pytest.fixture(scope="module")
def copies(finished: Path, config: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two runs that may be changed: of seed 0, and of seed 1 in the same place."""
    other = config(seed=1)
    run(other)
    base = tmp_path_factory.mktemp("changed")
    for name, folder in (("0", finished), ("1", other.folder)):
        shutil.copytree(folder, base / name)
    return base / "0", base / "1"


@pytest.fixture(scope="module")
def clean(copies: tuple[Path, Path]) -> str:
    return text(copies[0])


def sealed_files(folder: Path) -> list[Path]:
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if path.parts[0] not in SHOWN]


def refused_or_the_same(folder: Path, clean: str) -> str:
    """What reading says, "" where it is as before. Other errors than for the user, and other content, fail."""
    try:
        found = text(folder)
    except UserError as error:
        return str(error)
    assert found == clean
    return ""


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(copies: tuple[Path, Path], clean: str) -> None:
    folder, _ = copies
    files, draw, noticed = sealed_files(folder), random.Random(0), set()
    kinds = sorted({path.name if path.suffix == ".json" else path.suffix for path in files})
    assert {"config.json", "cost.json", "environment.json", "results.json", ".jsonl", ".png", ".safetensors"} <= {
        *kinds
    }
    for number in range(FLIPS):
        kind = kinds[number % len(kinds)]
        path = folder / draw.choice([p for p in files if (p.name if p.suffix == ".json" else p.suffix) == kind])
        content = path.read_bytes()
        at = draw.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
        try:
            if refused_or_the_same(folder, clean):
                noticed.add(kind)
        finally:
            path.write_bytes(content)
    # Which resuming alone reads, and makes anew from the data.
    unread = {*kinds} - noticed
    assert unread == {"data.json"}
    assert refused_or_the_same(folder, clean) == ""


def test_a_file_of_another_run_is_noticed(copies: tuple[Path, Path], clean: str) -> None:
    folder, other = copies
    here = [path for path in sealed_files(folder) if (other / path).read_bytes() != (folder / path).read_bytes()]
    draw = random.Random(1)
    for number in range(SWAPS):
        path = here[number % len(here)] if number < len(here) else draw.choice(here)
        content = (folder / path).read_bytes()
        shutil.copyfile(other / path, folder / path)
        try:
            said = refused_or_the_same(folder, clean)
            # Those that no command reads: answers in no score matrix, and what resuming makes anew from the data.
            assert said or "extra" in path.parts or path.name == "data.json", path
        finally:
            (folder / path).write_bytes(content)


@pytest.mark.parametrize("name", ["scores.jsonl", "extra_scores.jsonl"])
def test_a_changed_last_score_is_measured_again(
    name: str, finished: Path, config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what results.json says is what was measured, not what somebody wrote into the log."""
    shutil.copytree(finished.parents[2], tmp_path / "runs")
    made = config(out=tmp_path / "runs")
    path, before = made.folder / name, (made.folder / "results.json").read_bytes()
    *lines, last = path.read_text().splitlines()
    row = json.loads(last) | {"strict": 99.0}
    path.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    with pytest.raises(UserError, match=rf"{name}:{len(lines) + 1} was changed since it was written"):
        seals_of_all(made.folder)
    run(made)
    assert f"warning: {path}:{len(lines) + 1} is not as it was written" in capsys.readouterr().err
    assert (made.folder / "results.json").read_bytes() == before
    assert path.read_text().splitlines() == [*lines, last]


def test_the_same_command_mends_what_can_be_known(
    finished: Path, config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All figures again from the logs and checkpoints. Nothing is trained or answered."""
    shutil.copytree(finished.parents[2], tmp_path / "runs")
    made = config(out=tmp_path / "runs")
    results = (made.folder / "results.json").read_bytes()
    names = ("results.json", "cost.json", "options.json", "environment.json")
    for name in names:
        content = (made.folder / name).read_bytes()
        at = content.index(b"1", 200)
        (made.folder / name).write_bytes(content[:at] + b"2" + content[at + 1 :])
        with pytest.raises(UserError, match=f"{name} has changed since it was written"):
            Run.read(made.folder)
        if name != "environment.json":
            (made.folder / name).write_bytes(content)
    for name in ("cost.json", "options.json"):
        (made.folder / name).write_text("{}")
    flags = ["--suite", made.suite, "--data", made.data, "--order", made.order, "--device", "cpu", "--out", made.out]
    assert run_main([*map(str, flags), "--checkpoint-interval", "1", "--seeds", "0"]) == 0
    said = capsys.readouterr().err
    assert "environment.json has changed since it was written" in said
    assert "the environment of the scores so far is that of results.json" in said
    assert (made.folder / "results.json").read_bytes() == results
    assert Run.read(made.folder).results == Run.read(finished).results


def seals_of_all(folder: Path) -> None:
    from cnext.runs import schemas

    for name in ("scores.jsonl", "extra_scores.jsonl"):
        schemas.read_log(folder / name, schemas.StageScore)


def test_steps_that_were_deleted_are_noticed(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "train.jsonl"
    assert sum(map(len, Run.read(folder).losses.values())) == Run.read(folder).results.cost.optimizer_steps
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match=r"train\.jsonl has 11 steps, .*results\.json counts 12"):
        _ = Run.read(folder).losses


def test_answers_that_were_deleted_are_noticed(finished: Path, tmp_path: Path) -> None:
    """One file: refused. All of them: the samples are left out."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "predictions" / "1_VQAv2" / "VQAv2.jsonl").unlink()
    for read in (lambda: Run.read(folder).answers("VQAv2"), lambda: JudgedRun.read(folder)):
        with pytest.raises(UserError, match=r"VQAv2\.jsonl is missing, though scores.jsonl has its score"):
            read()
    shutil.rmtree(folder / "predictions")
    assert Run.read(folder).answers("VQAv2") == []


@pytest.mark.parametrize("what", ["moved", "lock", "deleted"])
def test_a_folder_that_is_moved_ends_the_run(what: str, tmp_path: Path) -> None:
    """In one line, and nothing is made in its place."""
    folder = RunFolder(tmp_path / "run", {"a": 1})
    if what == "lock":
        (tmp_path / "run" / ".lock").unlink()
    elif what == "moved":
        (tmp_path / "run").rename(tmp_path / "moved")
    else:
        shutil.rmtree(tmp_path / "run")
    for write in (
        lambda: folder.write_json("cost.json", {}),
        lambda: folder.log_steps([]),
        lambda: folder.save({}, {"tasks_done": 0, "step": 1}, "0_a_step1"),
    ):
        with pytest.raises(UserError, match="was moved or deleted while the run was under way"):
            write()
    assert (tmp_path / "run").exists() == (what == "lock")
    folder.close()


def test_a_seal_is_of_the_content_the_name_and_the_run(tmp_path: Path) -> None:
    values = {"seed": 0, "scores": [1.5, None]}
    found = seals.sealed(values, "cost.json", "run")
    path = tmp_path / "cost.json"
    assert seals.opened(found, path) == found
    assert seals.sealed(values, "cost.json", None) == values
    for changed in (found | {"seed": 1}, found | {"seal": found["seal"] | {"run": "other"}}, found | {"seal": "x"}):
        with pytest.raises(seals.Changed, match="has changed since it was written"):
            seals.opened(changed, path)
    with pytest.raises(seals.Changed, match="has changed since"):
        seals.opened(found, tmp_path / "other.json")
    (tmp_path / "config.json").write_text(json.dumps(seals.sealed({}, "config.json", "another")))
    with pytest.raises(seals.Changed, match="are of different runs"):
        seals.opened(found, path)
    with pytest.raises(seals.Changed, match=r"cost.json has lost its seal"):
        seals.opened(values, path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(seals.Changed, match=r"config.json has lost its seal"):
        seals.opened(found, path)
    assert seals.opened(values, path) == values, "of an earlier version"


def test_a_run_has_one_name_wherever_its_data_are() -> None:
    one = {"method": "lora", "seed": 0, "data": None}
    assert seals.run_name(one) == seals.run_name(one | {"data": "/data"}) != seals.run_name(one | {"seed": 1})


def test_rows_are_sealed_with_all_rows_before_them() -> None:
    chain = seals.Chain("scores.jsonl", "run")
    lines = [chain.add(json.dumps({"a": number}).encode()) for number in range(4)]
    assert [json.loads(line)["a"] for line in lines] == [0, 1, 2, 3]
    assert seals.intact(lines, seals.Chain("scores.jsonl", "run")) == lines
    for at, given in ((0, lines[1:]), (1, [lines[0], *lines[2:]]), (2, [*lines[:2], lines[2].replace(b"2", b"5", 1)])):
        assert len(seals.intact(given, seals.Chain("scores.jsonl", "run"))) == at
    assert not seals.intact(lines, seals.Chain("scores.jsonl", "other"))
    assert not seals.intact(lines, seals.Chain("extra_scores.jsonl", "run"))


def test_updates_are_of_the_checkpoints_that_results_name(finished: Path, tmp_path: Path) -> None:
    """A checkpoint of another stage under this one's name is refused, as its state has another digest."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    first, second = sorted((folder / "checkpoints").iterdir())[:2]
    assert np.isfinite(updates.read(Run.read(folder)).products).all()
    (second / "adapters.safetensors").write_bytes((first / "adapters.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"adapters.safetensors has changed since it was written"):
        updates.read(Run.read(folder))
