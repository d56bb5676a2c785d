"""Comparing runs with the paper and with each other: exact differences, and refusals that name every difference."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cnext.errors import UserError
from cnext.scoring import published
from cnext.scoring.base import ERROR_TYPES
from cnext.tables.compare import CONDITIONS, Comparison, Pair, as_json, compare, of, of_paper, of_run, text

PAPER = published.continual_next()
METHODS = PAPER["methods"]
TASKS = PAPER["conditions"]["tasks"]
DELTA = 1.5


def moved(row: list[float | None]) -> list[float | None]:
    return [None if value is None else value + DELTA for value in row]


def results(method: str = "mage-paper", **changes: Any) -> dict[str, Any]:
    """The results.json of a run that did everything as the paper, and scored 1.5 points more under its profile."""
    rows = METHODS[method]["score_matrix"]
    zero_shot = METHODS["zero-shot"]["score_matrix"][-1]
    conditions = {key: value for key, value in PAPER["conditions"].items() if key != "profile"}
    return {
        "method": method,
        **conditions,
        "budget": "default",
        "seed": 0,
        "writes": PAPER["writes"],
        "profile": "strict",
        "score_matrix": rows,
        "zero_shot": zero_shot,
        "error_matrix": {
            kind: [[None if score is None else (100 - score) * share for score in row] for row in rows]
            for kind, share in zip(ERROR_TYPES, (0.5, 0.25, 0.25), strict=True)
        },
        "profiles": {"paper": {"score_matrix": [moved(row) for row in rows], "zero_shot": moved(zero_shot)}},
        "versions": {"cnext": "0"},
        **changes,
    }


def run(folder: Path, given: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(given))
    return folder


def differences(comparison: Comparison) -> set[float]:
    return {round(pair.difference, 9) for row in comparison.scores for pair in row.values() if pair}


def values(pair: Pair | None) -> tuple[float, float, float]:
    return (pair.here, pair.there, pair.difference)


@pytest.mark.parametrize("method", METHODS)
def test_against_the_paper_under_its_profile(method: str, tmp_path: Path) -> None:
    found = compare(of_run(run(tmp_path, results(method)), "paper"), of_paper(method))
    assert found.unlike == []
    assert differences(found) == {DELTA}
    assert found.metrics["avg_acc"].difference == pytest.approx(DELTA)
    assert found.metrics["avg_hal"] is None
    staged = "stage_averages" in METHODS[method]
    assert len([pair for row in found.scores for pair in row.values() if pair]) == 6 + (21 if staged else 6)
    if staged:
        assert found.metrics["forgetting"].difference == pytest.approx(0, abs=1e-9)
        assert found.metrics["new_acc"].deviation == METHODS[method]["deviations"]["new_acc"]


def test_cells_and_signs_by_hand(tmp_path: Path) -> None:
    found = compare(of_run(run(tmp_path, results("lora")), "paper"), of_paper("mage-paper"))
    assert values(found.scores[3]["VQAv2"]) == pytest.approx((18.94 + DELTA, 41.25, -20.81))
    assert values(found.scores[0]["HQEdit"]) == pytest.approx((58.76 + DELTA, 58.76, DELTA))
    assert found.scores[3]["OCRVQA"] is None
    assert found.metrics["forgetting"].difference == pytest.approx(20.356 - 12.256)
    shown = text(found)
    assert "20.44 -20.81" in shown
    assert any(
        line.split() == "avg_acc 43.73 49.58 -5.85 there ± 0.58 over seeds".split() for line in shown.splitlines()
    )
    assert "Qwen3-VL-30B-A3B-Instruct" in shown
    assert "NOT COMPARABLE" not in shown


DIFFERENT = {
    "suite": "next-tiny",
    "backbone": "tiny",
    "tasks": [*TASKS[:3], "RefCOCO", "OCRVQA", "HQEdit"],
    "split": "validation",
    "samples": dict.fromkeys(TASKS, 200),
}


@pytest.mark.parametrize("condition", DIFFERENT)
def test_one_difference_is_refused(condition: str, tmp_path: Path) -> None:
    given = results(**{condition: DIFFERENT[condition]})
    with pytest.raises(UserError) as error:
        compare(of_run(run(tmp_path, given), "paper"), of_paper("mage-paper"))
    head, *named, advice = str(error.value).splitlines()
    assert head.endswith("MAGE of the paper (tables 1, 2, 3, 4, 5, 6, 7) are not comparable:")
    assert [line.partition(":")[0].strip() for line in named] == [condition]
    assert "--anyway" in advice


@pytest.mark.parametrize(
    ("clip", "alike"),
    [
        (None, True),
        ("openai/ViT-B-32", True),
        ("w/ViT-B-32.pt", True),
        ("ViT-L-14.pt", False),
        ("laion/ViT-B-32", False),
    ],
)
def test_scores_of_another_clip_are_refused(clip: str | None, alike: bool, tmp_path: Path) -> None:
    """config.json alone says which CLIP scored the pictures, where it was not the suite's."""
    for folder, told in (("a", clip), ("b", None)):
        (run(tmp_path / folder, results()) / "config.json").write_text(json.dumps({"clip": told}))
    here = of_run(tmp_path / "a" / "results.json", "paper")
    for there in (of_paper("mage-paper"), of_run(tmp_path / "b", "paper")):
        if alike:
            assert compare(here, there).unlike == []
        else:
            with pytest.raises(UserError, match=rf"\n  clip: {clip} here, the suite's there\n"):
                compare(here, there)


def test_every_difference_is_in_one_message_and_above_the_table(tmp_path: Path) -> None:
    given = results(**DIFFERENT, profiles={})
    here, there = of_run(run(tmp_path, given), "paper"), of_paper("mage-paper")
    lines = [
        "  profile: strict here, paper there",
        "  suite: next-tiny here, continual-next there",
        "  backbone: tiny here, seed-x there",
        f"  tasks: {', '.join(DIFFERENT['tasks'])} here, {', '.join(TASKS)} there",
        "  split: validation here, test there",
    ]
    with pytest.raises(UserError) as error:
        compare(here, there)
    assert str(error.value).splitlines()[1:6] == lines
    found = compare(here, there, anyway=True)
    shown = text(found).splitlines()
    assert shown[2:8] == ["NOT COMPARABLE:", *lines]
    assert [row.condition for row in found.unlike] == ["profile", *DIFFERENT]
    assert found.scores[4]["RefCOCO"] is None
    assert values(found.scores[5]["OCRVQA"]) == pytest.approx((68.74, 34.10, 34.64))


def test_an_unfinished_run_is_compared_up_to_its_last_stage(tmp_path: Path) -> None:
    given = results()
    paper = given["profiles"]["paper"]
    paper["score_matrix"] = [row if t < 3 else [None] * 6 for t, row in enumerate(paper["score_matrix"])]
    found = compare(of_run(run(tmp_path, given), "paper"), of_paper("mage-paper"))
    assert found.stages == 3
    assert found.metrics["avg_acc"].there == pytest.approx((41.25 + 78.37 + 31.26) / 3)
    assert found.metrics["avg_acc"].difference == pytest.approx(DELTA)


def test_two_runs(tmp_path: Path) -> None:
    here = of_run(run(tmp_path / "a", results("mage-paper", seed=1, versions={"cnext": "1"})))
    there = of_run(run(tmp_path / "b", results("lora")), here.conditions["profile"])
    found = compare(here, there)
    assert values(found.scores[6]["VQAv2"]) == pytest.approx((45.42, 18.40, 27.02))
    assert found.metrics["avg_hal"].difference == pytest.approx((12.256 - 20.356) / 2)
    assert found.there.note == ""
    assert differences(compare(here, here)) == {0}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_two_runs_of_other_conditions_are_refused(condition: str, tmp_path: Path) -> None:
    other = run(tmp_path / "b", results(**{condition: {**DIFFERENT, "budget": "smoke"}[condition]}))
    with pytest.raises(UserError, match=f"are not comparable:\n  {condition}: "):
        compare(of_run(run(tmp_path / "a", results())), of_run(other))


def test_runs_with_nothing_in_common(tmp_path: Path) -> None:
    alone = {
        "tasks": ["X"],
        "score_matrix": [[5.0]],
        "zero_shot": [1.0],
        "writes": {"X": ["text"]},
        "error_matrix": None,
    }
    here, there = of_run(run(tmp_path / "a", results())), of_run(run(tmp_path / "b", results(**alone)))
    with pytest.raises(UserError, match="have no task and stage in common"):
        compare(here, there, anyway=True)


def test_the_papers_profile_may_be_below_zero(tmp_path: Path) -> None:
    given = results()
    given["profiles"]["paper"]["score_matrix"][2][2] = -3.0
    assert of_run(run(tmp_path, given), "paper").score(3, "Flickr30k") == -3
    given["score_matrix"] = [[-3.0, *row[1:]] for row in given["score_matrix"]]
    with pytest.raises(UserError, match="score_matrix, row 1, column 1: expected a score in percent, from 0 to 100"):
        of_run(run(tmp_path, given))


@pytest.mark.parametrize(
    ("method", "title"),
    [("mage-paper", "MAGE"), ("ew-ga", "EW+GA"), ("zero-shot", "Zero-Shot"), ("reglora", "RegLoRA")],
)
def test_a_method_is_shown_under_its_name_in_the_paper(method: str, title: str) -> None:
    assert of_paper(method).name.startswith(f"{title} of the paper")


def test_a_method_that_the_paper_does_not_have() -> None:
    valid = "zero-shot, lora, moelora, ewc, lae, pgp, cia, reglora, mage-paper, ew, ew-ga, upper-bound"
    said = f"unknown method of the paper 'mage'; valid: {valid}; choose one with --paper METHOD"
    with pytest.raises(UserError, match=re.escape(said)):
        of_paper("mage")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "results.json: expected the results of a run, found nothing; give a run folder, its"),
        ("", "results.json: expected scores, got an empty file"),
        ("{", r"results.json: expected JSON, got something else \(.*line 1 column 2"),
        ("[[60.0]]", "results.json: expected the results.json of a run, lacks method, tasks, score_matrix"),
        ('{"method": "lora"}', "results.json: expected the results.json of a run, lacks tasks, score_matrix, profile"),
    ],
    ids=["missing", "empty", "cut off", "a list", "lacking"],
)
def test_results_that_are_none(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    for path in (tmp_path, tmp_path / "results.json"):
        with pytest.raises(UserError, match=message) as error:
            of_run(path)
        assert "\n" not in str(error.value)


def csv(path: Path, rows: list[list[float | None]], names: bool = True) -> Path:
    lines = [TASKS] * names + [["" if score is None else str(score) for score in row] for row in rows]
    path.write_text("".join(f"{','.join(line)}\n" for line in lines))
    return path


def test_a_matrix_in_csv_is_enough_and_what_it_does_not_say_is_listed(tmp_path: Path) -> None:
    """Against the paper's method by its printed name: what the CSV cannot say is shown with what the paper has."""
    here = of(csv(tmp_path / "mine.csv", METHODS["lora"]["score_matrix"]))
    found = compare(here, of_paper("mage", printed=True))
    assert values(found.scores[3]["VQAv2"]) == pytest.approx((18.94, 41.25, -22.31))
    assert found.scores[0]["VQAv2"] is None
    assert found.unlike == []
    expected = {key: value for key, value in found.there.conditions.items() if key != "tasks"} | {"budget": None}
    assert found.unknown == {"here": expected}
    head, scores = text(found).split("\n\n")[:2]
    assert f"NOT CHECKED, as {tmp_path / 'mine.csv'} does not say it; MAGE of the paper" in head
    assert "\n  profile: paper\n  suite: continual-next\n  backbone: seed-x\n  split: test\n" in head
    assert "budget" not in head
    assert "18.94 -22.31" in scores
    assert "error types" not in text(found), "the file has none"
    assert json.loads(as_json(found))["unknown"]["here"] == expected


def test_columns_without_names_are_taken_in_order_and_that_is_said(tmp_path: Path) -> None:
    bare = of(csv(tmp_path / "bare.csv", METHODS["lora"]["score_matrix"], names=False))
    named = of(csv(tmp_path / "named.csv", METHODS["mage-paper"]["score_matrix"]))
    for here, there in ((bare, named), (named, bare)):
        found = compare(here, there)
        assert list(found.scores[0]) == TASKS
        assert f"tasks: {', '.join(TASKS)}; the columns are taken as these, in this order" in text(found)
        assert "NOT CHECKED, as neither file says it: profile, suite, backbone, split, samples, budget" in text(found)
    few = of(csv(tmp_path / "few.csv", [[60.0, None], [50.0, 70.0]], names=False))
    with pytest.raises(UserError, match=r"few.csv has 2 columns without names, .* has the tasks VQAv2, ImageNet"):
        compare(few, named)


def test_conditions_that_a_json_matrix_says_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    said = {"tasks": TASKS, "score_matrix": METHODS["lora"]["score_matrix"], "suite": "next-tiny", "method": "LoRA"}
    path.write_text(json.dumps(said))
    assert of(path).method == "LoRA"
    with pytest.raises(UserError, match="are not comparable:\n  suite: next-tiny here, continual-next there"):
        compare(of(path), of_paper("lora"))


def test_a_matrix_of_other_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("ImageNet,VQAv2\n60,\n50,70\n")
    with pytest.raises(UserError, match="  tasks: ImageNet, VQAv2 here, VQAv2, ImageNet, Flickr30k, OCRVQA"):
        compare(of(tmp_path / "mine.csv"), of_paper("lora"))


def test_fractions_are_compared_where_the_scale_is_given(tmp_path: Path) -> None:
    rows = [[None if score is None else score / 100 for score in row] for row in METHODS["lora"]["score_matrix"]]
    path = csv(tmp_path / "mine.csv", rows)
    with pytest.raises(UserError, match="all scores are at most 1: give --scale fraction"):
        of(path)
    assert differences(compare(of(path, scale="fraction"), of_paper("lora"))) == {0}


@pytest.mark.parametrize("name", ["MAGE", "mage", "mage-paper", "Mage-Paper"])
def test_the_papers_name_of_a_method(name: str) -> None:
    assert of_paper(name, printed=True).method == "mage-paper"


def test_every_name_that_the_paper_prints() -> None:
    for method, entry in METHODS.items():
        assert of_paper(entry["title"].upper(), printed=True).method == method


def test_two_seeds_of_one_method(tmp_path: Path) -> None:
    """Their parameters differ from the start: that is said once, and no stage is reported as not identical."""
    digests = {
        seed: [{"stage": 0, "trained": "zero-shot", "sha256": "same"}, {"stage": 1, "trained": "VQAv2", "sha256": seed}]
        for seed in ("0", "1")
    }
    sides = [
        of_run(run(tmp_path / seed, results("lora", seed=int(seed), digests=rows))) for seed, rows in digests.items()
    ]
    found = compare(*sides)
    assert found.unlike == []
    assert found.states is None
    assert "seeds: 0 here, 1 there" in text(found)
    assert "identical" not in text(found)
    assert json.loads(as_json(found))["seeds"] == {"here": 0, "there": 1}
    other = of_run(run(tmp_path / "ewc", results("ewc", digests=digests["1"])))
    assert "states:" not in text(compare(sides[0], other)), "nor of two methods"
    same = compare(sides[0], sides[0])
    assert "states: bit-identical up to stage 1 VQAv2" in text(same)
    assert "seeds:" not in text(same)


def test_data_that_one_run_has_no_digest_of_are_named(tmp_path: Path) -> None:
    """Only of runs: what is printed in a paper has none, which its other conditions say."""
    digest = {"data": {"VQAv2": {"test": {"sha256": "0" * 64, "rows": 4}}}}
    old, new = (of_run(run(tmp_path / name, results(**more))) for name, more in (("old", {}), ("new", digest)))
    for sides in ((old, new), (new, old)):
        assert f"NOT CHECKED: the data, of which {old.name} has no digest" in text(compare(*sides))
    for one in (old, new):
        assert "NOT CHECKED" not in text(compare(one, one))
    assert "NOT CHECKED" not in text(compare(of_run(tmp_path / "new", "paper"), of_paper("mage-paper")))


def test_json_has_both_sides_and_the_difference(tmp_path: Path) -> None:
    shown = json.loads(as_json(compare(of_run(run(tmp_path, results()), "paper"), of_paper("mage-paper"))))
    assert shown["metrics"]["avg_acc"]["difference"] == pytest.approx(DELTA)
    assert shown["metrics"]["new_acc"]["deviation_there"] == METHODS["mage-paper"]["deviations"]["new_acc"]
    assert len(shown["scores"]) == 7
    assert shown["states"] is None


VALUES = [None, 3, -1.0, "x", True, [], ["x"], [[1]], {}, {"paper": 1}, {"paper": {"score_matrix": [1]}}]
REFUSED = {
    "paper": {"method": 11, "tasks": 11, "writes": 10, "profiles": 1},
    "strict": {"method": 11, "tasks": 11, "writes": 10, "score_matrix": 11, "zero_shot": 10, "error_matrix": 10},
}  # fmt: skip


@pytest.mark.parametrize("profile", REFUSED)
def test_values_of_other_types_are_refused(profile: str, tmp_path: Path) -> None:
    """How many of the values are refused for each key; none raises anything but UserError. Pairs of keys likewise."""
    draw, keys, refused = random.Random(0), list(results()), Counter()
    for changed in [[key] for key in keys] + [draw.sample(keys, 2) for _ in range(8)]:
        for value in VALUES:
            try:
                here = of_run(run(tmp_path, results() | dict.fromkeys(changed, value)), profile)
                text(compare(here, of_paper("mage-paper"), anyway=True))
                of_paper(here.method)
            except UserError:
                refused[changed[0]] += len(changed) == 1
    assert +refused == REFUSED[profile]
