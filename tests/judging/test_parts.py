"""The parts of a judge that need no server: the file of verdicts, samples, agreement and the labelled errors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy
import pytest
from judging import edited_errors, made_errors

from cnext.errors import UserError
from cnext.judging.cache import Verdict, Verdicts
from cnext.judging.cases import Case, asked_by, rule
from cnext.judging.requests import Prompts
from cnext.judging.statistics import agreement, stratified, wilson
from cnext.scoring import BOXES, READ, SHORT_ANSWERS, make_scorers
from cnext.scoring.answers import normalise
from cnext.scoring.base import Prediction
from cnext.scoring.boxes import iou, parse_box
from cnext.tasks.base import Sample, Turn

PROMPTS = Prompts()
HAL, IUF, OTH = "hallucination", "instruction_unfollowing", "other"


def row(key: str) -> Verdict:
    who = ("toy", PROMPTS.version, PROMPTS.sha256)
    return Verdict(key, "0" * 64, 1, "VQAv2", 0, "a", True, False, "toy", {"prompt_tokens": 9}, *who)


def kept(path: Path, *keys: str) -> Path:
    verdicts = Verdicts(path, PROMPTS, "toy")
    for key in keys:
        verdicts.add(row(key))
    verdicts.close()
    return path


def test_verdicts_outlive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = kept(tmp_path / "toy.jsonl", "a", "b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert Verdicts(path, PROMPTS, "toy").error_type("b") is None
    kept(path, "b")
    assert path.read_bytes() == whole
    replayed = Verdicts(path, PROMPTS, None)
    assert (replayed.model, replayed.error_type("b"), replayed.error_type("c")) == ("toy", HAL, None)


def test_another_version_or_model_is_refused_by_name(tmp_path: Path) -> None:
    path = kept(tmp_path / "toy.jsonl", "a")
    with pytest.raises(UserError, match=r"toy\.jsonl holds .* of toy, expected those of big: .*; give another --name"):
        Verdicts(path, PROMPTS, "big")
    old = json.loads(path.read_text()) | {"prompts": "v0", "prompts_sha256": "0" * 64, "sha256": ""}
    path.write_text(json.dumps(old) + "\n")
    for model in ("toy", None):
        with pytest.raises(UserError, match=r"verdicts of prompts v0 \(0{12}\), expected those of prompts v1"):
            Verdicts(path, PROMPTS, model)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("nonsense\n", "toy.jsonl:1: expected a JSON object"),
        ('{"key": 1}\n', "toy.jsonl:1: Expected `str`, got `int` - at `.*key`; judge again"),
        ("", "the file has none"),
        (None, "found none"),
    ],
    ids=["nonsense", "key", "empty", "missing"],
)
def test_a_bad_file_to_replay_is_named(text: str | None, match: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "toy.jsonl").write_text(text)
    with pytest.raises(UserError, match=match):
        Verdicts(tmp_path / "toy.jsonl", PROMPTS, None)


def test_two_judges_do_not_write_one_file(tmp_path: Path) -> None:
    first, second = (Verdicts(tmp_path / "toy.jsonl", PROMPTS, "toy") for _ in range(2))
    first.add(row("a"))
    with pytest.raises(UserError, match="another process is writing"):
        second.add(row("b"))
    first.close()


def test_stratified_takes_in_turn_and_only_adds() -> None:
    def case(stage: int, task: str, index: int) -> Case:
        return Case(stage, task, index, "", "text", "", "", "", None, None, None, HAL)

    cases = [case(s, t, i) for s, t, n in ((1, "A", 5), (2, "A", 2), (2, "B", 9)) for i in range(n)]
    chosen = stratified(cases, 9)
    assert Counter((c.stage, c.task) for c in chosen) == {(1, "A"): 4, (2, "A"): 2, (2, "B"): 3}
    assert set(stratified(cases, 4)) < set(chosen)
    assert set(stratified(cases, 99)) == set(cases)
    many = [case(stage, "A", i) for stage in (1, 2) for i in range(30)]
    by_stage = [{c.index for c in stratified(many, 12) if c.stage == stage} for stage in (1, 2)]
    assert by_stage[0] == by_stage[1]


SAID = [
    "red",
    "",
    "djt",
    "[ a",
    "d",
    "7",
    "fish",
    "yes",
    "a b",
    "dark red",
    "red red red",
    "[0.1,0.1,0.9,0.9]",
    "x" * 9,
]


@pytest.mark.parametrize("scorer", [*SHORT_ANSWERS, *BOXES])
@pytest.mark.parametrize("drawn", [False, True], ids=["words", "picture"])
def test_a_judge_has_the_rules_of_the_scorer(scorer: str, drawn: bool) -> None:
    """What a scorer calls malformed is decided without a model, and nothing else is."""
    asked, expected = "What color is the dog?", "[0.2,0.2,0.5,0.5]" if scorer in BOXES else "blue"
    given = (expected,) * 10 if scorer == "coin_textvqa" else ()
    samples = [Sample(str(number), (Turn(asked, expected),), references=given) for number in range(len(SAID))]
    picture = numpy.zeros((2, 2, 3), numpy.uint8) if drawn else None
    scores = make_scorers()[scorer](None, samples, [Prediction(text, picture) for text in SAID])
    task = asked_by(scorer, [(asked, expected)] * len(SAID))
    ruled = [rule(scorer, text, drawn, expected, asked, task, "") for text in SAID]
    assert ruled == [score.error for score in scores]
    case = Case(1, "t", 0, "0", "text", asked, expected, "", None, None, None, IUF)
    assert [replace(case, by_rule=label).decided for label in ruled] == [label == IUF for label in ruled]
    if scorer not in BOXES and not drawn:
        alone = dict(zip(SAID, ruled, strict=True))
        assert [alone[text] for text in ("[ a", "djt")] == [IUF, IUF], "no color, whatever else"
        labels = [rule(scorer, "djt", False, "boat", "What is it?", task, "")]
        assert labels == ["hallucination" if scorer in READ else IUF]


def test_wilson() -> None:
    # The ends solve |p - p0| = z sqrt(p0 (1 - p0) / n).
    for hits, count in ((0, 7), (3, 10), (10, 10), (61, 200)):
        low, high = wilson(hits, count)
        assert 0 <= low <= hits / count <= high <= 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(hits / count - end) == pytest.approx(1.959964 * (end * (1 - end) / count) ** 0.5, rel=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(8, 20)
    covered = [sum(comb(20, k) * p**k * (1 - p) ** (20 - k) for k in range(9)) for p in (low, high)]
    assert covered[0] > 0.95
    assert covered[1] < 0.05


def test_agreement() -> None:
    known = [HAL] * 4 + [IUF] * 4 + [OTH] * 2
    assert agreement(known, known)["kappa"] == 1.0
    found = agreement(known, [HAL, HAL, HAL, IUF, IUF, IUF, IUF, IUF, HAL, None])
    # 9 judged, 7 agree; chance (4*4 + 4*5 + 1*0) / 81.
    assert found["accuracy"] == pytest.approx(7 / 9)
    assert found["kappa"] == pytest.approx((7 / 9 - 36 / 81) / (1 - 36 / 81))
    assert found["confusion"][OTH] == {HAL: 1, IUF: 0, OTH: 0}
    assert found["types"][HAL] == {"precision": 3 / 4, "recall": 3 / 4}
    assert found["types"][OTH] == {"precision": None, "recall": 0.0}
    assert (found["judged"], found["unjudged"]) == (9, 1)
    assert agreement(known, [None] * 10)["accuracy"] is None
    assert agreement([HAL], [HAL])["kappa"] is None


def test_the_labelled_set_is_what_its_generator_makes() -> None:
    for generator in (made_errors, edited_errors):
        assert generator.FILE.read_text(encoding="utf-8") == generator.content()


def test_labelled_errors_are_errors() -> None:
    errors = made_errors.made_errors()
    assert len(errors) == 200
    assert min(Counter(error["error"] for error in errors).values()) >= 60
    for error in errors:
        if error["task"] in ("Flickr30k", "HQEdit"):
            assert (error["drawn"] is None) == (error["error"] == IUF)
        elif error["task"] == "RefCOCO":
            answer = parse_box(error["answer"])
            assert (answer is None) == (error["error"] == IUF)
            assert answer is None or iou(answer, parse_box(error["expected"])) < 0.5
        else:
            assert normalise(error["answer"]) != normalise(error["expected"])
