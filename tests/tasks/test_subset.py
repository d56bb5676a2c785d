"""Subsets depend on the seed only, use the original images, and can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tasks.official import listing, picture, write_continual_next
from training.toy import rows

from cnext.cli import main
from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.tasks import data_check, formats, suites
from cnext.tasks.base import DataError
from cnext.tasks.data_check_text import Bars
from cnext.tasks.subset import write_subset
from cnext.training.setup import read_suite


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return write_continual_next(tmp_path / "data")


def drawn(official: Path, out: Path, n: int, seed: int = 0, **options: bool) -> suites.Suite:
    """A subset of the paper's suite, written to a folder."""
    write_subset(suites.load("continual-next"), official, n, seed, out, **options)
    return suites.load(str(out))


def read(folder: Path, task: str) -> list[dict]:
    return rows(folder / task / "annotations/train_001.jsonl")


def test_a_subset_is_a_suite_that_runs_at_once(data: Path, tmp_path: Path) -> None:
    """Of the synthetic suite: the plan takes it, and every sample is one of the whole suite's."""
    out = tmp_path / "small"
    assert write_subset(suites.load("next-tiny"), data, 5, 0, out) == "next-tiny-n5-seed0"
    planned = plan(RunConfig(suite=str(out), data=out))
    assert planned.suite.name == "next-tiny-n5-seed0"
    assert planned.config.data == out
    samples = read_suite(planned, out)
    for split in ("train", "test"):
        for name in planned.order:
            whole = {
                sample.id: sample for sample in formats.read_samples(suites.load("next-tiny").task(name), data, split)
            }
            assert len(samples[split][name]) == 5
            for sample in samples[split][name]:
                one = whole[sample.id]
                assert sample.turns == one.turns
                assert sample.image is None or sample.image.samefile(one.image)
    assert len(formats.read_samples(planned.suite.task("VQAv2"), out, "validation")) == 5


def test_a_subset_of_the_papers_layout_has_no_problems(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "small"
    suite = drawn(official, out, 2)
    with Bars() as bars:
        report = data_check.check(suite, out, bars)
    assert report.problems == 0
    assert plan(RunConfig(suite=str(out), data=out, preset="paper", order="appendix")).order[3] == "RefCOCO"
    assert {task.train_count for task in suite.tasks} == {2}


def test_image_positions_and_epochs_are_kept(official: Path, tmp_path: Path) -> None:
    """The random place of an image goes with the sample's id, which the subset keeps."""
    suite = drawn(official, tmp_path / "small", 3)
    whole, small = suites.load("continual-next").task("VQAv2"), suite.task("VQAv2")
    first = {sample.id: sample.image_first for sample in formats.read_samples(whole, official, "train")}
    kept = formats.read_samples(small, tmp_path / "small", "train")
    assert len(kept) == 3
    assert all(first[sample.id] == sample.image_first for sample in kept)
    recipe = suite.budgets["paper"]
    assert (recipe.steps["VQAv2"], recipe.steps["HQEdit"], recipe.warmup_steps) == (1500, 5000, 63)
    assert (recipe.batch_size, recipe.train_samples) == (256, 0)


def test_rows_depend_on_the_seed_and_a_smaller_n_is_a_subset(official: Path, tmp_path: Path) -> None:
    for name, n, seed in (("a", 4, 0), ("b", 4, 0), ("c", 2, 0), ("d", 4, 1)):
        drawn(official, tmp_path / name, n, seed)
    protocols = [json.loads((tmp_path / name / "suite.json").read_text())["protocol"] for name in "abcd"]
    assert protocols[0] == protocols[1]
    assert len({protocol["sha256"] for protocol in protocols}) == 3
    assert protocols[0]["rows"]["VQAv2"] == {"train": 6, "test": 3}
    for task in protocols[0]["rows"]:
        whole, part = read(tmp_path / "a", task), read(tmp_path / "c", task)
        assert whole == read(tmp_path / "b", task)
        assert [row for row in whole if row in part] == part
    assert any(read(tmp_path / "a", task) != read(tmp_path / "d", task) for task in protocols[0]["rows"])
    assert [row["question_id"] for row in read(tmp_path / "c", "VQAv2")] == ["VQAv2-train-000001", "VQAv2-train-000003"]


def test_absolute_paths(official: Path, tmp_path: Path) -> None:
    drawn(official, tmp_path / "small", 1, absolute=True)
    manifest = json.loads((tmp_path / "small/VQAv2.json").read_text())
    assert manifest["train_images"] == str(official / "SEED-Data-VQAv2/COCO2014/train2014")
    (tmp_path / "small").rename(tmp_path / "moved")
    assert formats.read_samples(suites.load(str(tmp_path / "moved")).task("VQAv2"), tmp_path / "moved", "train")


def test_captions_of_a_separate_file_go_into_the_rows(tmp_path: Path) -> None:
    """Rows drawn no longer stand where the file of references counts them."""
    suite = suites.load("ucit")
    task = suite.task("VizWiz")
    picture(tmp_path / "datasets/a.jpg")
    talk = [{"from": "human", "value": "<image>\nCaption?"}, {"from": "gpt", "value": "A dog."}]
    listing(tmp_path / task.train, [{"image": "a.jpg", "conversations": talk}])
    listing(tmp_path / task.test, [{"question_id": k, "image": "a.jpg", "text": "Caption?"} for k in range(1, 9)])
    annotations = [{"image_id": k, "caption": f"{k} {i}"} for k in range(1, 9) for i in range(2)]
    (tmp_path / task.references).write_text(json.dumps({"annotations": annotations}))
    alone = suites.Suite("one", "", (task,), {"paper": ("VizWiz",)}, {})
    write_subset(alone, tmp_path, 2, 0, tmp_path / "small")
    kept = formats.read_samples(suites.load(str(tmp_path / "small")).task("VizWiz"), tmp_path / "small", "test")
    assert [sample.references for sample in kept] == [(f"{sample.id} 0", f"{sample.id} 1") for sample in kept]


def test_unusable_rows_raise_and_nothing_is_written(official: Path, tmp_path: Path) -> None:
    path = official / "SEED-Data-VQAv2/annotations/output_001.jsonl"
    content = path.read_text()
    path.write_text(content + "{oops\n")
    with pytest.raises(DataError, match=r"output_001\.jsonl:5: is not JSON(.|\n)*cnext data check"):
        drawn(official, tmp_path / "small", 2)
    path.write_text(content)
    (official / "SEED-Data-VQAv2/COCO2014/train2014/000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"names an image that is missing: .*000000000001\.jpg"):
        drawn(official, tmp_path / "small", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (1, -1)])
def test_wrong_numbers(n: int, seed: int, official: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be at least"):
        drawn(official, tmp_path / "small", n, seed)


def test_command(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verb = ["data", "subset", str(official), "--n", "2", "--seed", "3"]
    assert main(verb) == 0
    name = "continual-next-n2-seed3"
    assert capsys.readouterr().out == f"{name}: cnext-run --suite {name} --data {name}\n"
    assert main(["data", "check", name, "--suite", name]) == 0
    assert main(verb) == 2
    assert f"{name} is there already" in capsys.readouterr().err
