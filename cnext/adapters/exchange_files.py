"""Finds and reads adapters from elsewhere: folders of PEFT adapters, and the authors' released files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from cnext.adapters import exchange_authors, exchange_peft, export_sums
from cnext.adapters.exchange_authors import Released
from cnext.adapters.roles import modalities_of
from cnext.errors import UserError
from cnext.tensor_files import read_tensors

FILES = ("pytorch_model.bin", "pytorch_model.bin/pytorch_model.bin", "model.safetensors")


def is_peft(path: Path) -> bool:
    """Whether it is a folder of one or several PEFT adapters."""
    return path.is_dir() and exchange_peft.is_peft(path)


def released_file(path: Path) -> Path:
    """A released file: itself, or in a folder. Raises UserError where there is none, and no PEFT adapter either."""
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        looked = f"{exchange_peft.CONFIG}, */{exchange_peft.CONFIG}, {', '.join(FILES)}"
        raise UserError(f"expected a file, or a folder with one of {looked}, at {path}; found none")
    return file


def read(path: Path, kind: str | None = None, beside: Collection[str] | None = None) -> tuple[Released, str]:
    """The branches, and what else is in the file, of an adapter.

    Args:
        path: a file or folder.
        kind: "mage", "moelora" or "lora". None: mage where PEFT adapters have its branches' names, else lora; required
            for a released file of several branches.
        beside: see `exchange_authors.from_released`.

    Returns:
        The content, and the kind.

    Raises:
        UserError: there is no adapter, it cannot be read, it is of another kind, or it is not as it was exported.
    """
    export_sums.check(path if path.is_dir() else path.parent)
    if is_peft(path):
        if kind == "moelora":
            raise UserError("a PEFT adapter has no routers, which moelora needs; --method mage or lora")
        branches = exchange_peft.read_peft(path)
        return Released(branches), kind or ("mage" if modalities_of(branches.ranks) else "lora")
    file = released_file(path)
    state = read_tensors(file)
    if kind is None and any(".loraA." in name for name in state):
        raise UserError(f"{file} has several branches; give --method mage or --method moelora")
    try:
        return exchange_authors.from_released(state, kind or "lora", beside=beside), kind or "lora"
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
