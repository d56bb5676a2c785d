"""Helpers for messages."""

from __future__ import annotations

import pytest

from cnext.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("what? “naïve” 漢字 🙂", "what? “naïve” 漢字 🙂"),
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\u202etxt.\u2066", r"\u202etxt.\u2066"),
        ("\x85\u2028\ud800\U000e0001", r"\x85\u2028\ud800\U000e0001"),
    ],
)
def test_what_is_shown_of_a_text_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
