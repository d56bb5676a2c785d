"""Scorers and readers of a suite's own folder, which its manifests name as "module:function"."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from training.toy import change, rows

from cnext import RunConfig, run
from cnext.cli import main
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.scoring import make_scorers
from cnext.scoring.base import AnswerScorer, Prediction, Score, reference_check
from cnext.tables import aggregate
from cnext.tasks import data_check, formats, subset, suites
from cnext.tasks.base import Sample, Turn

SCORING = '''
from dataclasses import dataclass

from cnext.scoring.base import Score
from cnext.tasks.base import Sample, Turn


def shared(answer: str, references: list[str]) -> float:
    """The share of the reference's words that the answer has."""
    said = set(answer.lower().split())
    return max(len(said & set(one.lower().split())) / len(one.split()) for one in references)


def half(task, samples, predictions):
    return [Score(50.0, 25.0, "other") for _ in samples]


def three(answer, references):
    return 3


def fails(answer, references):
    return 1 / 0


def floats(task, samples, predictions):
    return [1.0 for _ in samples]


def empty(task, samples, predictions):
    return []


def far(task, samples, predictions):
    return [Score(250.0, -3.0) for _ in samples]


def low(task, samples, predictions):
    return [Score(0.0, float("-inf"), "other") for _ in samples]


def typo(task, samples, predictions):
    return [Score(0.0, 0.0, "othr") for _ in samples]


def misread(sample, prediction, references):
    return prediction.text in references


def leaves_full(task, samples, predictions):
    raise SystemExit(0)


def leaves_simple(answer, references):
    raise SystemExit(0)


def later(task, samples, predictions):
    right = all(prediction.text in sample.answers for sample, prediction in zip(samples, predictions))
    return [Score(100.0, 100.0)] * len(samples) if right else None


def one(answer):
    return 1.0


def never(answer, references):
    return 0.0


def questions(row, root, name, origin):
    question, answer = row.get("data") or (row["text"], row["answer"])
    return Sample(name, (Turn(question, answer),), root / row["image"], origin=origin)
'''


@pytest.fixture
def suite(toy_suite: Path, tmp_path: Path) -> Path:
    """The toy suite with a module of its own, whose VQAv2 is scored by it."""
    folder = shutil.copytree(toy_suite, tmp_path / "suite")
    (folder / "own.py").write_text(SCORING)
    change(folder / "VQAv2.json", scorer="own:shared")
    return folder


def config(suite: Path, data: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(method="lora", suite=str(suite), data=data, order="VQAv2", out=tmp_path / "runs", device="cpu")


def score(function, answer: str, *references: str) -> Score:
    sample = Sample("7", (Turn("what?", references[0]),), references=references, origin="rows.jsonl:7")
    [found] = AnswerScorer(function)(suites.load("next-tiny").tasks[0], [sample], [Prediction(answer)])
    return found


@pytest.mark.parametrize(
    "value",
    [0.25, numpy.float32(0.25), numpy.array(0.25), torch.tensor(0.25)],
    ids=["float", "numpy", "array", "tensor"],
)
def test_both_profiles_are_the_number_in_percent(value: object) -> None:
    assert score(lambda answer, references: value, "red", "red") == Score(25.0, 25.0, "other")


@pytest.mark.parametrize(("answer", "error"), [("red", ""), ("blue", "other"), ("  ", "instruction_unfollowing")])
def test_a_bool_is_a_score_and_an_empty_answer_does_not_follow_the_instruction(answer: str, error: str) -> None:
    percent = 0.0 if error else 100.0
    assert score(lambda answer, references: answer in references, answer, "red", "scarlet") == Score(
        percent, percent, error
    )


@pytest.mark.parametrize(
    "value",
    [1.5, -0.1, 50, float("nan"), float("inf"), "1", None, {"f1": 1.0}, [1.0], numpy.ones(2), 1j],
    ids=repr,
)
def test_what_is_no_number_from_0_to_1_is_refused_with_its_row(value: object) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:7: expected a number from 0 to 1 of the scorer .*for the answer"):
        score(lambda answer, references: value, "red", "red")


def test_a_run_and_its_report(suite: Path, data: Path, tmp_path: Path) -> None:
    made = config(suite, data, tmp_path)
    results = run(made)
    assert results["finished"]
    [first, last] = rows(made.folder / "scores.jsonl")
    assert first["scorer"] == last["scorer"] == "own:shared"
    assert first["strict"] == first["paper"]
    answers = rows(made.folder / "predictions" / "1_VQAv2" / "VQAv2.jsonl")
    assert {row["error"] for row in answers} <= {"", "other", "instruction_unfollowing"}
    assert (made.folder / "report.html").is_file()


def test_a_run_is_not_resumed_with_another_scorer_of_the_same_name(suite: Path, data: Path, tmp_path: Path) -> None:
    made = config(suite, data, tmp_path)
    run(made)
    file = suite / "own.py"
    file.write_text(SCORING.replace("max(", "min("))
    with pytest.raises(UserError, match=r"another configuration:\n  code\.own:shared: \"[0-9a-f]{64}\" there"):
        run(made)
    file.write_text(SCORING)
    assert run(made)["finished"]


def test_one_table_does_not_hold_scores_of_two_versions(suite: Path, data: Path, tmp_path: Path) -> None:
    first = config(suite, data, tmp_path)
    run(first)
    (suite / "own.py").write_text(SCORING.replace("max(", "min("))
    second = replace(first, out=tmp_path / "later", seed=1)
    run(second)
    with pytest.raises(UserError, match=r"not comparable, one table cannot hold both:\n  code\.own:shared: "):
        aggregate.of_folders([first.folder, second.folder])
    assert aggregate.of_folders([first.folder]).rows


def test_a_changed_file_is_read_again_in_the_same_process(suite: Path) -> None:
    task = suites.load(str(suite)).task("VQAv2")
    sample = Sample("", (Turn("what?", "red ring"),))
    asked = lambda: make_scorers().named("own:shared", task.folder, "scorer")(task, [sample], [Prediction("red")])  # noqa: E731
    assert asked()[0].strict == 50.0
    (suite / "own.py").write_text(SCORING.replace("max(", "0 * max("))
    assert asked()[0].strict == 0.0


def test_two_suites_may_have_modules_of_one_name(suite: Path, tmp_path: Path) -> None:
    other = shutil.copytree(suite, tmp_path / "other")
    (other / "own.py").write_text("def shared(answer, references):\n    return 0.5\n")
    for folder, expected in ((suite, 100.0), (other, 50.0)):
        task = suites.load(str(folder)).task("VQAv2")
        scorer = make_scorers().named(task.scorer, task.folder, "scorer")
        assert scorer(task, [Sample("", (Turn("what?", "red"),))], [Prediction("red")])[0].strict == expected


def test_the_full_form_and_a_reader(suite: Path, data: Path, tmp_path: Path) -> None:
    change(suite / "VQAv2.json", scorer="own:half", format="own:questions")
    made = config(suite, data, tmp_path)
    run(made)
    assert [(row["strict"], row["paper"]) for row in rows(made.folder / "scores.jsonl")] == [(50.0, 25.0)] * 2
    assert json.loads((made.folder / "config.json").read_text())["code"].keys() == {"own:half", "own:questions"}


def test_a_module_in_a_folder_of_the_suite_and_an_installed_one(suite: Path) -> None:
    (suite / "metrics").mkdir()
    shutil.copy(suite / "own.py", suite / "metrics" / "words.py")
    for scorer in ("metrics.words:shared", "difflib:get_close_matches.__call__", "cnext.scoring.text:short_answer"):
        change(suite / "VQAv2.json", scorer=scorer)
        made = RunConfig(suite=str(suite), data=suite, order="VQAv2", device="cpu")
        if scorer.startswith("difflib"):
            with pytest.raises(UserError, match="expected a scorer of"):
                plan(made)
        else:
            assert list(plan(made).as_dict()["code"]) == [scorer]


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("gone:shared", r"scorer of task VQAv2 gone:shared cannot be imported from gone.* No module named 'gone'; "),
        ("own:gone", "cannot be imported from own:gone, .*has no attribute 'gone'"),
        ("own:", "cannot be imported from own:, "),
        (":shared", "cannot be imported from :shared, expected \"module:function\"$"),
        ("own:shared:one", "cannot be imported from own:shared:one, expected \"module:function\"$"),
        ("own.py:shared", "cannot be imported from own.py:shared, expected \"own:shared\"$"),
        ("..own:shared", "cannot be imported from ..own:shared, "),
        ("/etc/own:shared", "cannot be imported from /etc/own:shared, "),
        ("own:one", r"expected a scorer of \(answer, references\) or of \(task, samples, .* takes answer"),
        ("own:__name__", "expected a function as a scorer, got 'own_"),
        ("broken:shared", r"broken\.py raises ZeroDivisionError: division by zero; correct it"),
        ("misspelt:shared", r"cannot be imported from misspelt:shared.*invalid syntax"),
        ("sharde", "unknown scorer of task VQAv2 'sharde'; valid: .*, or module:function"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_before_a_run(scorer: str, message: str, suite: Path, data: Path) -> None:
    (suite / "broken.py").write_text("1 / 0\n")
    (suite / "misspelt.py").write_text("def shared(:\n")
    change(suite / "VQAv2.json", scorer=scorer)
    with pytest.raises(UserError, match=message):
        plan(RunConfig(suite=str(suite), data=data, order="VQAv2", device="cpu"))


def test_a_function_of_text_cannot_score_images(suite: Path, data: Path) -> None:
    change(suite / "Flickr30k.json", scorer="own:shared")
    with pytest.raises(UserError, match=r"task Flickr30k writes images, .* own:shared takes \(answer, references\)"):
        plan(RunConfig(suite=str(suite), data=data, order="Flickr30k", device="cpu"))


@pytest.mark.parametrize(
    ("scorer", "usable", "message"),
    [("three", False, "expected a number"), ("fails", False, "ZeroDivisionError"), ("never", True, "gives it 0")],
)
def test_every_reference_is_tried_before_a_run(
    scorer: str, usable: bool, message: str, suite: Path, data: Path
) -> None:
    change(suite / "VQAv2.json", scorer=f"own:{scorer}")
    task = suites.load(str(suite)).task("VQAv2")
    line = next(formats.scan(task, data, "test"))
    flaw = reference_check(task)(line.sample)
    assert flaw.usable == usable
    assert message in flaw.text
    if usable:
        assert formats.read_samples(task, data, "test", 2)
        return
    with pytest.raises(UserError, match=rf"test\.json#0: .*{message}"):
        formats.read_samples(task, data, "test", 2)


FULL = {
    "floats": r"a cnext\.scoring\.base\.Score of the scorer own:floats, got 1\.0 for the answer",
    "empty": r"a list of \d scores, one per sample, of the scorer own:empty, got 0",
    "far": "a strict score from 0 to 100 percent of the scorer own:far, got 250.0",
    "low": "a finite paper score of the scorer own:low, got -inf",
    "typo": "an error type of hallucination, .* of the scorer own:typo, got 'othr'",
    "misread": "the scorer own:misread raises AttributeError: .*called with .task, samples, predictions.",
    "leaves_full": "the scorer own:leaves_full raises SystemExit: 0; ",
}


@pytest.mark.parametrize("scorer", FULL)
def test_the_full_form_is_tried_with_references_before_a_run(scorer: str, suite: Path, data: Path) -> None:
    change(suite / "VQAv2.json", scorer=f"own:{scorer}")
    with pytest.raises(UserError, match=FULL[scorer]):
        formats.read_samples(suites.load(str(suite)).task("VQAv2"), data, "test", 2)


def test_what_the_full_form_returns_in_a_run_is_checked(suite: Path, data: Path, tmp_path: Path) -> None:
    change(suite / "VQAv2.json", scorer="own:later")
    with pytest.raises(UserError, match=r"expected a list of \d+ scores, .* of the scorer own:later, got None"):
        run(config(suite, data, tmp_path))


@pytest.mark.parametrize("scorer", ["leaves_full", "leaves_simple", "floats"])
def test_a_data_check_ends_with_its_table_and_an_error(
    scorer: str, suite: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(suite / "VQAv2.json", scorer=f"own:{scorer}")
    assert main(["data", "check", str(data), "--suite", str(suite), "--images", "none"])
    said = capsys.readouterr().out
    assert "VQAv2" in said
    assert ("SystemExit" if "leaves" in scorer else "Score of the scorer own:floats") in said


@pytest.mark.parametrize("code", ["raise SystemExit(0)\n", "import sys\nsys.exit()\n"])
def test_a_module_that_ends_python_is_an_error(code: str, suite: Path, data: Path) -> None:
    (suite / "own.py").write_text(code)
    with pytest.raises(UserError, match="raises SystemExit"):
        plan(RunConfig(suite=str(suite), data=data, order="VQAv2", device="cpu"))


def test_a_reader_that_fails_names_the_row(suite: Path, data: Path) -> None:
    change(suite / "VQAv2.json", format="own:questions", train="bad.jsonl")
    (data / "bad.jsonl").write_text('{"data": ["a", "b"]}\n{"data": ["a", "b"], "image": 5}\n')
    try:
        lines = list(formats.scan(suites.load(str(suite)).task("VQAv2"), data, "train"))
    finally:
        (data / "bad.jsonl").unlink()
    assert [line.origin.rpartition(":")[2] for line in lines] == ["1", "2"]
    assert lines[0].problem == "cannot be read: questions raises KeyError: 'image'"
    assert "TypeError" in lines[1].problem


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("Sample(name, (Turn('a', 5),))", "a turn's answer of type int: 5, expected str"),
        ("Sample(name, (Turn(None, 'a'),))", "a turn's instruction of type NoneType: None, expected str"),
        ("Sample(name, (Turn('a', 'b'),), image=str(root))", "image of type str: .*, expected Path"),
        ("Sample(name, (Turn('a', 'b'),), target_image=b'')", "target_image of type bytes: .*, expected Path"),
        ("Sample(name, [Turn('a', 'b')])", "turns of type list, expected a tuple"),
        ("Sample(name, ())", "no turns, expected at least one Turn"),
        ("Sample(name, ('a',))", "turns of type str: 'a', expected Turn"),
        ("Sample(name, (Turn('a', 'b'),), references=('a', 1))", "references of type int: 1, expected str"),
        ("Sample(7, (Turn('a', 'b'),))", "id of type int: 7, expected str"),
        ("Sample(name, (Turn('a', 'b'),), size=(1, '2'))", "size .*, expected a tuple of two whole numbers"),
        ("exit(0)", "SystemExit: 0"),
    ],
)  # fmt: skip
def test_what_a_reader_returns_is_checked(
    made: str, message: str, suite: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (suite / "own.py").write_text(
        SCORING + f"\n\ndef typed(row, root, name, origin):\n    from sys import exit\n    return {made}\n"
    )
    change(suite / "VQAv2.json", format="own:typed")
    with pytest.raises(UserError, match=rf"test\.json#0: cannot be read: typed .*{message}"):
        formats.read_samples(suites.load(str(suite)).task("VQAv2"), data, "test", 2)
    assert main(["data", "check", str(data), "--suite", str(suite), "--images", "none"]) == 1
    assert "cannot be read: typed" in capsys.readouterr().out


def test_the_data_check_and_a_subset_have_the_code(suite: Path, data: Path, tmp_path: Path) -> None:
    class Silent:
        def begin(self, doing: str, total: int) -> None: ...

        def advance(self, count: int) -> None: ...

    loaded = suites.load(str(suite))
    loaded = replace(loaded, tasks=(loaded.task("VQAv2"),), orders={})
    assert not data_check.check(loaded, data, Silent(), "none").problems
    subset.write_subset(loaded, data, 4, 0, tmp_path / "small")
    small = suites.load(str(tmp_path / "small"))
    assert small.task("VQAv2").folder == str(tmp_path / "small")
    assert not data_check.check(small, tmp_path / "small", Silent(), "none").problems


def test_a_list_of_a_suite_runs_none_of_its_code(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "own.py").write_text("raise SystemExit(3)\n")
    assert main(["list", str(suite)]) == 0
    assert "own:shared" in capsys.readouterr().out


def test_a_manifest_cannot_name_a_folder(suite: Path) -> None:
    change(suite / "VQAv2.json", folder="/")
    with pytest.raises(UserError, match=r"unknown field of .*'folder'"):
        suites.load(str(suite))
