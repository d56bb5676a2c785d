"""Values of the tables of Arrow, in the form that rows of JSON have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cnext.tasks.kept_images import ImageBytes

if TYPE_CHECKING:
    import pyarrow


def features_of(schema: pyarrow.Schema) -> dict[str, Any]:
    """The features of columns as ``datasets.Features.to_dict`` gives them, which datasets writes into the schema."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def present(value: Any) -> Any:
    """A value of a table as JSON has it: null and NaN are None, and absent in an object; bytes are `ImageBytes`."""
    if isinstance(value, bytes):
        return ImageBytes(value)
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes | None):
        held = value["bytes"] or (value["bytes"] is not None and not value["path"])
        return ImageBytes(value["bytes"], value["path"] or "") if held else value["path"]
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := present(item)) is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def named(value: Any, feature: Any) -> Any:
    """A value with the names of its classes in place of their numbers; -1, which is no class, is None.

    feature: as JSON, such as {"_type": "ClassLabel", "names": ["cat", "dog"]} or {"_type": "List", "feature": {...}}.
    """
    if isinstance(value, list):
        return [named(item, feature) for item in value]
    if isinstance(feature, list):
        return named(value, feature[0])
    if not isinstance(feature, Mapping):
        return value
    if isinstance(feature.get("_type"), str) and "feature" in feature:
        return named(value, feature["feature"])
    if feature.get("_type") == "ClassLabel" and type(value) is int:
        names = feature.get("names")
        return (names[value] if 0 <= value < len(names) else None) if names else value
    if feature.get("_type") == "Json" and isinstance(value, str):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: named(item, feature.get(key)) for key, item in value.items()}
    return value
