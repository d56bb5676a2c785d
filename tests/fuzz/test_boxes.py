"""Fuzzing of the parser of bounding boxes."""

from __future__ import annotations

from fuzz.conftest import FACTOR
from hypothesis import given, settings
from hypothesis import strategies as st

from cnext.scoring.boxes import iou, parse_box, parse_box_as_released

BOX_WORDS = ["[", "]", "(", ",", "0.1", ".5", "1.", "-", "+", "1e5", "nan", "inf", " ", "\u0663", "9" * 400, "_", "box"]


@settings(max_examples=2500 * FACTOR)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(BOX_WORDS), max_size=14).map("".join)))
def test_boxes(text: str) -> None:
    """Any text gives an ordered box or none, and its overlap with another is at most 1."""
    box = parse_box(text)
    assert box is None or (len(box) == 4 and box[0] < box[2] and box[1] < box[3])
    released = parse_box_as_released(text)
    assert released is None or len(released) == 4
    for one in (box, released):
        if one is not None:
            iou(one, (0.1, 0.1, 0.5, 0.5))
    if box is not None:
        assert not iou(box, (0.1, 0.1, 0.5, 0.5)) > 1


def test_a_long_row_of_digits_is_given_up_at_once() -> None:
    """With two ways to read each digit this would take hours."""
    assert parse_box("[" + "1" * 200_000) is None
