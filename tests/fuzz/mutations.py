"""Mutations of valid input: bytes flipped, cut, doubled; JSON values replaced, removed, nested."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

Place = float
BYTES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "double", "insert"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)
INSERTED = (b"\x00", b"\xff\xfe", b"\n", b'"', b"{", b"]", b"\\u0000", b"\\ud800", b"1e999", b"NaN", b"../",
            b"\xf0\x9f\x98\x80")  # fmt: skip
PATHS = ["../other/secret.txt", "/etc/passwd", "..", ".", "", "a/../../other/secret.txt", "a\x00b", "x" * 300, "~",
         "\\..\\x"]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**63, 10**30, 0.5, -1e308, float("nan"), float("inf"), float("-inf"),
    [], [[]], {}, {"a": 1}, [None], "", "0", "a", "[0.1,0.2,0.3,0.4]", "\x00", "\ud800", "A" * 5000, *PATHS,
]  # fmt: skip
VALUES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "remove", "double", "nest", "rename"]),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(range(len(ODD))),
    ),
    min_size=1,
    max_size=3,
)
"""Kind of mutation, position (as a fraction), and index of the odd value."""


def mutated_bytes(content: bytes, mutations: list[tuple[str, Place, int]]) -> bytes:
    """The content after each mutation in turn."""
    for what, share, number in mutations:
        at = int(share * len(content))
        if what == "flip":
            content = content[:at] + bytes([content[at] ^ (1 << number % 8)]) + content[at + 1 :] if content else b""
        elif what == "set":
            content = content[:at] + bytes([number]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at]
        elif what == "drop":
            content = content[:at] + content[at + 1 + number :]
        elif what == "double":
            content = content[:at] + content[at : at + number] * 2 + content[at + number :]
        else:
            content = content[:at] + INSERTED[number % len(INSERTED)] + content[at:]
    return content


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    return found + [place for key in keys for place in _places(value[key])]


def mutated_value(value: Any, mutations: list[tuple[str, Place, int]]) -> Any:
    """A copy of a JSON value after each mutation in turn."""
    box = [copy.deepcopy(value)]
    for what, share, number in mutations:
        places = _places(box)
        if not places:
            break
        holder, key = places[int(share * len(places))]
        if what == "replace":
            holder[key] = copy.deepcopy(ODD[number])
        elif what == "remove":
            holder.pop(key)
        elif what == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif what == "nest":
            holder[key] = [holder[key]] if number % 2 else {"a": holder[key]}
        elif isinstance(holder, dict) and isinstance(ODD[number], str):
            holder[ODD[number]] = holder.pop(key)
    return box[0] if box else None


def dumped(value: Any) -> bytes:
    """JSON with NaN and lone surrogates, as lenient writers produce it."""
    return json.dumps(value).encode()


def mutated(content: bytes, mutations: list[tuple[str, Place, int]]) -> bytes:
    """JSON after mutations of its values or of its bytes, whichever they are."""
    if mutations[0][0] in ("replace", "remove", "nest", "rename"):
        return dumped(mutated_value(json.loads(content), mutations))
    return mutated_bytes(content, mutations)
