"""The authors' released files: both spellings, three kinds, what is beside the branches, and what can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.released import LLM, released
from adapters.test_attach_mage import logits, model
from torch import Tensor, nn

import cnext
from cnext import adapters
from cnext.adapters.exchange import put_branches
from cnext.adapters.exchange_authors import (
    from_released,
    put_extras,
    put_routers,
    to_released,
)
from cnext.errors import UserError
from cnext.methods.moelora import Router
from cnext.tensor_files import read_tensors

FIRST = f"{LLM}model.layers.0.self_attn.q_proj"


def adapted(kind: str) -> nn.Module:
    plain = model("llama").eval()
    if kind == "mage":
        return cnext.attach_mage(plain, rank=2).model
    ranks = {"lora": 2} if kind == "lora" else {f"expert-{number}": 2 for number in range(4)}
    adapters.attach(plain.model, adapters.mage.TARGETS, ranks)
    for layer in adapters.layers(plain).values() if kind == "moelora" else ():
        layer.router = Router(4, layer, torch.Generator().manual_seed(0))
    return plain


def kept(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What a round trip must give back: no second spelling, nothing that is ignored."""
    ignored = ["original_module", "inv_freq", ".mlp.weight", *(["lora_router"] if kind != "moelora" else [])]
    return {name: tensor for name, tensor in state.items() if not any(part in name for part in ignored)}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mage", "moelora", "lora"])
def test_round_trip_is_exact(kind: str) -> None:
    state, plain = released(kind, "both"), adapted(kind)
    found = from_released(state, kind)
    put_branches(plain, found.branches)
    put_routers(plain, found.routers)
    again = to_released(plain, found.extras)
    expected = kept(state, kind)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mage", "moelora", "lora"])
def test_the_layer_computes_what_the_released_code_computes(kind: str) -> None:
    state, plain, x = released(kind), adapted(kind), torch.randn(3, 32)
    found = from_released(state, kind)
    put_branches(plain, found.branches)
    put_routers(plain, found.routers)
    layer = plain.model.layers[0].self_attn.q_proj
    expected = x @ layer.base.weight.T
    weights = torch.ones(3, 4)
    if kind == "moelora":
        weights = (x @ state[f"{FIRST}.lora_router.default.weight"].T).softmax(-1)
    for number in range(1 if kind == "lora" else 4):
        place = "" if kind == "lora" else f"lora{{0}}.{number}."
        a, b = (state[f"{FIRST}.lora_{half}.default.{place.format(half)}weight"] for half in "AB")
        expected = expected + weights[:, number, None] * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "module."])
@pytest.mark.parametrize("spelling", ["weight", "mlp", "both"])
def test_both_spellings_are_the_same_adapter(spelling: str, prefix: str) -> None:
    found, expected = from_released(released("mage", spelling, prefix), "mage"), from_released(released("mage"), "mage")
    for layer, pairs in expected.branches.pairs.items():
        for branch, pair in pairs.items():
            assert all(torch.equal(*two) for two in zip(found.branches.pairs[layer][branch], pair, strict=True))
    assert {kind: list(part) for kind, part in found.extras.items()} == {
        kind: list(part) for kind, part in expected.extras.items()
    }


def test_other_tensors_are_sorted_and_counted() -> None:
    found = from_released(released("mage"), "mage")
    assert {kind: len(part) for kind, part in found.extras.items()} == {
        "embeddings": 1, "norms": 5, "head": 1, "input_resampler": 2, "output_resampler": 2, "patch_pos_embed": 1,
    }  # fmt: skip
    assert found.ignored == {"original_module": 5, "inv_freq": 2, "lora_router": 14}
    assert not found.routers
    assert list(found.branches.ranks) == ["text-general", "image-general", "text-expert", "image-expert"]
    assert len(from_released(released("moelora"), "moelora").routers) == 14


@torch.no_grad()
def test_extras_are_copied_into_parameters_of_their_names() -> None:
    plain, found = adapted("mage"), from_released(released("mage"), "mage")
    put_extras(plain, found.extras)
    assert torch.equal(plain.lm_head.weight, found.extras["head"]["lm_head.weight"])
    assert torch.equal(plain.model.norm.weight, found.extras["norms"]["model.norm.weight"])
    before = logits(plain)
    with pytest.raises(UserError, match=r"lm_head.weight \(3, 3\), expected \(64, 32\), x.norm"):
        put_extras(plain, {"head": {"lm_head.weight": torch.ones(3, 3)}, "norms": {"x.norm.weight": torch.ones(3)}})
    assert torch.equal(logits(plain), before)


def changed(change: str) -> dict[str, Tensor]:
    state = released("moelora", "both")
    a = f"{FIRST}.lora_A.default.loraA"
    if change == "unknown":
        state |= {f"{FIRST}.lora_C.weight": torch.ones(1), "x": torch.ones(1)}
    elif change == "half":
        del state[f"{a}.2.weight"], state[f"{a}.2.mlp.weight"]
    elif change == "shape":
        state |= dict.fromkeys((f"{a}.0.weight", f"{a}.0.mlp.weight"), torch.ones(3, 32))
    elif change == "spellings":
        state[f"{a}.1.mlp.weight"] = torch.ones(2, 32)
    elif change == "router":
        del state[f"{FIRST}.lora_router.default.weight"]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", r"unknown keys: .*lora_C.weight, x$"),
        ("half", r"branches missing: model.layers.0.self_attn.q_proj.2 \(A\)$"),
        ("shape", r"wrong shapes: model.layers.0.self_attn.q_proj.0: A \(3, 32\), B \(32, 2\), expected"),
        ("spellings", r"two spellings of a tensor that differ: .*loraA.1.mlp.weight$"),
        ("router", r"routers missing: model.layers.0.self_attn.q_proj$"),
    ],
)
def test_errors_name_what_is_wrong_with_a_file(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_released(changed(change), "moelora")


def test_a_missing_layer_is_named() -> None:
    state = {name: tensor for name, tensor in released("mage").items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(UserError, match=r"layers missing: model.layers.1.mlp.up_proj$"):
        put_branches(adapted("mage"), from_released(state, "mage").branches)


def test_another_kind_is_named() -> None:
    with pytest.raises(UserError, match="adapter of kind mage, the file has one plain branch: kind lora"):
        from_released(released("lora"), "mage")
    with pytest.raises(UserError, match="numbered branches: kind mage or moelora"):
        from_released(released("mage"), "lora")
    with pytest.raises(UserError, match="found none"):
        from_released({}, "lora")


@torch.no_grad()
def test_another_scale_is_multiplied_into_b() -> None:
    plain = adapted("lora")
    put_branches(plain, from_released(released("lora"), "lora", scale=2.0).branches)
    b = f"{FIRST}.lora_B.default.weight"
    assert torch.equal(to_released(plain)[b], 2 * released("lora")[b])


def test_other_branches_cannot_be_exported() -> None:
    plain = model("llama")
    adapters.attach(plain.model, adapters.mage.TARGETS, {"task-1": 2, "task-2": 2})
    with pytest.raises(UserError, match="found task-1, task-2; --format peft and"):
        to_released(plain)


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    torch.save({"x": Path("/")}, tmp_path / "object.bin")
    torch.save({"x": 3}, tmp_path / "number.bin")
    (tmp_path / "text.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "text.safetensors").write_text("nothing")
    for name in ("object.bin", "text.bin", "text.safetensors", "missing.bin"):
        with pytest.raises(UserError, match="cannot read it"):
            read_tensors(tmp_path / name)
    torch.save({1: torch.ones(1)}, tmp_path / "names.bin")
    for name in ("number.bin", "names.bin"):
        with pytest.raises(UserError, match="expected a flat table of tensors"):
            read_tensors(tmp_path / name)
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(UserError, match="it ends too early"):
        read_tensors(tmp_path / "empty.bin")
    for name in ("folder.bin", "folder.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="it is a folder"):
            read_tensors(tmp_path / name)
