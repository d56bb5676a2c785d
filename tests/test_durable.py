"""Files and folders that are written whole, by several processes at once, and what dead ones leave behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from cnext import durable
from cnext.runs import checkpoint
from cnext.runs.run_folder import RunFolder

LEFT = ".file.0123abcd.unfinished"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_written_at_once_are_each_whole(tmp_path: Path) -> None:
    contents = [bytes([letter]) * 50_000 for letter in b"abcd"]

    def again(content: bytes) -> None:
        for _ in range(10):
            durable.write(tmp_path / "file", content)

    threads = [threading.Thread(target=again, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert names(tmp_path) == ["file"]


def left_by_a_process_that_dies(block: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    child = os.fork()
    if not child:
        with block(path):
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert [name for name in names(path.parent) if name.startswith(f".{path.name}.")], "it has left something"


def test_what_a_dead_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".mine.unfinished").touch()
    left_by_a_process_that_dies(durable.replaced, tmp_path / "file")
    left_by_a_process_that_dies(durable.new_folder, tmp_path / "folder")
    os.mkfifo(tmp_path / LEFT)  # not waited for
    with durable.replaced(tmp_path / "other") as living, durable.new_folder(tmp_path / "folder") as made:
        durable.write(tmp_path / "file", b"1")
        assert names(tmp_path) == sorted([".mine.unfinished", "file", living.name, made.name])
    assert names(tmp_path) == [".mine.unfinished", "file", "folder", "other"]


def test_a_file_that_was_moved_is_not_there_any_more(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        assert durable.still_there(tmp_path / "file", file.fileno())
        (tmp_path / "file").rename(tmp_path / "other")
        assert not durable.still_there(tmp_path / "file", file.fileno())
        (tmp_path / "file").touch()
        assert not durable.still_there(tmp_path / "file", file.fileno())


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    for block in (durable.replaced, durable.new_folder):
        with pytest.raises(KeyboardInterrupt), block(tmp_path / "made"):
            raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_new_folder_replaces_none_with_files(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    with pytest.raises(OSError, match="not empty"), durable.new_folder(tmp_path / "made"):
        pass
    assert names(tmp_path / "made") == ["file"]
    assert names(tmp_path) == ["made"]


def test_a_new_folder_that_cannot_be_synced_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the same command is refused, as the folder is there."""
    (tmp_path / "in").mkdir()
    real = durable.sync

    def fails(path: Path) -> None:
        real(path)
        if (tmp_path / "in" / "made").exists():
            raise OSError(errno.EIO, "no")

    monkeypatch.setattr(durable, "sync", fails)
    with pytest.raises(OSError, match="no"), durable.new_folder(tmp_path / "in" / "made"):
        pass
    assert names(tmp_path / "in") == []


@pytest.mark.parametrize("call", [1, 2])
def test_a_checkpoint_that_is_not_replaced_stays(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rename may fail, nor the process end between them."""
    rename, calls = os.rename, []

    def fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == call:
            raise OSError(errno.EIO, "no")
        rename(source, target)

    checkpoint.save(tmp_path / "1_A", {}, {"tasks_done": 1, "step": 0, "which": "old"})
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no"):
        checkpoint.save(tmp_path / "1_A", {}, {"tasks_done": 1, "step": 0, "which": "new"})
    assert checkpoint.load(tmp_path / "1_A")[1]["which"] == "old"
    assert names(tmp_path) == ["1_A"]


def test_a_run_finds_the_checkpoint_that_was_being_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with closing(RunFolder(run, {})) as folder:
        folder.save({}, {"tasks_done": 1, "step": 0}, "1_ImageNet.A")
    os.rename(run / "checkpoints" / "1_ImageNet.A", run / "checkpoints" / ".1_ImageNet.A.0123abcd.replaced")
    with closing(RunFolder(run, {})) as folder:
        found = folder.furthest(print)
    assert found
    assert found[0].name == "1_ImageNet.A"


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written to all the same; an error of a file is not passed over."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write(tmp_path / "file", b"1")
    assert (tmp_path / "file").read_bytes() == b"1"

    def fails(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Invalid"):
        durable.write(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"1"


def test_a_folder_that_may_not_be_read_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing into it needs no right to read it; a file that may not be read is an error."""
    durable.write(tmp_path / "file", b"1")

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "open", denied)
    durable.sync(tmp_path)
    with pytest.raises(PermissionError):
        durable.sync(tmp_path / "file")


def test_folders_and_what_is_in_them_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name before what it names may be lost with it; of a folder that another has made too, which may have died."""
    synced: list[str] = []
    monkeypatch.setattr(durable, "sync", lambda path: synced.append(str(path.relative_to(tmp_path))))
    durable.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == ["a/b", "a", "."]
    durable.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == ["a/b", "a", ".", "a/b"]
    synced.clear()
    (tmp_path / "a" / "b" / "c" / "file").touch()
    durable.sync_all(tmp_path / "a")
    assert synced == ["a/b/c/file", "a/b/c", "a/b", "a"]
    synced.clear()
    durable.append(tmp_path / "log", b"1")
    assert synced == ["."], "the folder has a new name"
    durable.append(tmp_path / "log", b"2")
    assert synced == ["."]
    assert (tmp_path / "log").read_bytes() == b"12"
