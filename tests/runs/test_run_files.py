"""Seals, logs, checkpoints and the folder of a run, without a run: what is written, what is refused, what is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cnext.errors import UserError
from cnext.runs import checkpoint, run_folder, seals
from cnext.runs.checkpoint import Damaged
from cnext.runs.logs import Log
from cnext.runs.run_folder import InUse, RunFolder
from cnext.runs.schemas import StageScore, TrainStep
from cnext.runs.trackers.base import Tracker
from cnext.scoring.base import ERROR_TYPES, PROFILES
from cnext.tasks.data_digest import WIDTH, SplitDigest

CONFIG = {"method": "sft", "seed": 0, "threads": 1}
VALUES = {"tasks_done": 1, "step": 0}


def step(number: int, stage: int = 1) -> TrainStep:
    return TrainStep(stage=stage, task="A", step=number, loss=0.5)


def score(stage: int, strict: float = 50.0) -> StageScore:
    errors = dict.fromkeys(PROFILES, dict.fromkeys(ERROR_TYPES, 0.0))
    return StageScore(
        stage=stage, trained="A", task="A", scorer="box", samples=2, strict=strict, paper=1.0, errors=errors
    )


@contextmanager
def opened(path: Path, config: dict[str, Any] = CONFIG) -> Iterator[RunFolder]:
    with closing(RunFolder(path, config)) as folder:
        yield folder


def change(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


# Seals


def test_a_seal_is_of_content_name_and_run() -> None:
    values = seals.sealed({"b": 1, "a": (1, 2), "seal": "old"}, "x.json", "1f")
    text = 'x.json\n1f\n{"a": [1, 2], "b": 1}'
    assert values["seal"] == {"run": "1f", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert seals.sealed(values, "x.json", None) == {"b": 1, "a": (1, 2)}
    name = seals.run_name(CONFIG)
    assert name == seals.run_name(CONFIG | {"threads": 4, "data": "/elsewhere"}) != seals.run_name(CONFIG | {"seed": 1})


def test_what_is_sealed_is_opened_beside_its_config_alone(tmp_path: Path) -> None:
    def put(name: str, values: dict[str, Any], run: str | None) -> Path:
        (tmp_path / name).write_text(json.dumps(seals.sealed(values, name, run)))
        return tmp_path / name

    def read(path: Path, folder: Path | None = None) -> Any:
        return seals.opened(json.loads(path.read_text()), path, folder)

    cost, answers = put("cost.json", {"hours": 1}, "1f"), put("answers.json", {}, "2f")
    assert read(cost)["hours"] == 1
    assert seals.run_of(tmp_path) is None
    config = put("config.json", CONFIG, "1f")
    assert read(cost)["hours"] == read(cost, tmp_path)["hours"] == 1
    assert read(config)["seed"] == 0
    assert seals.run_of(tmp_path) == "1f"
    assert seals.opened([1], cost) == [1]

    (tmp_path / "in").mkdir()
    with pytest.raises(seals.Changed, match=r"cost.json and .*config.json are of different runs; restore it"):
        read(put("cost.json", {"hours": 1}, "2f"))
    with pytest.raises(seals.Changed, match=r"answers.json and .*config.json are of different runs"):
        read(answers)
    (tmp_path / "in" / "cost.json").write_text(cost.read_text())
    assert read(tmp_path / "in" / "cost.json")["hours"] == 1
    with pytest.raises(seals.Changed, match="of different runs"):
        read(tmp_path / "in" / "cost.json", tmp_path)
    with pytest.raises(seals.Changed, match=r"cost.json has lost its seal"):
        read(put("cost.json", {"hours": 1}, None))
    put("cost.json", {"hours": 1}, "1f")
    put("config.json", CONFIG, None)
    with pytest.raises(seals.Changed, match=r"config.json has lost its seal"):
        read(cost)


@pytest.mark.parametrize(
    "seal",
    ["1f", {}, {"run": 1}, {"run": "1f", "sha256": "0" * 64}, None],
    ids=["text", "empty", "number", "sha", "null"],
)
def test_a_seal_that_does_not_fit_is_refused(seal: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "seal": seal}))
    with pytest.raises(seals.Changed, match=r"config.json has changed .* checksum is another; restore it, or give"):
        seals.run_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(seals.Changed, match="expected JSON"):
        seals.run_of(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert seals.run_of(tmp_path) is None


def test_a_chain_binds_each_row_to_those_before_it() -> None:
    made = seals.Chain("x.jsonl", "1f")
    lines = [made.add(row) for row in (b'{"a": 1}', b'{"a": 1}', b'{"a": 2}')]
    first = hashlib.sha256(b"x.jsonl\n1f").hexdigest()
    second = hashlib.sha256(first.encode() + b'{"a": 1}').hexdigest()
    assert lines[0] == b'{"a": 1, "seal": "' + second[:16].encode() + b'"}'
    assert all(map(seals.has_seal, lines))
    assert seals.intact(lines, seals.Chain("x.jsonl", "1f")) == lines
    assert seals.intact([lines[0], lines[2], lines[1]], seals.Chain("x.jsonl", "1f")) == lines[:1]
    assert seals.intact([lines[0], b"{", *lines[1:]], seals.Chain("x.jsonl", "1f")) == lines[:1]
    for other in (seals.Chain("y.jsonl", "1f"), seals.Chain("x.jsonl", "2f"), seals.Chain("x.jsonl", None)):
        assert seals.intact(lines, other) == []
    assert not seals.Chain("x.jsonl", "1f").follows(b'{"a": 1}')
    plain = seals.Chain("x.jsonl", None)
    assert plain.add(b'{"a": 1}') == b'{"a": 1}'
    assert plain.follows(b'{"a": 1}')


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert seals.file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# Logs


@pytest.mark.parametrize("run", ["1f", None], ids=["sealed", "earlier version"])
def test_a_log_is_read_as_it_was_written(run: str | None, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    log = Log(path, TrainStep, run)
    assert (log.rows, log.damage, log.content()) == ([], "", b"")
    log.append([step(1), step(2)])
    log.append([step(3)])
    again = Log(path, TrainStep, run)
    assert again.rows == log.rows == [step(1), step(2), step(3)]
    assert (again.content(), again.damage) == (path.read_bytes(), "")
    kept = again.checksum()
    assert kept == {"bytes": path.stat().st_size, "sha256": seals.file_digest(path)}
    log.append([step(4)])
    log.check(kept)
    with pytest.raises(Damaged, match=r"train.jsonl has changed since it was written"):
        log.check(kept | {"sha256": "0"})
    assert log.keep(lambda row: row.step < 3) == [step(1), step(2)]
    log.append([step(5)])
    assert [row.step for row in Log(path, TrainStep, run).rows] == [1, 2, 5]
    with pytest.raises(Damaged):
        log.check(kept)


def test_a_log_that_is_whole_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    Log(path, TrainStep, "1f").append([step(1), step(2)])
    cut = Log(path, TrainStep, "1f")
    cut.keep(lambda row: row.step < 2)
    monkeypatch.setattr(checkpoint, "write_bytes", lambda *_: pytest.fail("written again"))
    cut.append([step(2)])
    log = Log(path, TrainStep, "1f")
    assert log.keep(lambda row: True) == [step(1), step(2)]
    log.append([step(3)])
    assert len(Log(path, TrainStep, "1f").rows) == 3


@pytest.mark.parametrize("first", ["append", "keep"])
@pytest.mark.parametrize(
    ("change", "number", "reason"),
    [
        (lambda lines: [lines[0], lines[1].replace(b"0.5", b"0.6"), lines[2]], 2, "its seal is another"),
        (lambda lines: [lines[0], b"{", lines[2]], 2, ""),
        (lambda lines: [lines[0], b'{"stage": "x"}', lines[2]], 2, "Expected `int`"),
        (lambda lines: [lines[0], lines[1], lines[2][:-20]], 0, ""),
    ],
    ids=["value", "not JSON", "kind", "cut off"],
)
def test_a_log_goes_on_before_its_damage(
    change: Callable[[list[bytes]], list[bytes]], number: int, reason: str, first: str, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    Log(path, TrainStep, "1f").append([step(1), step(2), step(3)])
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"\n".join(change(lines)) + (b"\n" if number else b""))
    damaged = path.read_bytes()
    log = Log(path, TrainStep, "1f")
    assert log.damage.startswith(f"{path}:{number} is not as it was written ({reason}" if number else "")
    assert bool(log.damage) == bool(number)
    whole = [step(1)] if number else [step(1), step(2)]
    assert log.rows == whole
    assert path.read_bytes() == damaged
    if first == "keep":
        assert log.keep(lambda row: True) == whole
        assert path.read_bytes() == log.content() == b"".join(line + b"\n" for line in lines[: len(whole)])
    log.append([step(7)])
    assert Log(path, TrainStep, "1f").rows == [*whole, step(7)]


# Checkpoints


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    tensors = {"adapters": {"a": torch.arange(6.0).reshape(2, 3).T.requires_grad_()}, "method": {}}
    folder = tmp_path / "run" / "checkpoints" / "1_A"
    checkpoint.save(folder, tensors, {**VALUES, 3: (1, 2)})  # pyright: ignore[reportArgumentType]
    found, values = checkpoint.load(folder)
    assert torch.equal(found["adapters"]["a"], tensors["adapters"]["a"])
    assert found["method"] == {}
    assert values == {**VALUES, "3": [1, 2]}
    file = folder / "adapters.safetensors"
    manifest = checkpoint.manifest(folder)
    assert checkpoint.verified(file) == manifest
    assert manifest["files"]["adapters.safetensors"] == seals.file_digest(file)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for read, argument in ((checkpoint.verified, file), (checkpoint.load, folder)):
        with pytest.raises(Damaged, match=r"adapters.safetensors has changed since it was written"):
            read(argument)
    file.unlink()
    for read, argument in ((checkpoint.verified, file), (checkpoint.load, folder)):
        with pytest.raises(Damaged, match=r"adapters.safetensors cannot be read: .*No such file"):
            read(argument)


def sealed_manifest(folder: Path, values: Any) -> None:
    """A manifest whose own checksum fits."""
    text = json.dumps(values, sort_keys=True)
    values = {**values, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps(values))


def test_a_manifest_that_has_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "1_A"
    checkpoint.save(folder, {"adapters": {"a": torch.ones(1)}}, VALUES)
    path = folder / checkpoint.MANIFEST
    text = path.read_text()
    for changed in (text.replace('"step": 0', '"step": 1'), "[]", "{}", "1"):
        path.write_text(changed)
        with pytest.raises(Damaged, match=r"manifest.json of the checkpoint .* has changed since it was written"):
            checkpoint.manifest(folder)
    path.write_text(text[:-3])
    with pytest.raises(Damaged, match=r"manifest.json of the checkpoint .*1_A cannot be read"):
        checkpoint.manifest(folder)
    sealed_manifest(folder, {"files": {}, **VALUES, "more": 1})
    assert checkpoint.manifest(folder)["more"] == 1
    for values in ({"files": {"../a": "0"}, **VALUES}, {"files": {}, "step": 0}, {"files": {}, **VALUES, "step": -1}):
        sealed_manifest(folder, values)
        with pytest.raises(Damaged, match="has changed"):
            checkpoint.manifest(folder)


def test_tensors_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "1_A"
    checkpoint.save(folder, {}, VALUES)
    (folder / "a.safetensors").write_bytes(b"no tensors")
    sealed_manifest(folder, {"files": {"a.safetensors": seals.file_digest(folder / "a.safetensors")}, **VALUES})
    with pytest.raises(Damaged, match=r"a.safetensors cannot be read"):
        checkpoint.load(folder)


def test_json_is_of_finite_numbers_and_text_of_any_name(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "x.json", {"b": [1], "a": 2})
    assert (tmp_path / "x.json").read_text() == '{\n  "b": [\n    1\n  ],\n  "a": 2\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.write_json(tmp_path / "x.json", float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path / "1_A", {}, {**VALUES, "x": float("inf")})
    checkpoint.write_text(tmp_path / "text", "a\udcff")
    assert (tmp_path / "text").read_bytes() == b"a\\udcff"


# The folder


def test_a_run_starts_and_goes_on_in_its_own_folder_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    with opened(path) as folder:
        assert folder.run == seals.run_name(CONFIG) == seals.run_of(path)
        with pytest.raises(InUse, match=r"another process is running in .*run; wait for it or give another --out"):
            RunFolder(path, CONFIG)
    with opened(path, CONFIG | {"seed": 1}) as folder:  # there is no result yet
        folder.log_score(score(0))
    with pytest.raises(UserError, match=r"run of another configuration:\n  seed: 1 there, 0 requested\ngive another"):
        run_folder.check_free(path, CONFIG)
    with opened(path, CONFIG | {"seed": 1, "threads": 1}) as folder:
        assert folder.scored.rows == [score(0)]
        assert folder.run == seals.run_name(CONFIG | {"seed": 1})
    nested = {"hyperparameters": {"lr": 1, "c": 2}}
    (path / "config.json").write_text(json.dumps(CONFIG | {"hyperparameters": {"lr": 3, "c": 2}}))
    with pytest.raises(UserError, match=r":\n  hyperparameters.lr: 3 there, 1 requested\ngive"):
        run_folder.check_free(path, CONFIG | nested)


def test_folders_that_are_none_of_a_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "in" / "it"):
        with pytest.raises(UserError, match=r"expected a folder for the runs, .*file is a file; give another --out"):
            run_folder.check_free(path, CONFIG)
    with pytest.raises(UserError, match=r"is not empty and holds no config.json; give another --out"):
        run_folder.check_free(tmp_path, CONFIG)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".lock").touch()
    run_folder.check_free(tmp_path / "hidden", CONFIG)
    (tmp_path / "hidden" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON .*; give another --out or delete the folder"):
        run_folder.check_free(tmp_path / "hidden", CONFIG)


def test_a_run_of_an_earlier_version_stays_without_seals(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as folder:
        folder.log_score(score(0))
    path = tmp_path / "run" / "scores.jsonl"
    row = {name: value for name, value in json.loads(path.read_text()).items() if name != "seal"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
    with opened(tmp_path / "run") as folder:  # config.json lost its seal alone, and gets it back
        assert folder.run == seals.run_name(CONFIG)
        assert folder.scored.rows == [score(0)]
    (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
    path.write_text(json.dumps(row) + "\n")
    with opened(tmp_path / "run") as folder:
        assert folder.run is None
        assert folder.scored.rows == [score(0)]
        assert folder.write_json("x.json", {"a": 1}) == {"a": 1}
        folder.save({}, VALUES, "1_A")
        assert "run" not in checkpoint.manifest(folder.checkpoints / "1_A")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("gone", [".", ".lock"])
def test_nothing_is_written_once_the_folder_or_its_lock_is_moved(gone: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run") as folder:
        (tmp_path / "run" / gone).rename(tmp_path / "elsewhere")
        writes = (
            lambda: folder.log_steps([step(1)]), lambda: folder.log_score(score(0)), lambda: folder.log_extra(score(0)),
            lambda: folder.save({}, VALUES, "1_A"), lambda: folder.write_json("x.json", {}),
        )  # fmt: skip
        for write in writes:
            with pytest.raises(UserError, match=r"run was moved or deleted while the run was under way"):
                write()
    assert gone == ".lock" or not (tmp_path / "run").exists()


def labels(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_the_newest_checkpoint_is_found_and_one_inside_a_task_is_kept(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path / "run") as folder:
        assert folder.furthest(said.append) is None
        folder.log_steps([step(1)])
        for label, done, at in (("0_zero", 0, 0), ("1_10", 0, 10), ("1_9", 0, 9), ("1_11", 0, 11), ("1_A", 1, 0)):
            if label == "1_A":
                assert labels(folder) == ["0_zero", "1_10", "1_11"]
                (folder.checkpoints / ".left").mkdir()
            folder.save({"method": {"a": torch.ones(1)}}, {"tasks_done": done, "step": at}, label)
        assert labels(folder) == ["0_zero", "1_11", "1_A"]
        path, tensors, values = folder.furthest(said.append) or pytest.fail("none found")
        assert (path.name, tensors["method"]["a"].item(), values) == ("1_A", 1, VALUES)
        assert said == []
        change(path / checkpoint.MANIFEST, b'"step": 0', b'"step": 1')
        found = folder.furthest(said.append)
        assert found is not None
        assert found[0].name == "1_11"
        assert said[0].splitlines()[1:] == ["falling back to 1_11; later steps are repeated"]
        assert "1_A has changed" in said[0]
        folder.tidy(["0_zero"])
        assert labels(folder) == ["0_zero"]
        change(folder.checkpoints / "0_zero" / checkpoint.MANIFEST, b'"step": 0', b'"step": 1')
        with pytest.raises(UserError, match=r"^no checkpoint of this run is intact:\n.*0_zero has changed.*\ndelete"):
            folder.furthest(said.append)


def test_a_checkpoint_takes_the_place_of_one_of_the_same_label(tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        checkpoint.save(tmp_path / "1_A", {"adapters": {"a": torch.full((1,), number)}}, VALUES)
    assert checkpoint.load(tmp_path / "1_A")[0]["adapters"]["a"].item() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["1_A"]


@pytest.mark.parametrize("begins", ["log", "checkpoint"])
def test_a_run_that_has_begun_is_on_the_same_data(begins: str, tmp_path: Path) -> None:
    one, other = ({"A": {"train": SplitDigest(digit * WIDTH)}} for digit in "12")
    with opened(tmp_path / "run") as folder:
        assert folder.note_data(one, {}) == folder.note_data(other, {}) == ""
        (folder.checkpoints / ".left").mkdir()
        assert folder.note_data(one, {}) == "", "what is unfinished is no result"
        if begins == "log":
            folder.log_steps([step(1)])
        else:
            folder.save({}, VALUES, "1_A")
        assert folder.note_data(one, {}) == ""
        with pytest.raises(UserError, match=r"have changed since it began:\n  task A, train: .* row 1, no longer"):
            folder.note_data(other, {})


def test_a_checkpoint_is_of_its_run_and_its_logs(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as folder, opened(tmp_path / "other", CONFIG | {"seed": 1}) as other:
        folder.log_score(score(0))
        folder.save({}, {"tasks_done": 0, "step": 0}, "0_zero")
        folder.log_score(score(1))
        folder.save({}, VALUES, "1_A")
        (other.checkpoints / "1_A").mkdir()
        manifest = (folder.checkpoints / "1_A" / checkpoint.MANIFEST).read_bytes()
        (other.checkpoints / "1_A" / checkpoint.MANIFEST).write_bytes(manifest)
        with pytest.raises(UserError, match=r"1_A and .*config.json are of different runs; copy the whole run again"):
            other.furthest(print)
    path = tmp_path / "run" / "scores.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    said: list[str] = []
    with opened(tmp_path / "run") as folder:
        found = folder.furthest(said.append)
        assert found is not None
        assert found[0].name == "0_zero"
        assert "scores.jsonl has changed since it was written\nfalling back to 0_zero" in said[0]


def test_what_is_after_the_state_that_is_resumed_is_dropped(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path / "run") as folder:
        folder.log_steps([step(1), step(2), step(1, stage=2)])
        for stage in (0, 1, 2):
            folder.log_score(score(stage))
            folder.log_extra(score(stage))
        folder.write_json("results.json", {})
        folder.cut(2, (2, 1), said.append)
        assert (folder.path / "results.json").exists()
        assert [len(log.rows) for log in folder.logs.values()] == [3, 3, 3]
        folder.cut(1, (1, 1), said.append)
        assert not (folder.path / "results.json").exists()
        assert [len(log.rows) for log in folder.logs.values()] == [1, 2, 2]
        assert said == []
        folder.write_json("results.json", {})
    change(tmp_path / "run" / "extra_scores.jsonl", b'"stage": 1', b'"stage": 2')
    with opened(tmp_path / "run") as folder:
        folder.cut(1, (1, 1), said.append)
        assert (folder.path / "results.json").exists()
        assert [line.partition("extra_scores.jsonl")[2] for line in said] == [
            ":2 is not as it was written (its seal is another); it and what follows are measured anew"
        ]
    change(tmp_path / "run" / "scores.jsonl", b'"stage": 1', b'"stage": 2')
    with opened(tmp_path / "run") as folder:
        folder.cut(1, (1, 1), said.append)
        assert not (folder.path / "results.json").exists()


def test_rows_left_out_must_stay_the_same_once_there_are_scores(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as folder:
        file = folder.path / run_folder.LEFT_OUT
        folder.note_left_out({})
        assert not file.exists()
        folder.note_left_out({"A": 1})
        assert json.loads(file.read_text())["A"] == 1
        folder.note_left_out({})
        assert not file.exists()
        folder.log_score(score(0))
        folder.note_left_out({})
        with pytest.raises(UserError, match=r"left out other rows of the data \(none\)"):
            folder.note_left_out({"A": 1})
        folder.write_json(run_folder.LEFT_OUT, {"A": 2})
        folder.note_left_out({"A": 2})
        with pytest.raises(UserError, match=r"left out other rows of the data \(those in left_out.json there\)"):
            folder.note_left_out({"A": 1})


def test_environments_of_scores_that_are_not_known(tmp_path: Path) -> None:
    said: list[str] = []
    with opened(tmp_path / "run") as folder:
        assert folder.fingerprints(said.append) == []
        folder.log_score(score(0))
        [found] = folder.fingerprints(said.append)
        assert set(found.values()) == {"unknown"}
        assert said[0].startswith(f"warning: {folder.path / 'environment.json'} is missing: the environment")
        (folder.path / "environment.json").write_text("{")
        [found] = folder.fingerprints(said.append)
        assert set(found.values()) == {"unknown"}
        assert len(said) == 2


class Heard(Tracker):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__({0: 0})
        self.all: list[Any] = []

    def steps(self, rows: Any) -> None:
        self.all.append(("steps", len(rows)))

    def score(self, row: StageScore) -> None:
        self.all.append(("score", row.stage))

    def metrics(self, values: dict[str, float]) -> None:
        self.all.append(values)

    def close(self) -> None:
        self.all.append("closed")


def test_trackers_get_what_is_logged_before_and_after(tmp_path: Path) -> None:
    heard = Heard()
    with opened(tmp_path / "run") as folder:
        folder.log_steps([step(1), step(2)])
        folder.log_score(score(0))
        folder.mirror([heard])
        folder.log_steps([step(3)])
        folder.log_score(score(1))
        folder.log_extra(score(2))
        folder.conclude({"metrics": {"avg_acc": 1.0, "fwt": None}, "profiles": {}})
    assert heard.all == [
        ("steps", 2), ("score", 0), ("steps", 1), ("score", 1), {"metrics/avg_acc": 1.0}, "closed",
    ]  # fmt: skip
