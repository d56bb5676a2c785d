"""Named pipes, sockets, devices, folders and links to nothing where a file is read: refused in one line, at once."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from cnext import cli, image_files, records
from cnext.adapters.exchange_peft import read_peft
from cnext.analysis import updates
from cnext.backbones import folders
from cnext.backbones.seed_x import tokenizer
from cnext.config import init_source, settings_file
from cnext.errors import UserError
from cnext.judging import requests
from cnext.regular_files import read_bytes
from cnext.runs import checkpoint, command_line, run_folder, schemas
from cnext.runs.schemas import StageScore
from cnext.scoring import archive
from cnext.tasks import formats, rows
from cnext.tensor_files import read_tensors


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A read that waits for the other end of a pipe fails the test."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("the file is waited for")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def make(kind: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(path.parent)  # a socket's path is short
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "symbolic links":
        path.symlink_to(path.name)
    return path


KINDS = ("a named pipe", "a socket", "a device", "directory", "symbolic links", "No such file")


@pytest.mark.parametrize("kind", KINDS)
def test_no_regular_file(kind: str, tmp_path: Path) -> None:
    path = make(kind, tmp_path / "x.json")
    with pytest.raises(OSError, match=kind) as error:
        read_bytes(path)
    assert error.value.filename == str(path) or kind == "No such file"
    with pytest.raises(UserError, match=rf"x.json: .*{kind}"):
        records.read(path, dict, "give another")


def read_checkpoint(path: Path) -> None:
    checkpoint.save(path.parent / "there", {"adapters": {}}, {"tasks_done": 1, "step": 0})
    (path.parent / "there" / "adapters.safetensors").unlink()
    path.rename(path.parent / "there" / "adapters.safetensors")
    checkpoint.load(path.parent / "there")


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "safetensors": ("x.safetensors", read_tensors),
    "torch": ("x.bin", read_tensors),
    "archive": ("x.pt", lambda path: archive.is_archive(path) or read_tensors(path)),
    "adapter_config.json": ("adapter_config.json", lambda path: read_peft(path.parent)),
    "config.json": ("config.json", folders.read_json),
    "index": ("model.safetensors.index.json", folders.shard_files),
    "init-from": ("config.json", lambda path: init_source.find(path.parent)),
    "manifest": ("manifest.json", lambda path: checkpoint.manifest(path.parent)),
    "checkpoint": ("x.safetensors", read_checkpoint),
    "settings": ("x.yaml", lambda path: settings_file.read(path, {})),
    "options": ("options.json", command_line.read),
    "image": ("x.png", image_files.open_image),
    "judged image": ("x.png", requests._bytes),
    "rows": ("x.jsonl", lambda path: list(rows.rows(path))),
    "csv": ("x.csv", lambda path: list(rows.rows(path))),
    "parquet": ("x.parquet", lambda path: list(rows.rows(path))),
    "pattern": ("x-1.jsonl", lambda path: rows.files(path.parent, "x-*.jsonl")),
    "captions": ("x.json", formats.read_captions),
    "results": ("results.json", lambda path: schemas.read(path, dict)),
    "rows of a run": ("scores.jsonl", lambda path: schemas.read_rows(path, StageScore)),
    "logs of a run": ("scores.jsonl", run_folder._content),
    "adapters of a run": ("adapters.safetensors", lambda path: updates._products([path])),
    "sentencepiece": ("tokenizer.model", lambda path: tokenizer.Tokenizer.from_folder(path.parent)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(reader: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    with pytest.raises((UserError, OSError)):
        read(make("a named pipe", tmp_path / "given" / name))


@pytest.mark.parametrize("kind", ["a named pipe", "symbolic links", "No such file"])
def test_a_shard_that_is_no_file_does_not_shorten_the_data(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x-1.jsonl").write_text("{}\n")
    (tmp_path / "x-2.jsonl").symlink_to("gone") if kind == "No such file" else make(kind, tmp_path / "x-2.jsonl")
    with pytest.raises(rows.DataError, match=f"x-2.jsonl: .*{kind}.*; put a file there"):
        rows.files(tmp_path, "x-*.jsonl")


def test_settings_are_read_from_a_pipe_that_a_shell_has_opened() -> None:
    """As of --config <(...); one with a name may have no writer, and is not waited for."""
    reading, writing = os.pipe()
    os.write(writing, b"batch_size: 8")
    os.close(writing)
    try:
        assert settings_file.read(f"/dev/fd/{reading}", {"batch_size": int}).values == {"batch_size": 8}
    finally:
        os.close(reading)


def test_the_command_line_tells_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("a named pipe", tmp_path / "x.yaml")
    assert cli.run_main(["--config", str(path), "--method", "lora"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_huge_file_of_settings_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"a": 1}))
    os.truncate(path, 2**34)
    with pytest.raises(UserError, match="expected at most 268,435,456 bytes, it has 17,179,869,184"):
        records.read(path, dict, "give another")
