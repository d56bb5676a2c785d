"""Croissant metadata of a generated suite: what is in its folder, for tools that read https://mlcommons.org/croissant.

One record set for each task and split, whose fields are the keys of its rows; images are named by path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnext.errors import parse_json
from cnext.tasks.base import Suite, Task

FILE = "croissant.json"
PAPER = "https://arxiv.org/abs/2602.18055"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
DESCRIPTIONS = {
    "question_id": "name of the item",
    "image": "path of the image that is read, or drawn, relative to the task's folder images",
    "source_image": "path of the image to edit",
    "target_image": "path of the edited image",
    "instruction": "what to change",
    "text": "question, or caption",
    "answer": "reference answer",
    "data": "instruction and answer",
    "size": "width and height of the image in pixels",
    "origin_answer_bbox": "box in pixels: x, y, width, height",
    "answer_bbox": "box relative to the image: x1, y1, x2, y2",
}


def metadata(suite: Suite, folder: Path, version: str) -> dict[str, Any]:
    """The metadata of a folder with a suite's files, as a JSON-LD object of Croissant 1.0."""
    files, records = [], []
    for task in suite.sets:
        for split in task.splits:
            place = getattr(task, split)
            for file in sorted(folder.glob(place)):
                files.append(_file(folder, file))
                records.append(_records(folder, file, task, split))
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": suite.name,
        "description": suite.description,
        "version": version if version.count(".") == 2 else f"{version}.0.0",
        "license": suite.license,
        "url": PAPER,
        "citeAs": f"Continual-NExT: A Unified Comprehension And Generation Continual Learning Framework, {PAPER}",
        "distribution": files,
        "recordSet": records,
    }


def _file(folder: Path, file: Path) -> dict[str, Any]:
    name = file.relative_to(folder).as_posix()
    lines = file.suffix == ".jsonl"
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "encodingFormat": "application/jsonlines" if lines else "application/json",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def _rows(file: Path) -> list[Mapping[str, Any]]:
    text = file.read_text(encoding="utf-8")
    return [parse_json(line) for line in text.splitlines()] if file.suffix == ".jsonl" else parse_json(text)


def _records(folder: Path, file: Path, task: Task, split: str) -> dict[str, Any]:
    name, rows = file.relative_to(folder).as_posix(), _rows(file)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    record = f"{task.name}/{split}"
    return {
        "@type": "cr:RecordSet",
        "@id": record,
        "name": record,
        "description": f"{task.description}; {len(rows)} items to {'train on' if split == 'train' else 'evaluate'}",
        "field": [_field(record, name, key, rows) for key in keys],
    }


def _field(record: str, file: str, key: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    values = [row[key] for row in rows if row.get(key) is not None]
    several = any(isinstance(value, list) for value in values)
    whole, lines = key == "size", file.endswith(".jsonl")
    found: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"{record}/{key}",
        "name": key,
        "description": DESCRIPTIONS.get(key, key),
        "dataType": "sc:Integer" if whole else "sc:Text",
        "source": {"fileObject": {"@id": file}, "extract": {"column": key} if lines else {"jsonPath": f"$[*].{key}"}},
    }
    return found | ({"repeated": True} if several else {})
