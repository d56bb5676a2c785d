"""Bad data: rows of every format, files of rows, images, captions and manifests are read or refused by name."""

from __future__ import annotations

import functools
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from fuzz.mutations import BYTES, VALUES, dumped, mutated_bytes, mutated_value
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from cnext.config.plan import plan
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.image_files import inspect, open_image
from cnext.tasks import data_check, formats, suites
from cnext.tasks.base import Task
from cnext.tasks.readers import READERS

Try = Callable[[Callable[[], object]], bool]
PICTURE = "a/red.png"
ROWS = {
    "conversation": [
        {"question_id": 1, "image": PICTURE, "data": ["what?", "red", "where?", "here"]},
        {"question_id": "2", "image": None, "text": "what?", "answer": ["red", "scarlet"], "size": [4, 5]},
        {"image": PICTURE, "text": "where?", "answer_bbox": "[0.1,0.2,0.3,0.4]"},
    ],
    "generation": [
        {"question_id": 1, "image": PICTURE, "data": ["Please generate the image.", "a cat"]},
        {"question_id": 2, "text": "a dog", "image": "none"},
    ],
    "editing": [
        {"source_image": PICTURE, "target_image": PICTURE, "instruction": "paint it", "response": "done"},
        {"source_image": PICTURE, "target_image": PICTURE, "instruction": "a", "instruction new": "b"},
    ],
    "editing_as_released": [
        {"source_image": PICTURE, "target_image": PICTURE, "instruction": "paint it", "response": "done"},
        {"source_image": PICTURE, "target_image": PICTURE, "instruction new": "b", "response": ""},
    ],
    "llava": [
        {
            "id": "x", "image": PICTURE,
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
        },
        {"question_id": 3, "text": "what?", "answer": "red"},
    ],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "be kind"},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "a <image>"},
            ],
            "images": [PICTURE, PICTURE],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(place: Path) -> Iterator[Path]:
    """A data folder with one picture and the cache, and a link in it to a folder that is not given."""
    picture = place / "images" / PICTURE
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(picture)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CNEXT_CACHE", str(place / "cache"))
        yield place


def task(name: str, suffix: str = "jsonl", **changes: str) -> Task:
    made = Task("t", ("text",), ("text",), name, "short_answer", f"rows.{suffix}", f"rows.{suffix}", "images", "images")
    return replace(made, **changes)


@pytest.mark.parametrize("name", sorted(READERS))
def test_rows_of_every_format(name: str, data: Path, fuzzed: Callable) -> None:
    for split in ("train", "test"):
        work = lambda split=split: formats.read_samples(task(name), data, split)  # noqa: E731
        change = lambda drawn: dumped(mutated_value(*drawn)) + b"\n"  # noqa: E731
        fuzzed(data / "rows.jsonl", change, st.tuples(st.sampled_from(ROWS[name]), VALUES), 500, work)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_files_of_rows(suffix: str, data: Path, fuzzed: Callable) -> None:
    rows = ROWS["conversation"] * 2
    content = b"".join(dumped(row) + b"\n" for row in rows) if suffix == "jsonl" else dumped(rows)
    work = lambda: formats.read_samples(task("conversation", suffix), data, "train")  # noqa: E731
    fuzzed(data / f"rows.{suffix}", functools.partial(mutated_bytes, content), BYTES, 600, work)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(suffix: str, data: Path, fuzzed: Callable) -> None:
    """Files of several columns, with a picture as bytes where they may hold one."""
    shown = {"bytes": picture("PNG"), "path": PICTURE}
    listed = [{"id": i, "question": "what?", "answer": "red", "image": shown} for i in range(4)]
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(listed), data / "rows.parquet", compression="none")
    else:
        (data / "rows.csv").write_text('id,question,answer,image\n1,"what, or\nwhere?",red,a/red.png\n' * 2)
    content = (data / f"rows.{suffix}").read_bytes()
    work = lambda: formats.read_samples(task("conversation", suffix), data, "train")  # noqa: E731
    fuzzed(data / f"rows.{suffix}", functools.partial(mutated_bytes, content), BYTES, 300, work)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"[" + b"9" * 5000 + b"]"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_nesting_and_numbers_without_end(content: bytes, suffix: str, data: Path, refused_or_taken: Try) -> None:
    (data / f"rows.{suffix}").write_bytes(content + b"\n")
    assert not refused_or_taken(lambda: formats.read_samples(task("conversation", suffix), data, "train"))
    (data / "suite.json").write_bytes(content)
    assert not refused_or_taken(lambda: suites.load(str(data)))
    assert not refused_or_taken(lambda: formats.read_captions(data / "suite.json"))


CAPTIONS = {"annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]}


def test_captions(data: Path, fuzzed: Callable) -> None:
    path = data / "captions.json"
    change = lambda mutations: dumped(mutated_value(CAPTIONS, mutations))  # noqa: E731
    fuzzed(path, change, VALUES, 300, lambda: formats.read_captions(path))


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((9, 7)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("decode", [False, True], ids=["header", "pixels"])
def test_images(kind: str, decode: bool, data: Path, fuzzed: Callable) -> None:
    path = data / "mutated.png"
    fuzzed(path, functools.partial(mutated_bytes, picture(kind)), BYTES, 80, lambda: inspect(path, decode))


def test_other_kinds_of_files_are_no_images(data: Path) -> None:
    """A PostScript file under a picture's name would be given to a program to run."""
    (data / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert inspect(data / "x.png").fault.startswith("broken")


def test_decompression_bombs_are_refused(data: Path) -> None:
    """A few hundred bytes that say they are 40,000 pixels a side."""
    path = data / "bomb.png"
    size = struct.pack(">II", 40_000, 40_000) + bytes([8, 2, 0, 0, 0])
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(9))), (b"IEND", b""))
    body = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    for decode in (False, True):
        assert "decompression bomb" in inspect(path, decode).fault
    with pytest.raises(UserError, match=r"cannot be read: .*decompression bomb"):
        open_image(path)
    (data / "images" / "bomb.png").write_bytes(path.read_bytes())
    (data / "rows.jsonl").write_bytes(dumped({"image": "bomb.png", "text": "a", "answer": "b"}) + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: names an image that is broken .*decompression bomb"):
        formats.read_samples(task("conversation"), data, "train")


OUTSIDE = [
    "../other/secret.txt",
    "/etc/passwd",
    "a/../../other/secret.txt",
    "../given/images/a/red.png",
    "\\..\\x",
    "..",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_images_outside_are_refused_by_name(path: str, data: Path, refused_or_taken: Try) -> None:
    (data / "rows.jsonl").write_bytes(dumped({"image": path, "text": "a", "answer": "b"}) + b"\n")
    assert not refused_or_taken(lambda: formats.read_samples(task("conversation"), data, "train"))


SUITE = json.loads((suites.FOLDER / "next-tiny" / "suite.json").read_text())
TASK = json.loads((suites.FOLDER / "next-tiny" / "VQAv2.json").read_text())


@pytest.fixture(scope="module")
def suite(place: Path) -> Path:
    shutil.copytree(suites.FOLDER / "next-tiny", place / "suite")
    return place / "suite"


@pytest.mark.parametrize("pattern", ["../other/*", "/etc/*", "a/../../other/*", "**/**/**/x", "a**b", "\x00"])
@pytest.mark.parametrize("field", ["train", "test", "validation", "reworded", "references"])
def test_patterns_outside_are_refused(field: str, pattern: str, suite: Path, refused_or_taken: Try) -> None:
    (suite / "VQAv2.json").write_bytes(dumped(TASK | {field: pattern}))
    assert not refused_or_taken(lambda: suites.load(str(suite)))
    (suite / "VQAv2.json").write_bytes(dumped(TASK))
    assert refused_or_taken(lambda: suites.load(str(suite)))


@pytest.mark.parametrize(("file", "value"), [("suite.json", SUITE), ("VQAv2.json", TASK)], ids=["suite", "task"])
def test_manifests(file: str, value: dict, suite: Path, fuzzed_and_restored: Callable) -> None:
    """Loaded, ordered, described and planned for a run."""

    def use() -> None:
        loaded = suites.load(str(suite))
        suites.details(loaded)
        plan(RunConfig(suite=str(suite), data=suite.parent, device="cpu", order="reverse"))

    change = lambda mutations: dumped(mutated_value(value, mutations))  # noqa: E731
    fuzzed_and_restored(suite / file, change, VALUES, 500, use)


def test_task_manifests_with_data(data: Path, suite: Path, fuzzed: Callable) -> None:
    """What passes as a manifest is examined as `cnext data check` does."""
    (data / "rows.jsonl").write_bytes(dumped(ROWS["conversation"][0]) + b"\n")
    whole = TASK | {"train": "rows.jsonl", "test": "rows.jsonl", "train_images": "images", "test_images": "images"}
    (suite / "suite.json").write_bytes(dumped(SUITE | {"tasks": ["VQAv2"], "orders": {}}))

    class Silent:
        def begin(self, doing: str, total: int) -> None: ...

        def advance(self, count: int) -> None: ...

    change = lambda mutations: dumped(mutated_value(whole, mutations))  # noqa: E731
    work = lambda: data_check.check(suites.load(str(suite)), data, Silent())  # noqa: E731
    fuzzed(suite / "VQAv2.json", change, VALUES, 200, work)


@pytest.mark.parametrize("name", ["../../other/x", "/tmp/x", ".hidden", "a/b", "", "a\nb", "x" * 300, 5, None])
def test_names_that_are_paths_are_refused(name: object, suite: Path, refused_or_taken: Try) -> None:
    for changes in ({"tasks": [name]}, {"name": name}):
        (suite / "suite.json").write_bytes(dumped(SUITE | changes))
        assert not refused_or_taken(lambda: suites.load(str(suite)))


def test_a_reference_that_is_no_box_is_named(data: Path) -> None:
    from cnext.scoring import make_scorers

    (data / "rows.jsonl").write_bytes(dumped(ROWS["conversation"][0]) + b"\n")
    (sample,) = [line.sample for line in formats.scan(task("conversation", train="rows.jsonl"), data, "train")][:1]
    with pytest.raises(UserError, match="expected a reference box"):
        make_scorers()["box"](task("conversation"), [sample], [None])
