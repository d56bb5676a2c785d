"""``cnext import`` of adapters as PEFT and trainers write them: the logits are PEFT's, or the adapter is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cnext import adapters, backbones
from cnext.errors import UserError
from cnext.exchange.export import outer_model, restore
from cnext.exchange.importing import import_adapter

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(5, 37).view(2, 16)
# By PEFT, of transformers' newer releases.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@torch.no_grad()
def made(folder: Path, **settings: Any) -> Tensor:
    """Writes an adapter of the tiny backbone by PEFT. Returns the logits that PEFT computes with it."""
    from peft import LoraConfig, get_peft_model

    base = outer_model(backbones.load("tiny").load("cpu"))
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": EVERY, **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.05)
    model.save_pretrained(str(folder))
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def imported(folder: Path, to: Path) -> tuple[str, Tensor]:
    """What was told, and the logits of what was imported."""
    told = import_adapter(folder, to)
    restored = restore(to)
    with restored.method.for_eval():
        return told, restored.model.eval()(input_ids=IDS).logits


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({}, "28 layers, branches lora (rank 4)\nscale 2;"),
    "q and v": ({"target_modules": ["q_proj", "v_proj"]}, "zero branches in 20 layers that the adapter is not for"),
    "attention by a pattern": ({"target_modules": r".*self_attn\.[qk]_proj"}, "zero branches in 20 layers"),
    "one layer": ({"layers_to_transform": [0]}, "zero branches in 21 layers"),
    "layers by their pattern": ({"layers_to_transform": 1, "layers_pattern": "layers"}, "zero branches in 21 layers"),
    "but some": ({"exclude_modules": ["down_proj"]}, "zero branches in 4 layers"),
    "all linear": ({"target_modules": "all-linear"}, "28 layers"),
    "rslora": ({"use_rslora": True}, "scale 4;"),
    "dropout and task": ({"lora_dropout": 0.1, "task_type": "CAUSAL_LM"}, "28 layers"),
    "gaussian": ({"init_lora_weights": "gaussian"}, "28 layers"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    expected = made(tmp_path / "adapter", **settings)
    told, logits = imported(tmp_path / "adapter", tmp_path / "run")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert message in told
    assert ("zero branches" in told) == ("zero branches" in message)
    assert "ignored files" not in told


RENAMED: dict[str, Callable[[str], str]] = {
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "with another name": lambda key: key.replace(".weight", ".trained-1.weight"),
    "compiled": lambda key: key.replace("model.model.", "model._orig_mod.model.", 1),
    "compiled whole": lambda key: f"_orig_mod.{key}",
    "compiled layers": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "parallel": lambda key: f"module.{key}",
    "parallel and compiled": lambda key: f"module._orig_mod.{key}".replace(".weight", ".default.weight"),
    "fsdp": lambda key: key.replace("layers.0", "layers.0._fsdp_wrapped_module"),
    "without PEFT's prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("case", RENAMED)
def test_spellings_of_tensors_are_read(case: str, binary: bool, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    expected = made(folder)
    tensors = {RENAMED[case](key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    if binary:
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / WEIGHTS)
    told, logits = imported(folder, tmp_path / "run")
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert "ignored" not in told


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of an adapter."""
    folder = tmp_path_factory.mktemp("plain")
    made(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "acts after an invocation": ({"alora_invocation_tokens": [5, 6]}, r"found alora_invocation_tokens \[5, 6\]"),
    "of a later version": ({"lora_of_tomorrow": True}, "found lora_of_tomorrow True; merge the adapter by PEFT, or"),
    "a number of a later version": ({"lora_temperature": 0.5}, "found lora_temperature 0.5"),
    "quantization-aware": ({"use_qalora": True}, "found use_qalora True"),
    "block-diagonal": ({"use_bdlora": {"nblocks": 2}}, "found use_bdlora"),
    "parameters": ({"target_parameters": ["experts.w"]}, "found target_parameters"),
    "without a scale": ({"lora_alpha": 0}, "lora_alpha is 0, with which the adapter adds nothing"),
    "two": (
        {"use_dora": True, "kasa_config": {"beta": 1}},
        "found use_dora True, kasa_config|found kasa_config .*use_dora",
    ),
    "alphas": ({"alpha_pattern": {"q_proj": 2}}, "found alpha_pattern"),
    "changed weights": ({"init_lora_weights": "corda"}, "found init_lora_weights 'corda'"),
    "a bad pattern": ({"target_modules": "("}, "cannot tell which layers have an adapter|copy or save it again"),
    "no list of names": ({"target_modules": 3}, r"target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_known_to_be_plain_are_refused(case: str, plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    change, message = REFUSED[case]
    if case == "a bad pattern":
        tensors = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    with pytest.raises(UserError, match=message):
        import_adapter(written(tmp_path / "adapter", config | change, tensors), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("off", [None, False, {}, []], ids=repr)
def test_a_setting_of_a_later_version_that_is_off_changes_nothing(off: Any, plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    assert "28 layers" in import_adapter(written(tmp_path / "a", config | {"later": off}, tensors), tmp_path / "run")


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "one target": ({"target_modules": ["q_proj"]}, r"layers\.0\.self_attn\.k_proj.* and \d+ more"),
    "a pattern": ({"target_modules": r".*(q|k|v|o|gate|up)_proj"}, r"layers\.0\.mlp\.down_proj"),
    "excluded": ({"exclude_modules": ["o_proj"]}, r"layers\.0\.self_attn\.o_proj"),
    "excluded of all": ({"target_modules": "all-linear", "exclude_modules": ["up_proj"]}, r"layers\.0\.mlp\.up_proj"),
    "one block": ({"layers_to_transform": [0]}, r"model\.layers\.1\."),
    "one block of all": ({"target_modules": "all-linear", "layers_to_transform": 1}, r"model\.layers\.0\."),
    "another pattern": ({"layers_to_transform": [0], "layers_pattern": "blocks"}, r"model\.layers\.0\."),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_layers_that_peft_would_leave_out_are_refused(case: str, plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    change, name = LEFT_OUT[case]
    with pytest.raises(UserError, match=f"has layers that its settings .* leave out, as PEFT would: .*{name}"):
        import_adapter(written(tmp_path / "adapter", config | change, tensors), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"fan_in_fan_out": True}, {"target_modules": None}, {"target_modules": EVERY[::-1]}]
)
def test_settings_that_change_nothing_are_taken(change: dict[str, Any], plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    assert "28 layers" in import_adapter(written(tmp_path / "a", config | change, tensors), tmp_path / "run")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantized_adapters_are_refused(dtype: torch.dtype, plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    changed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=rf"integers or numbers of 8 bits, expected float32.* is {dtype}"):
        import_adapter(written(tmp_path / "adapter", config, changed), tmp_path / "run")


def test_an_adapter_that_lacks_layers_of_its_own_is_refused(plain: Any, tmp_path: Path) -> None:
    config, tensors = plain
    cut = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    with pytest.raises(
        UserError, match=r"lacks layers that its target_modules name: model\.layers\.1\.mlp.* save it again"
    ):
        import_adapter(written(tmp_path / "adapter", config, cut), tmp_path / "run")


def test_names_of_another_model_are_refused(plain: Any, tmp_path: Path) -> None:
    """Also where some of them would fit."""
    config, tensors = plain
    other = {name.replace("model.layers.0.", "model.language_model.layers.0."): t for name, t in tensors.items()}
    with pytest.raises(UserError, match=r"another backbone.* layers not in the model: model.language_model"):
        import_adapter(written(tmp_path / "adapter", config, other), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.replace(".weight", ".one.weight"), "several adapters: default, one"),
        (lambda key: f"_orig_mod.{key}", "a second spelling of a key: .*and 48 more"),
        (lambda key: key.replace("lora_A", "lora_magnitude_vector"), "unknown keys: "),
    ],
    ids=["two adapters", "two spellings", "unknown"],
)
def test_files_with_more_than_one_adapter_are_refused(
    change: Callable[[str], str], message: str, plain: Any, tmp_path: Path
) -> None:
    config, tensors = plain
    more = tensors | {change(name): tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=message):
        import_adapter(written(tmp_path / "adapter", config, more), tmp_path / "run")


def test_files_beside_the_adapter_are_named(plain: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", *plain)
    torch.save({"mm_projector.weight": torch.ones(2)}, folder / "non_lora_trainables.bin")
    torch.save(plain[1], folder / "adapter_model.bin")
    (folder / "README.md").touch()
    (folder / ".gitattributes").touch()
    written(folder / "second", *plain)
    told = import_adapter(folder, tmp_path / "run")
    assert "ignored files beside the adapter: adapter_model.bin, non_lora_trainables.bin, second/" in told
    branches = tmp_path / "branches"
    for role in adapters.BRANCH_ROLES:
        written(branches / role.name, *plain)
    (branches / "text-expert" / "optimizer.pt").touch()
    (branches / "notes.txt").touch()
    told = import_adapter(branches, tmp_path / "mage")
    assert "mage on tiny, 28 layers" in told
    assert "ignored files beside the adapter: notes.txt, text-expert/optimizer.pt" in told


def test_damaged_and_missing_weights_are_refused(plain: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "adapter", *plain)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"expected adapter_model.safetensors or adapter_model.bin .*, found neither"):
        import_adapter(folder, tmp_path / "run")
    (folder / "adapter_model.bin").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"adapter_model.bin: expected a file of tensors"):
        import_adapter(folder, tmp_path / "run")
    torch.save({"epoch": 3, "state": plain[1]}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"expected a flat table of tensors"):
        import_adapter(folder, tmp_path / "run")
