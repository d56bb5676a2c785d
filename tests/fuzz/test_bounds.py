"""Files of a few bytes that name, declare or repeat much: refused before memory is taken, each in one line."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.guard import bounded
from fuzz.test_adapters import CONFIG, LAYERS, Model, pair
from safetensors.torch import save_file
from torch import Tensor, nn

from cnext.adapters import attach, attach_mage, exchange, exchange_authors, layers, load
from cnext.adapters.exchange import Branches
from cnext.adapters.exchange_peft import read_peft
from cnext.errors import UserError
from cnext.tensor_files import read_tensors

LAYER = f"llm.base_model.model.{LAYERS[0]}"


class Call:
    """Unpickled by a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


def rewritten(path: Path, compression: int = zipfile.ZIP_STORED, **others: bytes) -> None:
    """A torch file with other parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, others.get(name.rpartition("/")[2].partition(".")[0], content))


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.qint8)


ONES = torch.ones(2, 3)
COMPLEX = torch.ones(2, 3, dtype=torch.complex64).conj()
MADE: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (ONES.to_sparse, "x is sparse_coo"),
    "csr": (ONES.to_sparse_csr, "x is sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "x is nested"),
    "meta": (lambda: torch.empty(10**6, 10**6, device="meta"), "x has no values"),
    "expanded": (lambda: torch.ones(1).expand(10**5, 10**5), r"x is \(100000, 100000\) and repeats 1 values"),
    "quantized": (quantized, "x is quantized"),
    "conjugated": (lambda: COMPLEX, "x is a negated or conjugated view"),
    "negated": (lambda: COMPLEX.imag, "x is a negated or conjugated view"),
    "bytearray": (lambda: Call(bytearray, 10**9), "it has a bytearray"),
    "uninitialized": (lambda: Call(torch.Tensor, 10**9), "expected tensors of about its .* they have 4,000,000,000"),
    "object": (lambda: {"y": 3}, "found dict with other things"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about sparse and quantized tensors
@pytest.mark.parametrize("kind", MADE)
def test_tensors_that_are_not_dense(kind: str, tmp_path: Path) -> None:
    (make, message), path = MADE[kind], tmp_path / "x.bin"
    made = {"x": make()}
    torch.save({} if isinstance(made["x"], Call) else made, path)
    if isinstance(made["x"], Call):
        rewritten(path, data=pickle.dumps(made, 2))
    with bounded(), pytest.raises(UserError, match=message):
        read_tensors(path)


def test_a_bytearray_in_a_file_of_an_older_torch(tmp_path: Path) -> None:
    torch.save({"x": ONES}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[: whole.rindex(b"\x80\x02")] + pickle.dumps(Call(bytearray, 10**9), 2))
    with bounded(), pytest.raises(UserError, match=r"it has a bytearray"):
        read_tensors(tmp_path / "x.bin")


def test_tensors_that_share_their_values(tmp_path: Path) -> None:
    """Two of one storage are tied; hundreds would be a file of many times its size."""
    shared = torch.ones(1000, 100)
    torch.save({"a": shared, "b": shared}, tmp_path / "x.bin")
    assert len(read_tensors(tmp_path / "x.bin")) == 2
    torch.save({str(number): shared for number in range(500)}, tmp_path / "x.bin")
    with bounded(), pytest.raises(UserError, match=r"expected tensors of about its .* bytes, they have 200,000,000"):
        read_tensors(tmp_path / "x.bin")


def test_a_torch_file_that_unpacks_to_more(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"x": torch.zeros(10**6)}, path)
    rewritten(path, zipfile.ZIP_DEFLATED)
    with bounded(), pytest.raises(UserError, match=r"it is compressed, which torch does not do"):
        read_tensors(path)
    torch.save({"x": torch.zeros(10**4)}, path)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    entry = content[at : content.index(b"PK\x01\x02", at + 4)]
    path.write_bytes(content[:at] + entry * 500 + content[at:])
    with bounded(), pytest.raises(UserError, match=r"cannot read it"):
        read_tensors(path)


def experts(number: str, rank: int = 2, width: int = 3, layer: str = LAYER) -> dict[str, Tensor]:
    return {
        f"{layer}.lora_A.default.loraA.{number}.weight": torch.ones(rank, width),
        f"{layer}.lora_B.default.loraB.{number}.weight": torch.ones(4, rank),
    }


EXPERTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "billionth": (experts("0") | experts("1000000000"), "unknown keys"),
    "last of many": (experts("99999"), "has 1 and none of the numbers 0$"),
    "of 5000 digits": (experts("0") | experts("9" * 5000), "unknown keys"),
    "in other digits": (experts("0") | experts("\u0663"), "unknown keys"),
    "with a zero before": (experts("0") | experts("01"), "unknown keys"),
    "gap": (experts("0") | experts("2"), "has 2 and none of the numbers 1$"),
    "empty": (experts("0", rank=0), "wrong shapes"),
    "wide and empty": (experts("0", width=0), "wrong shapes"),
    "of other ranks": (
        experts("0") | experts("0", 3, layer=f"llm.base_model.model.{LAYERS[1]}"),
        "other ranks: .*: 3, expected 2 as in the first layer",
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_numbers_of_experts(case: str) -> None:
    state, message = EXPERTS[case]
    with bounded(), pytest.raises(UserError, match=message):
        exchange_authors.from_released(state, "moelora")


STRANGE = (
    *(torch.complex64, torch.bool, torch.int64, torch.uint16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2),
)


def of_peft(folder: Path, a: Tensor, b: Tensor, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {
        f"base_model.model.{LAYERS[0]}.lora_{half}.weight": each for half, each in zip("AB", (a, b), strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | settings))
    return folder


@pytest.mark.parametrize("dtype", STRANGE)
def test_numbers_that_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    a, b = pair()
    strange = torch.ones(a.numel() * dtype.itemsize, dtype=torch.uint8).view(dtype).view(a.shape)
    state = {f"{LAYER}.lora_A.default.weight": strange, f"{LAYER}.lora_B.default.weight": b}
    with pytest.raises(UserError, match=r"not finite numbers: .*lora_A"):
        exchange_authors.from_released(state, "lora")
    with pytest.raises(UserError, match=r"integers or numbers of 8 bits|cannot read it"):
        read_peft(of_peft(tmp_path, strange, b))


def test_a_rank_without_values(tmp_path: Path) -> None:
    with bounded(), pytest.raises(UserError, match=r"not of rank r: .*q_proj.A"):
        read_peft(of_peft(tmp_path, torch.ones(10**9, 0), torch.ones(0, 10**9), r=10**9))


def test_a_rank_beside_layers_of_one_number(tmp_path: Path) -> None:
    """80 KB of values for layers of one input and output would be 3 GB in the model's."""
    wide = nn.ModuleDict({"q_proj": nn.Linear(40_000, 40_000, device="meta")})
    tall = Branches({"q_proj": {"lora": (torch.ones(10**4, 1), torch.ones(1, 10**4))}})
    message = r"another backbone\? inputs and outputs of q_proj \(1, 1\), expected \(40000, 40000\)"
    with bounded(), pytest.raises(UserError, match=message):
        exchange.require_sizes(wide, tall)


@pytest.mark.filterwarnings("ignore::UserWarning")  # no reference logits
@pytest.mark.parametrize("count", [3, 10**5])
def test_modalities_that_have_no_branches(count: int, tmp_path: Path) -> None:
    attach_mage(Model(), rank=2, targets=["q_proj"]).save_pretrained(tmp_path, base_model="org/model")
    config = json.loads((tmp_path / "cnext_config.json").read_text())
    config["attached"]["modalities"] = [f"m{number}" for number in range(count)]
    (tmp_path / "cnext_config.json").write_text(json.dumps(config))
    with bounded(), pytest.raises(UserError, match=f"two branches for each of {count} modalities, found 4"):
        load(Model(), tmp_path, check=False)


def test_values_beyond_the_models_dtype() -> None:
    model = attach(Model(), ("q_proj",), {"lora": 2})
    a, b = pair()
    with pytest.raises(UserError, match=r"q_proj.lora.B has values beyond those of torch.float32"):
        exchange.put_branches(model, Branches({"q_proj": {"lora": (a, b.double() * 1e300)}}))
    own = {"x": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(UserError, match=r"x has values beyond those of torch.float16"):
        exchange_authors.copy_named({"x": torch.full((2,), 1e5)}, own, "the file")
    assert not own["x"].any()


@torch.no_grad()
def test_values_beyond_what_an_export_can_hold() -> None:
    model = attach(Model().half(), ("q_proj",), {"lora": 2})
    for name, parameter in model.named_parameters():
        if name.endswith(("A", "B")):
            parameter.fill_(1e3)
    (layer,) = layers(model).values()
    before = layer.unmerged_weight.clone()
    message = r"the merged model would have values that are not finite, in q_proj"
    with pytest.raises(UserError, match=message), exchange.merged(model):
        raise AssertionError("merged")
    assert not layer.merged
    assert torch.equal(layer.unmerged_weight, before)
    layer.scale = 1e38
    with pytest.raises(UserError, match=r"the adapter would have values that are not finite, in .*lora_B"):
        exchange_authors.to_released(model)
