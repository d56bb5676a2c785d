"""Bad adapters and checkpoints: PEFT folders, released files, safetensors headers, manifests are read or refused."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz.mutations import BYTES, VALUES, dumped, mutated_bytes, mutated_value
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from cnext.adapters import attach_mage, exchange_authors, load
from cnext.adapters.exchange_peft import read_peft
from cnext.errors import UserError
from cnext.runs import checkpoint
from cnext.tensor_files import read_tensors

Try = Callable[[Callable[[], object]], bool]
LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "bias": "none"}
CONFIG["target_modules"] = ["q_proj"]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 3), torch.ones(4, 2)


@pytest.fixture(scope="module")
def peft(place: Path) -> Path:
    """An adapter of two layers."""
    importlib.import_module("peft")  # some of the packages that it imports make folders, which is not to be seen later
    folder = place / "peft"
    folder.mkdir()
    tensors = {}
    for layer in LAYERS:
        for half, tensor in zip("AB", pair(), strict=True):
            tensors[f"base_model.model.{layer}.lora_{half}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes(dumped(CONFIG))
    return folder


@pytest.fixture(scope="module")
def released(place: Path) -> Path:
    """A released file of one plain branch, as torch writes it."""
    state = {}
    for layer in LAYERS:
        for half, tensor in zip("AB", pair(), strict=True):
            state[f"llm.base_model.model.{layer}.lora_{half}.default.weight"] = tensor
    torch.save(state, place / "pytorch_model.bin")
    return place / "pytorch_model.bin"


@pytest.fixture(scope="module")
def saved(place: Path) -> Path:
    """What save_pretrained writes, of a model of one layer."""
    handle = attach_mage(Model(), rank=2, targets=["q_proj"])
    with pytest.warns(UserWarning, match="no reference logits"):
        handle.save_pretrained(place / "saved", base_model="org/model")
    return place / "saved"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(3, 4)


def load_saved(folder: Path) -> None:
    """Loads, without reference logits, into a model that is as it was where that is refused."""
    model = Model()
    try:
        load(model, folder, check=False)
    except UserError:
        assert type(model.q_proj) is nn.Linear
        raise


def read_released(path: Path) -> exchange_authors.Released:
    return exchange_authors.from_released(read_tensors(path), "lora")


def header(content: bytes, mutations: list) -> bytes:
    """A safetensors file with a changed header of the right length."""
    (length,) = struct.unpack("<Q", content[:8])
    changed = dumped(mutated_value(json.loads(content[8 : 8 + length]), mutations))
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


@pytest.fixture(scope="module")
def fuzzed(fuzzed_and_restored: Callable) -> Callable[..., None]:
    """Runs the work on many mutated versions of a file, some of which must be refused, and restores it."""

    def on(path: Path, change: Callable, strategy: st.SearchStrategy, examples: int, work: Callable) -> None:
        change = functools.partial(change, path.read_bytes())
        assert False in fuzzed_and_restored(path, change, strategy, examples, work), "no mutation was refused"

    return on


def test_peft_config(peft: Path, fuzzed: Callable) -> None:
    change = lambda content, mutations: dumped(mutated_value(json.loads(content), mutations))  # noqa: E731
    fuzzed(peft / "adapter_config.json", change, VALUES, 500, lambda: read_peft(peft))


# A version that is newer, and missing reference logits, are told by warnings.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_config(saved: Path, fuzzed: Callable) -> None:
    change = lambda content, mutations: dumped(mutated_value(json.loads(content), mutations))  # noqa: E731
    fuzzed(saved / "cnext_config.json", change, VALUES, 300, lambda: load_saved(saved))


@pytest.mark.parametrize(("change", "strategy"), [(mutated_bytes, BYTES), (header, VALUES)], ids=["bytes", "header"])
def test_peft_weights(change: Callable, strategy: st.SearchStrategy, peft: Path, fuzzed: Callable) -> None:
    fuzzed(peft / "adapter_model.safetensors", change, strategy, 400, lambda: read_peft(peft))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_released(released: Path, fuzzed: Callable) -> None:
    fuzzed(released, mutated_bytes, BYTES, 500, lambda: read_released(released))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_released_of_an_older_torch(released: Path, place: Path, fuzzed: Callable) -> None:
    """A sequence of pickles instead of a zip file, where a flipped byte can have any effect."""
    path = place / "older" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save(torch.load(released, weights_only=True), path, _use_new_zipfile_serialization=False)
    fuzzed(path, mutated_bytes, BYTES, 600, lambda: read_released(path))


@pytest.mark.parametrize(("change", "strategy"), [(mutated_bytes, BYTES), (header, VALUES)], ids=["bytes", "header"])
def test_released_safetensors(
    change: Callable, strategy: st.SearchStrategy, released: Path, place: Path, fuzzed: Callable
) -> None:
    path = place / "model.safetensors"
    save_file(torch.load(released, weights_only=True), path)
    fuzzed(path, change, strategy, 300, lambda: read_released(path))


def test_a_pickle_that_runs_a_program_is_refused(place: Path, refused_or_taken: Try) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return os.system, ("touch " + str(place.parent / "other" / "ran"),)

    for name, content in (("a.bin", pickle.dumps(Bad(), 2)), ("b.bin", pickle.dumps({"x": Bad()}, 2))):
        (place / name).write_bytes(content)
        assert not refused_or_taken(lambda name=name: read_released(place / name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad: float, peft: Path, place: Path) -> None:
    folder = place / f"bad-{bad}"
    shutil.copytree(peft, folder)
    a, b = pair()
    a[0, 0] = bad
    names = [f"base_model.model.{LAYERS[0]}.lora_{half}.weight" for half in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        read_peft(folder)


STATE = {"adapters": {"a": torch.arange(6.0)}, "method": {"count": torch.tensor(3)}, "optimizer": {}}
VALUED = {"tasks_done": 1, "step": 2, "ledger": {"trained": {"a": {"steps": 3}}, "ratio": 0.1}}


@pytest.mark.parametrize(
    "name", ["manifest.json", "adapters.safetensors", "method.safetensors", "optimizer.safetensors"]
)
def test_a_changed_checkpoint_is_refused(name: str, place: Path, fuzzed: Callable) -> None:
    """Whatever byte changes: the file is refused, or its values are those that were written."""
    folder = place / "checkpoint"
    checkpoint.save(folder, STATE, VALUED)

    def read() -> None:
        tensors, values = checkpoint.load(folder)
        assert values == VALUED
        for kind, state in STATE.items():
            assert tensors[kind].keys() == state.keys()
            assert all(torch.equal(tensors[kind][key], tensor) for key, tensor in state.items())

    fuzzed(folder / name, mutated_bytes, BYTES, 250, read)


def test_a_manifest_from_elsewhere(place: Path, fuzzed: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest with a valid checksum and wrong content."""
    folder, dump = place / "elsewhere", json.dumps
    checkpoint.save(folder, STATE, VALUED)

    def change(content: bytes, mutations: list) -> bytes:
        whole = json.loads(content)
        del whole["sha256"]
        changed = mutated_value(whole, mutations)
        return dumped(checkpoint._sealed(changed) if isinstance(changed, dict) else changed)

    monkeypatch.setattr(checkpoint.json, "dumps", lambda value, **named: dump(value, **named | {"allow_nan": True}))
    fuzzed(folder / "manifest.json", change, VALUES, 500, lambda: checkpoint.load(folder))


@pytest.mark.parametrize("name", ["../../other/secret.txt", "/etc/passwd", "a/b.safetensors", ".."])
def test_a_manifest_that_names_files_elsewhere_is_refused(name: str, place: Path, refused_or_taken: Try) -> None:
    folder = place / "named"
    checkpoint.save(folder, STATE, VALUED)
    values = {"files": {name: "0"}, **VALUED}
    (folder / "manifest.json").write_bytes(dumped(checkpoint._sealed(values)))
    assert not refused_or_taken(lambda: checkpoint.load(folder))


def test_a_header_longer_than_the_file_is_refused(place: Path, refused_or_taken: Try) -> None:
    for length in (2**63, 2**40, 10):
        (place / "x.safetensors").write_bytes(struct.pack("<Q", length) + save({"a": torch.ones(1)})[8:])
        assert not refused_or_taken(lambda: read_released(place / "x.safetensors"))
