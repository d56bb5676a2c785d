"""Both profiles of the box scorer, and the two parsers."""

import random

import numpy
import pytest

from cnext.scoring import make_scorers
from cnext.scoring.base import Prediction, Score
from cnext.scoring.boxes import iou, parse_box, parse_box_as_coin, parse_box_as_released, reference_flaw
from cnext.tasks.base import DataError, Sample, Turn

SCORERS = make_scorers()


def score(text: str, reference: str, size: tuple[int, int] | None = None, image: numpy.ndarray | None = None) -> Score:
    sample = Sample("7", (Turn("Where?", reference),), size=size, origin="test.json#7")
    (result,) = SCORERS["box"](None, [sample], [Prediction(text, image)])
    return result


@pytest.mark.parametrize(("scorer", "paper"), [("box", 0), ("coin_grounding", 100)])
def test_the_released_text_is_scored_by_the_papers_evaluator_alone(scorer: str, paper: float) -> None:
    sample = Sample("7", (Turn("Where?", "[0.20,0.40,0.80,0.70]"),))
    (found,) = SCORERS[scorer](None, [sample], [Prediction("[0.20,0.40,0.80,0.70]", None, "")])
    assert (found.strict, found.paper) == (100, paper)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.27,0.42,0.83,0.73]", (0.27, 0.42, 0.83, 0.73)),
        (" [ 0.27, .42 ,0.83,1 ]. ", (0.27, 0.42, 0.83, 1.0)),
        ("The box is [0,0,1,1].", (0.0, 0.0, 1.0, 1.0)),
        ("[-0.01,0,1.02,1]", (-0.01, 0.0, 1.02, 1.0)),
        ("0.27,0.42,0.83,0.73", None),
        ("(0.27,0.42,0.83,0.73)", None),
        ("[0.27,0.42,0.83]", None),
        ("[0.27,0.42,0.83,0.73,0.9]", None),
        ("[0.27,0.42,0.83,0.73", None),
        ("[0,0,1,1] [0,0,1,1]", None),
        ("[0.8,0.4,0.2,0.7]", None),
        ("[0.2,0.7,0.8,0.7]", None),
        ("[nan,0,1,1]", None),
        ("[0.1.2,0,1,1]", None),
        ("", None),
        ("[1e-05,0.62,0.98,9.5E-1]", (1e-05, 0.62, 0.98, 0.95)),
        ("[0,0,1e+2,1.e2]", (0.0, 0.0, 100.0, 100.0)),
        ("(0.65,0.62),(0.98,0.95)", (0.65, 0.62, 0.98, 0.95)),
        ("<box>( 12, 7 ) , (900 ,1e3)</box>", (12.0, 7.0, 900.0, 1000.0)),
        ("\uff3b\uff10.2\uff0c0.1\uff0c0.4\uff0c0.5\uff3d", (0.2, 0.1, 0.4, 0.5)),
        ("[\u22120.1,0,1,1]", (-0.1, 0.0, 1.0, 1.0)),
        ("(0.98,0.95),(0.65,0.62)", None),
        ("(0,0),(1,1) or [0,0,1,1]", None),
        ("(0,0),(1,1),(2,2),(3,3)", None),
        ("(0,0) (1,1)", None),
        ("(0.1,0.1),(0.5,0.5),(0.2,0.9)", None),
        ("(0,0),(1,1), (2,2)", None),
        ("(0,0),(1,1) and (2,2)", None),
        ("(2,2); (0,0),(1,1)", None),
        ("(0,0),(1,1),(2,2),(3,3),(4,4)", None),
        ("(0,0),(1,1),(2,2", None),
        ("(0,0),(1,1) (see (a), 2)", (0.0, 0.0, 1.0, 1.0)),
        ("the one at (0.5,0.5): [0,0,1,1]", (0.0, 0.0, 1.0, 1.0)),
        ("[1e,0,1,1]", None),
        ("[0,0,1e999,1]", None),
    ],
)
def test_parse_box(text: str, box: tuple | None) -> None:
    assert parse_box(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.27,0.42,0.83,0.73]", (0.27, 0.42, 0.83, 0.7)),
        ("[1.00,0.42,0.83,0.73]", (0.0, 0.42, 0.83, 0.7)),
        ("[0.27,0.42,0.83,0.7]", (0.27, 0.42, 0.83, 0.0)),
        ("(0.27,0.42,0.83,0.73)\n", (0.27, 0.42, 0.83, 0.7)),
        ("0.27,0.42,0.83,0.73", (0.27, 0.42, 0.83, 0.7)),
        ("[0.27,0.42,0.83,0.73].", (0.27, 0.42, 0.83, 0.73)),
        ("[0,0.42,0.83,0.73]", None),
        ("[0.27,0.42,0.83]", None),
        ("[0.27,0.42,0.83,0.73,0.91]", None),
        ("a cat", None),
        ("", None),
    ],
)
def test_parse_box_as_released(text: str, box: tuple | None) -> None:
    assert parse_box_as_released(text) == box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(0.27,0.42,0.83,0.73)", (0.27, 0.42, 0.83, 0.73)),
        ("[0.27,0.42,0.83,0.73]\n", (0.27, 0.42, 0.83, 0.7)),
        ("[1.00,0.42,0.83,0.73]", (0.0, 0.42, 0.83, 0.7)),
        ("[(0.27,0.42,0.83,0.73)]", (0.27, 0.42, 0.83, 0.73)),
        ("(0.27,0.42),(0.83,0.73)", None),
        ("[11e-05,0.42,0.83,0.73]", (1e-05, 0.42, 0.83, 0.7)),
        ("", None),
    ],
)
def test_parse_box_as_coin(text: str, box: tuple | None) -> None:
    assert parse_box_as_coin(text) == box


@pytest.mark.parametrize("scorer", ["box", "coin_grounding"])
def test_coin_differs_from_the_benchmark_in_round_brackets_alone(scorer: str) -> None:
    def paper(text: str, reference: str) -> float:
        sample = Sample("7", (Turn("Where?", reference),), size=(640, 480))
        return SCORERS[scorer](None, [sample], [Prediction(text)])[0].paper

    # Of (.27, .60, .83, .69) the released parser loses the 9: (.27, .60, .83, .6) has no area.
    assert paper("(0.27,0.60,0.83,0.69)", "[0.27,0.60,0.83,0.69]") == (100 if scorer == "coin_grounding" else 0)
    assert paper("[0.27,0.60,0.83,0.69]", "[0.27,0.60,0.83,0.69]") == 0
    assert paper("[0.27,0.42,0.83,0.73]", "[0.27,0.42,0.83,0.73]") == 100


@pytest.mark.parametrize(
    "reference", ["[31,29,15,15]", "[0.2,0.7,0.8,0.7]", "[0.5,0.5,0.5,0.5]", "(0.98,0.95),(0.65,0.62)"]
)
@pytest.mark.parametrize("scorer", ["box", "coin_grounding"])
def test_a_reference_without_area_scores_nothing(scorer: str, reference: str) -> None:
    sample = Sample("7", (Turn("Where?", reference),), origin="test.json#7")
    for said in (reference, "[0,0,1,1]", "somewhere"):
        (result,) = SCORERS[scorer](None, [sample], [Prediction(said)])
        assert (result.strict, result.paper) == (0, 0)
    flaw = reference_flaw(sample)
    assert flaw is not None
    assert flaw.usable
    assert reference in flaw.text


@pytest.mark.parametrize(
    "reference",
    ["somewhere", "", "[0,0,1]", "[0,0,1,1] [0,0,1,1]", "[0,0,1e999,1]", "31 29 15 15", "(0,0),(1,1),(2,2)"],
)
def test_a_reference_that_is_no_box_has_a_flaw(reference: str) -> None:
    flaw = reference_flaw(Sample("7", (Turn("Where?", reference),)))
    assert flaw is not None
    assert not flaw.usable
    assert "expected a reference box [x1,y1,x2,y2]" in flaw.text


@pytest.mark.parametrize(
    "reference", ["[0,0,1,1]", "[1e-05,0.62,0.98,0.95]", "(0.65,0.62),(0.98,0.95)", "at [0,0,9,9]."]
)
def test_a_box_has_no_flaw(reference: str) -> None:
    assert reference_flaw(Sample("7", (Turn("Where?", reference),))) is None


def test_iou_equals_counting_cells() -> None:
    draw = random.Random(0)
    for _ in range(50):
        boxes = []
        for _ in range(2):
            (x1, x2), (y1, y2) = (sorted(draw.sample(range(9), 2)) for _ in range(2))
            boxes.append((x1, y1, x2, y2))
        cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes]
        assert iou(*boxes) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))
        assert iou(*boxes) == iou(*reversed(boxes))


def test_iou_of_boxes_without_area_is_zero() -> None:
    assert iou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0.0


@pytest.mark.parametrize("size", [None, (640, 480), (333, 500)], ids=str)
@pytest.mark.parametrize(
    ("text", "reference", "strict", "paper"),
    [
        pytest.param("[0.27,0.42,0.83,0.73]", "[0.27,0.42,0.83,0.73]", 100, 100, id="equal"),
        pytest.param("[0.27,0.60,0.83,0.69]", "[0.27,0.60,0.83,0.69]", 100, 0, id="flat box, last digit lost"),
        pytest.param("[0.27,0.42,0.83,0.7]", "[0.27,0.42,0.83,0.7]", 100, 0, id="one decimal"),
        pytest.param("[0.00,0.00,0.50,1.00]", "[0.00,0.00,1.00,1.00]", 100, 0, id="exactly one half"),
        pytest.param("[0.00,0.00,0.51,1.00]", "[0.00,0.00,1.00,1.00]", 100, 100, id="over one half"),
        pytest.param("[0.00,0.00,0.49,1.00]", "[0.00,0.00,1.00,1.00]", 0, 0, id="under one half"),
        pytest.param("0.27,0.42,0.83,0.73", "[0.27,0.42,0.83,0.73]", 0, 100, id="no brackets"),
        pytest.param("", "[0.27,0.42,0.83,0.73]", 0, 0, id="empty"),
    ],
)
def test_profiles(text: str, reference: str, size: tuple | None, strict: float, paper: float) -> None:
    result = score(text, reference, size)
    assert (result.strict, result.paper) == (strict, paper)


def test_an_image_for_a_box_is_wrong_in_strict_alone() -> None:
    box = "[0.27,0.42,0.83,0.73]"
    drawn = score(box, box, image=numpy.zeros((4, 4, 3), numpy.uint8))
    assert drawn == Score(0.0, 100.0, "instruction_unfollowing")


def test_the_wrong_reference_names_its_place() -> None:
    with pytest.raises(DataError, match=r"test\.json#7.*'somewhere'"):
        score("[0,0,1,1]", "somewhere")


def test_perfect_answers_lose_a_tenth_to_the_released_parser() -> None:
    draw = random.Random(0)
    boxes = []
    while len(boxes) < 2000:
        x1, y1 = draw.uniform(0, 0.9), draw.uniform(0, 0.9)
        x2, y2 = min(x1 + draw.uniform(0.05, 0.6), 1), min(y1 + draw.uniform(0.05, 0.6), 1)
        boxes.append(f"[{x1:.2f},{y1:.2f},{x2:.2f},{y2:.2f}]")
    samples = [Sample(str(i), (Turn("Where?", box),)) for i, box in enumerate(boxes)]
    scores = SCORERS["box"](None, samples, [Prediction(box) for box in boxes])
    assert all(result.strict == 100 for result in scores)
    assert 80 < sum(result.paper for result in scores) / len(scores) < 97
