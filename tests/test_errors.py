"""Helpers for messages, and JSON that Python would read in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnext import records
from cnext.errors import UserError, parse_json, printable


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 0, "seed": 1}', "it has the key 'seed' twice in one object"),
        ('[{"a": {"b": 1, "c": 2, "b": 1}}]', "it has the key 'b' twice in one object"),
        ('{"a": 1, "\\u0061": 2}', "it has the key 'a' twice in one object"),
        (f'{{"{"x" * 200_000}": 1, "{"x" * 200_000}": 2}}', "it has the key 'xxx[x]*(?! )"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
    ids=["top", "inside", "escaped", "long", "nested"],
)
def test_keys_that_are_there_twice_are_refused(text: str, message: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=message) as error:
            parse_json(given)
        assert len(str(error.value)) < 200


def test_the_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"seed": 0, "seed": 1}')
    with pytest.raises(UserError, match=r"config\.json: expected JSON, could not read it \(it has the key 'seed' "):
        records.read(file, dict, "run it again")


def test_what_is_written_once_is_read() -> None:
    assert parse_json('{"a": [{"b": 1}, {"b": 1}], "c": {"b": 1}}') == {"a": [{"b": 1}, {"b": 1}], "c": {"b": 1}}


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
