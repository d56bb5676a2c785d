"""Digests of data: what changes them, and in which row; and that cached data are made good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cnext import RunConfig
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.runs import data_file
from cnext.runs.checkpoint import write_json
from cnext.tasks import cached_folders, synthetic
from cnext.tasks.base import DataError, Sample
from cnext.tasks.data_digest import DataDigest, joint, of_samples
from cnext.training.setup import read_suite


def keep(folder: Path, data: DataDigest, samples: dict, begun: bool) -> str:
    return data_file.keep(folder, data, samples, begun, lambda name, values: write_json(folder / name, values))


Samples = dict[str, dict[str, list[Sample]]]
TASK, TRAIN, TEST = "VQAv2", "VQAv2/annotations/train_001.jsonl", "VQAv2/questions/test.json"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_next_tiny(tmp_path_factory.mktemp("few") / "data", 6, 4)


@pytest.fixture
def copied(few: Path, tmp_path: Path) -> Path:
    return shutil.copytree(few, tmp_path / "elsewhere")


def read(data: Path, toy_suite: Path) -> tuple[Samples, DataDigest]:
    planned = plan(RunConfig(suite=str(toy_suite), data=data, order="VQAv2,HQEdit", device="cpu"))
    samples = read_suite(planned, data)
    return samples, of_samples(samples)


@pytest.fixture(scope="module")
def before(few: Path, toy_suite: Path) -> DataDigest:
    return read(few, toy_suite)[1]


def edited(file: str, edit: Callable[[list], object]) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        path, jsonl = data / file, file.endswith("l")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if jsonl else json.loads(path.read_text())
        edit(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if jsonl else json.dumps(rows))

    return change


def replaced(picture: str, by: str) -> Callable[[Path], None]:
    return lambda data: shutil.copyfile(data / by, data / picture) and None


def swapped(rows: list) -> None:
    rows[1], rows[2] = rows[2], rows[1]


CHANGES = {
    "answer": (edited(TEST, lambda rows: rows[2].update(answer="zebra")), TASK, "test", 2, f"{TEST}#2"),
    "training": (edited(TRAIN, lambda rows: rows[3].update(data=["?", "!"])), TASK, "train", 3, f"{TRAIN}:4"),
    "id": (edited(TEST, lambda rows: rows[0].update(question_id="other")), TASK, "test", 0, f"{TEST}#0 (id other)"),
    "order": (edited(TEST, swapped), TASK, "test", 1, f"{TEST}#1"),
    "rows at the end": (edited(TEST, lambda rows: rows.pop()), TASK, "test", 3, "no longer there, 4 rows then, 3 now"),
    "more rows": (edited(TRAIN, lambda rows: rows.append(rows[0])), TASK, "train", 6, f"{TRAIN}:7"),
    "picture": (
        replaced("VQAv2/images/test/00002.png", "VQAv2/images/test/00001.png"), TASK, "test", 2, f"{TEST}#2",
    ),
    "picture to write": (
        replaced("HQEdit/images/target_images/train/00004.png", "HQEdit/images/source_images/train/00004.png"),
        "HQEdit", "train", 4, "HQEdit/annotations/train_001.jsonl:5",
    ),
    "held-out set": (
        edited("Skills/questions/test.json", lambda rows: rows[1].update(answer="zebra")),
        "Skills", "test", 1, "Skills/questions/test.json#1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_in_its_row(
    change: str, before: DataDigest, copied: Path, toy_suite: Path, tmp_path: Path
) -> None:
    """And in a folder that was moved, only there: a run that has results is refused, and the row is named."""
    samples, moved = read(copied, toy_suite)
    assert moved == before
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert keep(run, before, samples, begun=False) == ""
    assert keep(run, moved, samples, begun=True) == ""
    kept = [(run / name).read_bytes() for name in ("config.json", data_file.FILE)]
    do, task, split, row, said = CHANGES[change]
    do(copied)
    samples, after = read(copied, toy_suite)
    assert joint(after) != joint(before)
    differing = {(t, s) for t, splits in before.items() for s, one in splits.items() if one != after[t][s]}
    assert differing == {(task, split)}
    assert before[task][split].first_difference(after[task][split]) == row
    with pytest.raises(UserError) as refused:
        keep(run, after, samples, begun=True)
    (_, line, cure) = str(refused.value).splitlines()
    assert line.startswith(f"  task {task}, {split}: first row that differs: row {row + 1}, ")
    assert said in line
    assert "restore the data" in cure
    assert kept == [(run / name).read_bytes() for name in ("config.json", data_file.FILE)]
    assert keep(run, after, samples, begun=False) == "", "a run without results may begin on other data"


def test_a_picture_that_vanishes_is_an_error(copied: Path, toy_suite: Path) -> None:
    samples, _ = read(copied, toy_suite)
    (copied / "VQAv2/images/test/00001.png").unlink()
    with pytest.raises(DataError, match=r"test.json#1: names a file that cannot be read: .*00001.png: No such file"):
        of_samples(samples)


def test_digests_that_are_lost_or_edited_are_not_trusted(
    before: DataDigest, few: Path, toy_suite: Path, tmp_path: Path
) -> None:
    samples, _ = read(few, toy_suite)
    other = {**before, TASK: {**before[TASK], "test": before[TASK]["train"]}}
    config, file = tmp_path / "config.json", tmp_path / data_file.FILE
    config.write_text("{}")
    assert "kept no digest of the data" in keep(tmp_path, before, samples, begun=True), "of an earlier version"
    written = file.read_bytes()
    for damaged in (None, b"[", b'{"rows": {"VQAv2": {"test": 3}}}', written.replace(b'"train": "', b'"train": "ab')):
        file.write_bytes(damaged or b"")
        if damaged is None:
            file.unlink()
        assert "is written anew" in keep(tmp_path, before, samples, begun=True)
        assert file.read_bytes() == written
    keep(tmp_path, other, samples, begun=False)
    edited = json.loads(config.read_text()) | {"data_sha256": joint(before)}
    config.write_text(json.dumps(edited))
    assert "is written anew" in keep(tmp_path, before, samples, begun=True)
    config.write_text(json.dumps(edited | {"data_sha256": joint(other)}))
    with pytest.raises(UserError, match=r"which rows is not known, for data\.json is lost or has changed"):
        keep(tmp_path, before, samples, begun=True)
    config.write_text("{}")
    assert keep(tmp_path, before, samples, begun=True) == ""
    config.write_text("{}")
    with pytest.raises(UserError, match="task VQAv2, test: first row that differs: row 1, "):
        keep(tmp_path, other, samples, begun=True)


DAMAGE = {
    "row": lambda folder: (folder / TEST).write_text("[]"),
    "picture": lambda folder: (folder / "VQAv2/images/test/00001.png").write_bytes(b"no picture"),
    "missing": lambda folder: (folder / TRAIN).unlink(),
    "more": lambda folder: (folder / TRAIN).with_name("train_002.jsonl").write_text("{}\n"),
    "manifest": lambda folder: (folder / cached_folders.MANIFEST).write_text('{"sha256": "ab"}'),
    "older": lambda folder: (folder / cached_folders.MANIFEST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_cached_data_are_made_good(damage: str, few: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DAMAGE[damage](copied)
    assert not cached_folders.intact(copied)
    assert synthetic.write_next_tiny(copied, 6, 4) == copied
    assert cached_folders.intact(copied)
    assert cached_folders.digest(copied) == cached_folders.digest(few)
    said = capsys.readouterr().err
    assert ("had changed; made anew: VQAv2/" in said) == (damage not in ("manifest", "older"))
    synthetic.write_next_tiny(copied, 6, 4)
    assert capsys.readouterr().err == ""
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_cached_data_that_cannot_be_made_good_are_refused(copied: Path) -> None:
    (copied / TEST).unlink()
    (copied / TEST).mkdir()
    with pytest.raises(UserError, match=r"elsewhere have changed and cannot be made anew: .*; delete it"):
        synthetic.write_next_tiny(copied, 6, 4)


def test_a_folder_that_another_process_has_finished_stays(few: Path, tmp_path: Path) -> None:
    fresh, there = (shutil.copytree(few, tmp_path / name) for name in ("fresh", "there"))
    inode = (there / TEST).stat().st_ino
    cached_folders.place(fresh, there)
    assert cached_folders.intact(there)
    assert (there / TEST).stat().st_ino == inode
