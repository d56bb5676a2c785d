"""Branches to stock PEFT and back, and merged: the same logits each time, by PEFT's and transformers' own loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters.test_attach_mage import disturb, logits, model
from torch import nn

import cnext
from cnext import adapters
from cnext.adapters.exchange import branches_of, merged, put_branches
from cnext.adapters.exchange_peft import read_peft, save_peft
from cnext.errors import UserError

ROLES = [role.name for role in adapters.BRANCH_ROLES]
# By PEFT, of transformers' newer releases.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def with_branches(name: str = "llama", scale: float = 0.75) -> nn.Module:
    handle = cnext.attach_mage(model(name).eval(), rank=2, scale=scale, dropout=0.0)
    torch.manual_seed(1)
    disturb(handle)
    return handle.model


def by_peft(base: nn.Module, folder: Path, names: list[str]) -> nn.Module:
    from peft import PeftModel

    if not names:
        return PeftModel.from_pretrained(base, folder).eval()
    loaded = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(folder / name, adapter_name=name)
    loaded.base_model.set_adapter(names)
    return loaded.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "janus"])
@pytest.mark.parametrize("one", [False, True], ids=["four adapters", "one of their rank"])
def test_peft_gives_the_same_logits_and_reading_restores_them(name: str, one: bool, tmp_path: Path) -> None:
    ours = with_branches(name)
    expected = logits(ours)
    written = save_peft(ours, tmp_path, one)
    assert len(written) == (2 if one else 8)
    theirs = by_peft(model(name), tmp_path, [] if one else ROLES)
    assert not torch.allclose(logits(model(name).eval()), expected, atol=1e-3)
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=1e-6)

    again = cnext.attach_mage(model(name).eval(), rank=2).model
    put_branches(again, read_peft(tmp_path).regrouped(dict.fromkeys(ROLES, 2)))
    assert torch.equal(logits(again), expected)


def test_adapters_leave_the_vision_tower_alone(tmp_path: Path) -> None:
    save_peft(with_branches("janus"), tmp_path, one=True)
    loaded = by_peft(model("janus"), tmp_path, [])
    carriers = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert len(carriers) == 14
    assert all(".language_model." in name for name in carriers)


@torch.no_grad()
def test_only_active_branches_are_exported(tmp_path: Path) -> None:
    ours = with_branches()
    adapters.activate(ours, ROLES[1:3])
    save_peft(ours, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ROLES[1:3])
    torch.testing.assert_close(logits(by_peft(model("llama"), tmp_path, ROLES[1:3])), logits(ours), rtol=0, atol=1e-6)


@torch.no_grad()
def test_merged_is_a_plain_model_within_its_context(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = with_branches()
    expected = logits(ours)
    with merged(ours) as plain:
        plain.save_pretrained(tmp_path)
    assert torch.equal(logits(ours), expected)
    assert list(tmp_path.glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_routed_branches_and_no_branches_are_refused(tmp_path: Path) -> None:
    ours = with_branches()
    for layer in adapters.layers(ours).values():
        layer.router = lambda x: torch.ones(*x.shape[:-1], 4)
    with pytest.raises(UserError, match="these are routed by their input"):
        save_peft(ours, tmp_path)
    with pytest.raises(UserError, match="these are routed by their input"), merged(ours):
        pass
    with pytest.raises(UserError, match="found none that is active"):
        branches_of(model("llama"))


BAD = {
    "dora": ({"use_dora": True}, "expected a plain LoRA, the same in every layer, found use_dora True"),
    "bias": ({"bias": "all"}, "found bias 'all'"),
    "pattern": ({"rank_pattern": {"q_proj": 4}}, "found rank_pattern"),
    "pissa": ({"init_lora_weights": "pissa"}, "found init_lora_weights 'pissa'"),
    "rank": ({"r": 5}, r"not of rank r: .* and 20 more"),
    "kind": ({"peft_type": "IA3"}, "found peft_type 'IA3'"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_other_than_plain_lora_are_refused(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    save_peft(with_branches(), tmp_path, one=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path)


def test_rslora_is_scaled_as_peft_scales_it(tmp_path: Path) -> None:
    save_peft(with_branches(scale=1.0), tmp_path, one=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    assert read_peft(tmp_path).scale == 8 / 8**0.5


def test_an_adapter_of_another_model_changes_nothing(tmp_path: Path) -> None:
    save_peft(with_branches(), tmp_path, one=True)
    other = cnext.attach_mage(model("emu3").eval(), rank=2).model
    before = [p.clone() for p in adapters.branch_parameters(other).values()]
    with pytest.raises(UserError, match=r"another backbone\? layers missing: model.text_model.* and 6 more; layers"):
        put_branches(other, read_peft(tmp_path).regrouped(dict.fromkeys(ROLES, 2)))
    deeper = cnext.attach_mage(model("llama").eval(), rank=3).model
    with pytest.raises(UserError, match=r"q_proj.text-general.A is \(2, 32\), expected \(3, 32\)"):
        put_branches(deeper, read_peft(tmp_path).regrouped(dict.fromkeys(ROLES, 2)))
    with pytest.raises(UserError, match="total rank of 12, got 8"):
        read_peft(tmp_path).regrouped(dict.fromkeys(ROLES, 3))
    assert all(torch.equal(p, b) for p, b in zip(adapters.branch_parameters(other).values(), before, strict=True))
