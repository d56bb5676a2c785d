"""Shorten matplotlib's SVG to a quarter of its bytes, without changing the picture."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.sax.saxutils import escape

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
DECIMALS = 2
"""Of a coordinate, in points: half a hundredth of a point is not seen."""
COORDINATES = ("d", "x", "y", "transform", "width", "height", "points")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_NO_TURN = re.compile(r"rotate\(-?0 [^)]*\)")
_REFERENCE = re.compile(r"#([^)\"']+)")
_POINT = re.compile(r"M [-\d.]+ [-\d.]+")
_FAMILY = re.compile(r"font-family:([^;]*);?")


def compact(svg: bytes) -> bytes:
    """The picture with coordinates rounded and without metadata, identifiers that nothing refers to, and bare groups.

    Styles stay with their elements, so that a viewer without style sheets shows the picture as well.
    """
    root = ElementTree.fromstring(svg)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _REFERENCE.findall(value)}
    head = f"<svg xmlns='{SVG[1:-1]}' xmlns:xlink='{XLINK[1:-1]}' font-family='sans-serif'"
    return "".join([head, _attributes(root, used), ">", *(_write(child, used) for child in root), "</svg>"]).encode()


def _write(element: ElementTree.Element, used: set[str]) -> str:
    name = element.tag.removeprefix(SVG)
    if name == "metadata" or (name == "path" and _empty(element)):
        return ""
    attributes = _attributes(element, used)
    inside = "".join(_write(child, used) for child in element)
    if name in ("g", "defs") and (not inside or (name == "g" and not attributes)):
        return inside
    # Style sheets and lines of text are the only text; what stands between elements is indentation.
    content = escape(element.text or "") if name in ("text", "tspan", "style") else ""
    return f"<{name}{attributes}>{content}{inside}</{name}>" if content or inside else f"<{name}{attributes}/>"


def _empty(path: ElementTree.Element) -> bool:
    """Whether a path goes nowhere."""
    return not (where := path.get("d", "").strip()) or _POINT.fullmatch(where) is not None


def _attributes(element: ElementTree.Element, used: set[str]) -> str:
    kept = []
    for name, value in element.attrib.items():
        if (name == "id" and value not in used) or (name in ("version", "type")):
            continue
        if name in COORDINATES:
            value = " ".join(_NO_TURN.sub("", _NUMBER.sub(_rounded, value)).split())
        if name == "d":
            value = re.sub(r" ?([A-Za-z]) ?", r"\1", value)
        if name == "style":
            value = _FAMILY.sub("", re.sub(r"\s*([:;,])\s*", r"\1", value))
        if value:
            quoted = escape(value, {"'": "&apos;"})
            kept.append(f" {name.replace(XLINK, 'xlink:')}='{quoted}'")
    return "".join(kept)


def _rounded(found: re.Match[str]) -> str:
    return f"{round(float(found[0]), DECIMALS) or 0.0:.{DECIMALS}f}".rstrip("0").rstrip(".")
