"""Rows of Parquet and CSV files, and of datasets of the library ``datasets``, saved or in memory.

What is absent in a table is absent in the row: null, NaN, and an empty cell of CSV. Cells of CSV are text: "01" and
"NA" stay what they are. Bytes, and objects with "bytes" and "path", become `ImageBytes` or the path. The numbers of
classes, which datasets writes with their names, become the names, and floats of 32 bits the shortest ones.
"""

from __future__ import annotations

import csv
import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cnext.errors import UserError, listed, unknown
from cnext.tasks import cached_folders
from cnext.tasks.base import DataError, Suite
from cnext.tasks.cells import Columns, features_of
from cnext.tasks.kept_images import cache

SEPARATORS = {".csv": ",", ".tsv": "\t"}
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""The files that ``save_to_disk`` writes into the folder of a dataset, and of a dictionary of them."""
BATCH = 64
"""Rows that are in memory at a time, with their images."""
Lines = Generator[tuple[str, Any], None, None]
Advance = Callable[[int], None]


def is_saved(path: Path) -> bool:
    """Whether a path is a folder that ``Dataset.save_to_disk`` wrote."""
    return (path / SAVED).is_file()


def files(path: Path) -> list[Path]:
    """A file, or the files in a folder of a saved dataset."""
    return [each for each in path.iterdir() if not each.is_dir()] if path.is_dir() else [path]


def size(path: Path) -> int:
    """Bytes of `files`."""
    return sum(each.stat().st_size for each in files(path))


def lines(path: Path, advance: Advance) -> Lines | None:
    """(origin, row or ValueError) of a table, "file:line" or "file#index"; None for a file that is no table."""
    if is_saved(path):
        return _saved(path, advance)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, advance)
    return _csv(path, advance, SEPARATORS[suffix]) if suffix in SEPARATORS else None


def _csv(path: Path, advance: Advance, separator: str) -> Lines:
    with path.open("rb") as file:
        yield from _cells(path, file, advance, separator)


def _cells(path: Path, file: BinaryIO, advance: Advance, separator: str) -> Lines:
    def decoded() -> Iterator[str]:
        for number, line in enumerate(file):
            advance(len(line))
            yield line.decode("utf-8" if number else "utf-8-sig")

    reader = csv.reader(decoded(), delimiter=separator, strict=True)
    line = 1
    try:
        names = [name.strip() for name in next(reader, [])]
        if other := next((mark for mark in ",;\t|" if len(names) == 1 and mark in names[0]), ""):
            raise ValueError(
                f"has columns separated by {other!r}, expected {separator!r}; write it with sep={separator!r}"
            )
        if not all(names) or len(set(names)) < len(names):
            advice = "" if all(names) else "; write a DataFrame with index=False"
            raise ValueError(f"must begin with a line of distinct names of columns, got {names}{advice}")
        line = reader.line_num + 1
        for cells in reader:
            found: Any = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
            if cells and len(cells) != len(names):
                found = ValueError(f"has {len(cells)} cells for {len(names)} columns: {', '.join(names)}")
            if cells:
                yield f"{path}:{line}", found
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield f"{path}:{line}", ValueError(f"is not UTF-8 text ({error.reason}); save the file as UTF-8")
    except csv.Error as error:
        advice = "; write it as Parquet" if "limit" in str(error) else ""
        yield f"{path}:{line}", ValueError(f"is not CSV: {error}{advice}")
    except ValueError as error:
        yield f"{path}:{line}", error


def _parquet(path: Path, advance: Advance) -> Lines:
    arrow, parquet = _imported("pyarrow", path), _imported("pyarrow.parquet", path)
    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"it has several columns of one name: {listed(twice)}; rename or remove them")
            total, schema = max(file.metadata.num_rows, 1), file.schema_arrow
            columns = Columns.of(schema, features_of(schema), lambda name: file.read([name]).column(name))
            for batch in file.iter_batches(BATCH):
                yield from _rows(batch, columns, path, index)
                index += batch.num_rows
                advance(size(path) * batch.num_rows // total)
    except (arrow.ArrowException, OSError, ValueError) as error:
        yield f"{path}#{index}", ValueError(f"cannot be read as Parquet: {error}")


def _saved(path: Path, advance: Advance) -> Lines:
    datasets = _imported("datasets", path)
    arrow = _imported("pyarrow", path)
    index = 0
    try:
        dataset = datasets.load_from_disk(str(path))
        columns = Columns.of(dataset.features.arrow_schema, dataset.features.to_dict(), dataset.data.column)
        for table in dataset.with_format("arrow").iter(BATCH):
            yield from _rows(table, columns, path, index)
            index += table.num_rows
            advance(size(path) * table.num_rows // max(len(dataset), 1))
    except IndexError:  # of datasets, where no file was saved
        yield f"{path}#{index}", ValueError("cannot be read as a saved dataset: it has no rows")
    except (arrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        yield f"{path}#{index}", ValueError(f"cannot be read as a saved dataset: {error}")


def _rows(batch: Any, columns: Columns, path: Path, first: int) -> Lines:
    for number, row in enumerate(batch.to_pylist(), first):
        yield f"{path}#{number}", columns.row(row)


def _imported(module: str, path: Path | str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{path} needs the package {package} ({error}); pip install 'cnext[data]'") from error


def save_datasets(suite: Suite, given: Mapping[str, Mapping[str, Any]], tasks: Sequence[str] = ()) -> Path:
    """Writes datasets in memory where the manifests of a suite expect their files, in a data folder in the cache.

    The folder is named by a hash of the rows and their paths, so that a run with other rows is another run.

    Args:
        given: of every task, by its name, a ``datasets.Dataset`` for every split, as a ``datasets.DatasetDict`` is.
        tasks: those whose training and test split must be given.

    Raises:
        UserError: a task or split that the suite lacks or that is not given, something else than a Dataset with rows,
            a manifest with a pattern, or one path for two splits.

    Example:
        >>> save_datasets(suites.load("./birds"), {"Photos": load_from_disk("photos")})
        PosixPath('/home/me/.cache/cnext/datasets/0b7c...')
    """
    places = _places(suite, given, tasks)
    cache().mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".datasets-", dir=cache()))
    digest = hashlib.sha256()
    try:
        for place, (name, split) in places.items():
            given[name][split].with_format(None).save_to_disk(str(unfinished / place))
            digest.update(f"{name}/{split}\n{place}\n".encode())
            for file in sorted((unfinished / place).glob("*.arrow")):
                digest.update(file.read_bytes())
        folder = cache() / "datasets" / digest.hexdigest()[:32]
        folder.parent.mkdir(exist_ok=True)
        unfinished.chmod(0o755)
        if not _same_tables(unfinished, folder):  # as another process, or an earlier run, has written them
            cached_folders.place(unfinished, folder)
        return folder
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _same_tables(one: Path, other: Path) -> bool:
    """Whether two folders have tables of the same names and bytes; what is beside these differs each time."""
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.arrow")) for folder in (one, other)]
    return names[0] == names[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


def _places(suite: Suite, given: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(task, split) of the path of every Dataset that is given; raises UserError as `save_datasets`."""
    places: dict[str, tuple[str, str]] = {}
    for name, splits in given.items():
        task = suite.task(name)
        if not isinstance(splits, Mapping):
            got = type(splits).__name__
            raise UserError(f"expected the splits of task {name}, as {{'train': ..., 'test': ...}}, got {got}")
        for split, dataset in splits.items():
            if split not in task.splits:
                raise unknown(f"split of task {name}", str(split), task.splits)
            _check_dataset(dataset, f"split {split} of task {name}")
            place = os.path.normpath(getattr(task, split))
            if set("*?[") & set(place):
                raise UserError(
                    f"split {split} of task {name} is the pattern {place!r}; to give it a Dataset, its manifest "
                    f"must name one path, such as {name}/{split}"
                )
            if place in places:
                other, earlier = places[place]
                raise UserError(
                    f"split {split} of task {name} and split {earlier} of task {other} are both {place!r} in their "
                    f"manifests; to give them Datasets, name another path in one, such as {name}/{split}"
                )
            places[place] = (name, split)
    for name in tasks:
        for split in ("train", "test"):
            if split not in given.get(name, {}):
                raise UserError(f"no Dataset for split {split} of task {name}; give one for each of its splits")
    return places


def _check_dataset(dataset: Any, what: str) -> None:
    datasets = _imported("datasets", f"{what}, given as a Dataset,")
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(f"expected a datasets.Dataset as {what}, got {type(dataset).__name__}")
    if not len(dataset):
        raise UserError(f"expected a Dataset with rows as {what}, got one without")
    if dataset.format["type"] == "custom":
        raise UserError(f"the Dataset for {what} has a transform, which cannot be saved; use map in place of it")


def refuse_splits(path: Path) -> None:
    """Raises DataError for the folder of a saved DatasetDict, which has a folder for each split."""
    if (path / SAVED_SPLITS).is_file():
        splits = sorted(each.name for each in path.iterdir() if is_saved(each))
        raise DataError(f"{path} holds several splits; name one of them in the manifest: {', '.join(splits)}")
