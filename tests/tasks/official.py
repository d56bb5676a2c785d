"""Writes small files in the layout of the six tasks and of suites in other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes:"


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(numpy.random.default_rng(seed).integers(0, 255, (6, 8, 3), numpy.uint8))
    image.resize(size, Image.Resampling.NEAREST).save(path)


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def listing(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def write_continual_next(data: Path, train: int = 6, tests: int = 3) -> Path:
    """Training rows in two files and test rows of every task, six and three by default."""
    vqa, imagenet, flickr, ocr, boxes, edit = (
        data / f"SEED-Data-{name}" for name in ("VQAv2", "ImageNet", "Flickr30k", "OCRVQA", "Grounding", "HQEdit")
    )
    rows: dict[Path, tuple[list[Any], list[Any]]] = {
        task: ([], []) for task in (vqa, imagenet, flickr, ocr, boxes, edit)
    }
    for index in range(train + tests):
        test = index >= train
        jpg = f"{index:012d}.jpg"
        coco = f"{'val' if test else 'train'}2014/{jpg}"
        picture(vqa / "COCO2014" / coco, index)
        picture(imagenet / "imagenet" / ("val" if test else "train") / f"n{index}/{index}.JPEG", index)
        picture(flickr / "images" / jpg, index)
        picture(ocr / "OCR-VQA/images" / jpg, index)
        picture(boxes / "COCO2014/train2014" / jpg, index)
        for side in ("source", "target"):
            picture(edit / f"images/{side}_images" / jpg, index, (480, 400))
        if test:
            rows[vqa][1].append({"question id": index, "image": coco, "text": f"What? {SHORT}", "answer": "net"})
            name = f"val/n{index}/{index}.JPEG"
            asked = f"What is the object in the image? {SHORT}"
            rows[imagenet][1].append({"question_id": name, "image": name, "text": asked, "answer": "Cock"})
            rows[flickr][1].append({"question_id": str(index), "text": f"Please generate the image: A dog {index}."})
            asked = "Who wrote this book? When the provided information is insufficient, respond with 'Unanswerable'."
            rows[ocr][1].append({"question_id": f"{index} 0", "image": jpg, "text": asked, "answer": "Amy Knapp"})
            rows[boxes][1].append(
                {
                    "question id": str(index),
                    "size": [8, 6],
                    "image": f"train2014/{jpg}",
                    "text": f"{LOCATE} tennis player.",
                    "origin answer bbox": "[1.00,1.00,3.00,3.00]",
                    "answer bbox": "[0.12,0.25,0.50,0.62]",
                }
            )
        else:
            rows[vqa][0].append({"image": jpg, "data": [f"Where is {index}? {SHORT}", "net", "Color?", "orange"]})
            asked = f"What is the object in the image? {SHORT}"
            rows[imagenet][0].append({"image": f"n{index}/{index}.JPEG", "data": [asked, "Cock."]})
            rows[flickr][0].append({"image": jpg, "data": ["Please generate the image.", f"Two cats {index}."]})
            rows[ocr][0].append({"image": jpg, "data": [f"Who wrote this book? {SHORT}", "A", "What title? ", "B"]})
            rows[boxes][0].append({"image": jpg, "data": [f"{LOCATE} hot dog {index}.", "[0.27,0.42,0.83,0.73]"]})
        instruction = f"{'Please generate the image: ' if test else ''}Add a hat {index}."
        sides = {f"{side}{' ' if index % 2 else '_'}image": f"{side}_images/{jpg}" for side in ("source", "target")}
        rows[edit][test].append({**sides, "instruction": instruction})
    for task, (trained, tested) in rows.items():
        lines(task / "annotations/output_001.jsonl", trained[: 2 * train // 3])
        lines(task / "annotations/output_002.jsonl", trained[2 * train // 3 :])
        listing(task / "questions/test.json", tested)
    return data
