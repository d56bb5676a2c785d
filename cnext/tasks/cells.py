"""Values of the tables of Arrow, in the form that rows of JSON have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cnext.errors import parse_json
from cnext.tasks.kept_images import ImageBytes

if TYPE_CHECKING:
    import pyarrow


def features_of(schema: pyarrow.Schema) -> dict[str, Any]:
    """The features of columns as ``datasets.Features.to_dict`` gives them, which datasets writes into the schema."""
    try:
        return dict(parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


class Columns(NamedTuple):
    """How the rows of a table become rows of JSON.

    kinds: of every column.  features: as `features_of`.  gaps: columns of whole numbers that are floats, as pandas has
    them where some are absent.
    """

    kinds: Mapping[str, pyarrow.DataType]
    features: Mapping[str, Any]
    gaps: Collection[str]

    @classmethod
    def of(
        cls, schema: pyarrow.Schema, features: Mapping[str, Any], column: Callable[[str], pyarrow.ChunkedArray]
    ) -> Columns:
        """Those of a table, of which ``column`` gives the values."""
        kinds = {field.name: field.type for field in schema}
        gaps = {name for name, kind in kinds.items() if str(kind) in ("float", "double") and _whole(column(name))}
        return cls(kinds, features, gaps)

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A row as JSON has it, of one of ``pyarrow.Table.to_pylist``."""
        known = {
            name: _shortest(_named(value, self.features.get(name)), self.kinds[name]) for name, value in values.items()
        }
        return {name: int(value) if name in self.gaps else value for name, value in _present(known).items()}


def _present(value: Any) -> Any:
    """A value of a table as JSON has it: null and NaN are None, and absent in an object; bytes are `ImageBytes`."""
    if isinstance(value, bytes):
        return ImageBytes(value)
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and isinstance(value["bytes"], bytes | None):
        content, path = value["bytes"], value["path"] or ""
        return ImageBytes(content, path) if content or (content is not None and not path) else value["path"]
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _present(item)) is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _named(value: Any, feature: Any) -> Any:
    """A value with the names of its classes in place of their numbers; -1, which is no class, is None.

    feature: as JSON, such as {"_type": "ClassLabel", "names": ["cat", "dog"]} or {"_type": "List", "feature": {...}}.
    """
    if isinstance(value, list):
        return [_named(item, feature) for item in value]
    if isinstance(feature, list):
        return _named(value, feature[0])
    if not isinstance(feature, Mapping):
        return value
    if isinstance(feature.get("_type"), str) and "feature" in feature:
        return _named(value, feature["feature"])
    if feature.get("_type") == "ClassLabel" and type(value) is int:
        names = feature.get("names")
        return (names[value] if 0 <= value < len(names) else None) if names else value
    if feature.get("_type") == "Json" and isinstance(value, str):
        return parse_json(value)
    if isinstance(value, dict):
        return {key: _named(item, feature.get(key)) for key, item in value.items()}
    return value


def _shortest(value: Any, kind: pyarrow.DataType) -> Any:
    """A value whose floats of 16 or 32 bits have the fewest digits that fit: 0.1, not 0.10000000149011612."""
    import pyarrow

    if isinstance(value, list):
        inner = getattr(kind, "value_type", None)
        return value if inner is None else [_shortest(item, inner) for item in value]
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {key: _shortest(item, kind.field(key).type) for key, item in value.items()}
    if value is not None and (pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind)):
        return float(str(kind.to_pandas_dtype()(value)))
    return value


def _whole(column: pyarrow.ChunkedArray) -> bool:
    """Whether a column of floats has gaps and else whole numbers alone, as pandas stores integers with gaps."""
    import numpy

    values = column.to_numpy()  # of null, NaN
    numbers = values[~numpy.isnan(values)]
    return len(numbers) < len(values) and bool(numpy.all(numpy.isfinite(numbers) & (numpy.floor(numbers) == numbers)))
