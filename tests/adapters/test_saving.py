"""Branches saved and loaded: by cnext, PEFT and transformers, merged, in Trainer's checkpoints and for the Hub."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones.small_folders import LANGUAGE
from torch import Tensor, nn

import cnext
from cnext.adapters import AttachedMage, activate, branch_parameters
from cnext.adapters.saving import require_same
from cnext.errors import UserError

ROLES = [role.name for role in cnext.adapters.BRANCH_ROLES]
TEXT = LANGUAGE | {"vocab_size": 64}
TEXT_ONLY = ("llama", "tied")
IDS = torch.arange(3, 19).view(2, 8)
# By PEFT, of transformers' newer releases.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def new(kind: str = "llama", seed: int = 0) -> Any:
    import transformers as t

    torch.manual_seed(seed)
    if kind == "llava":
        vision = t.CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
            intermediate_size=48, projection_dim=32,
        )  # fmt: skip
        config = t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT), vision_config=vision, image_token_index=60, image_seq_length=4,
            vision_feature_layer=-1,
        )  # fmt: skip
        return t.LlavaForConditionalGeneration(config)
    if kind == "qwen2-vl":
        config = t.Qwen2VLConfig(
            text_config=dict(TEXT, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59,
        )  # fmt: skip
        return t.Qwen2VLForConditionalGeneration(config)
    tied = {"tie_word_embeddings": True} if kind == "tied" else {}
    return t.LlamaForCausalLM(t.LlamaConfig(**TEXT, **tied))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "llava", "qwen2-vl", "tied"):
        new(kind).save_pretrained(folder / kind)
    return folder


def base(bases: Path, kind: str = "llama") -> Any:
    import transformers as t

    auto = t.AutoModelForCausalLM if kind in TEXT_ONLY else t.AutoModelForImageTextToText
    return auto.from_pretrained(bases / kind)


def attached(model: nn.Module, attach: Any = cnext.attach_mage, **options: Any) -> AttachedMage:
    handle = attach(model, **({"rank": 2, "scale": 0.5} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in branch_parameters(model).values():
            parameter.normal_(std=0.1, generator=generator)
    return handle


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("kind", ["llama", "llava", "qwen2-vl", "tied"])
def test_what_is_saved_gives_the_same_logits_everywhere(kind: str, bases: Path, tmp_path: Path) -> None:
    import transformers as t
    from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel

    model = base(bases, kind)
    before = logits(model)
    handle = attached(model.train(), dropout=0.3)
    expected = logits(model.train())
    assert handle.save_pretrained(tmp_path / "out") == tmp_path / "out"
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "cnext_config.json", "reference.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 2e5
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases / kind)
    assert (config["r"], config["lora_alpha"]) == (8, 4)
    listed = config["target_modules"]
    assert (sorted(listed) == sorted(cnext.adapters.mage.TARGETS)) == (kind != "llava")

    peft = PeftModel.from_pretrained(base(bases, kind), tmp_path / "out")
    torch.testing.assert_close(logits(peft), expected, rtol=0, atol=1e-5)
    assert not any("vision" in name for name, module in peft.named_modules() if hasattr(module, "lora_A"))
    assert not torch.allclose(before, expected, atol=1e-2)
    text = kind in TEXT_ONLY
    for loader in (
        AutoPeftModelForCausalLM if text else AutoPeftModel,
        t.AutoModelForCausalLM if text else t.AutoModelForImageTextToText,
        type(model),
    ):
        torch.testing.assert_close(logits(loader.from_pretrained(tmp_path / "out")), expected, rtol=0, atol=1e-5)

    other = base(bases, kind)
    again = cnext.load(other, tmp_path / "out")
    theirs, ours = again.layers, handle.layers
    assert theirs.keys() == ours.keys()
    for name, layer in ours.items():
        for setting in ("scale", "dropout", "independent", "active"):
            assert getattr(theirs[name], setting) == getattr(layer, setting)
    loaded = branch_parameters(other)
    assert loaded.keys() == branch_parameters(model).keys()
    assert all(torch.equal(loaded[name], value) for name, value in branch_parameters(model).items())
    assert torch.equal(logits(other), expected)
    assert all(parameter.requires_grad for parameter in loaded.values())
    assert again.train_on(["text"], ["text"])


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_an_adapter_per_branch(kind: str, bases: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    handle = attached(base(bases, kind))
    expected = logits(handle.model)
    handle.save_pretrained(tmp_path / "out", per_branch=True)
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/adapter_config.json")) == sorted(ROLES)
    peft = PeftModel.from_pretrained(base(bases, kind), tmp_path / "out" / ROLES[0], adapter_name=ROLES[0])
    for name in ROLES[1:]:
        peft.load_adapter(tmp_path / "out" / name, adapter_name=name)
    peft.base_model.set_adapter(ROLES)
    torch.testing.assert_close(logits(peft), expected, rtol=0, atol=1e-5)
    other = base(bases, kind)
    cnext.load(other, tmp_path / "out")
    values, again = branch_parameters(handle.model), branch_parameters(other)
    assert all(torch.equal(again[name], value) for name, value in values.items())
    handle.save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match="holds branches as an adapter per branch already, and both would be loaded"):
        handle.save_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="holds branches as one adapter already"):
        handle.save_pretrained(tmp_path / "one", per_branch=True)
    shutil.rmtree(tmp_path / "out" / ROLES[2])
    with pytest.raises(UserError, match=r"out lacks the adapters of text-expert, which cnext_config.json names"):
        cnext.load(base(bases, kind), tmp_path / "out")


def test_settings_of_attaching_are_restored(bases: Path, tmp_path: Path) -> None:
    model = base(bases, "llava")
    options = {"rank": 3, "scale": 0.3, "dropout": 0.2, "independent": True, "shared": [], "language_model": model}
    handle = attached(model, targets=("q_proj", "fc1", "lm_head"), **options)
    handle.save_pretrained(tmp_path)
    other = base(bases, "llava")
    again = cnext.load(other, tmp_path)
    assert again.layers.keys() == handle.layers.keys() >= {"lm_head"}
    layer = again.layers["lm_head"]
    assert (layer.scale, layer.dropout, layer.independent) == (0.3, 0.2, True)
    assert not cnext.adapters.joined(other)
    assert torch.equal(logits(other), logits(model))


def test_half_precision(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases).to(torch.bfloat16))
    handle.save_pretrained(tmp_path)
    other = base(bases).to(torch.bfloat16)
    cnext.load(other, tmp_path)
    assert torch.equal(logits(other), logits(handle.model))
    cnext.load(base(bases), tmp_path)  # another precision, the same model


def test_another_base_model_is_refused_and_unchanged(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases))
    handle.save_pretrained(tmp_path)
    other = new(seed=1)
    names, flags = list(other.state_dict()), [each.requires_grad for each in other.parameters()]
    message = r"the model is not the one that the branches are for.*load the base model, .*/llama, or pass check=False"
    with pytest.raises(UserError, match=message):
        cnext.load(other, tmp_path)
    assert (list(other.state_dict()), [each.requires_grad for each in other.parameters()]) == (names, flags)
    assert cnext.load(other, tmp_path, check=False).layers

    nearly = base(bases)
    with torch.no_grad():
        nearly.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(UserError, match="or its weights have changed: its logits differ by"):
        cnext.load(nearly, tmp_path)
    import transformers as t

    wide = t.LlamaForCausalLM(t.LlamaConfig(**TEXT | {"hidden_size": 64, "num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"does not fit the model.*; it was saved with LlamaForCausalLM .* torch "):
        cnext.load(wide, tmp_path)
    assert not cnext.adapters.layers(wide)
    with pytest.raises(UserError, match="the model has adapters already"):
        cnext.load(handle.model, tmp_path)


def test_damaged_folders_are_refused(bases: Path, tmp_path: Path) -> None:
    saved, model = tmp_path / "saved", base(bases)
    attached(base(bases)).save_pretrained(saved)

    def damaged() -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(saved, folder))

    with pytest.raises(UserError, match=r"expected a folder of branches, .*none.* is none"):
        cnext.load(model, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"expected branches that save_pretrained wrote.*; found none"):
        cnext.load(model, tmp_path / "empty")
    (folder := damaged()).joinpath("cnext_config.json").unlink()
    with pytest.raises(UserError, match=r"found an adapter of PEFT, which PeftModel.from_pretrained loads"):
        cnext.load(model, folder)
    (folder := damaged()).joinpath("cnext_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cnext_config.json: expected JSON, could not read it"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "cnext_config.json", format=2)
    with pytest.raises(UserError, match=r"written by cnext .*, in format 2; update cnext"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "cnext_config.json", branches={"../x": 8})
    with pytest.raises(UserError, match="Expected names in `branches` that can be a file's"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "cnext_config.json", branches={"text-general": 9})
    with pytest.raises(UserError, match="Expected `branches` of the rank in `attached`"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "cnext_config.json", branches={"text-general": 2})
    with pytest.raises(UserError, match=r"has ranks \{'lora': 8\} and lora_alpha / r 0.5, .*; save the branches again"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "adapter_config.json", lora_alpha=8)
    with pytest.raises(UserError, match=r"lora_alpha / r 1, cnext_config.json .* and 0.5"):
        cnext.load(model, folder)
    file = (folder := damaged()) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: expected a file of tensors.*cannot read it"):
        cnext.load(model, folder)
    changed((folder := damaged()) / "cnext_config.json", versions={"cnext": "999.0"})
    with pytest.warns(UserWarning, match=r"was written by cnext 999.0, newer than this one"):
        cnext.load(model, folder).detach()
    (folder := damaged()).joinpath("reference.json").unlink()
    with pytest.warns(
        UserWarning, match=r"has no reference.json, so that it is not known whether the model is the one"
    ):
        cnext.load(model, folder).detach()
    assert not cnext.adapters.layers(model)


def test_what_cannot_be_saved_is_refused(bases: Path, tmp_path: Path) -> None:
    handle = attached(new())
    with pytest.raises(UserError, match=r"the model has no name_or_path.*; pass base_model="):
        handle.save_pretrained(tmp_path)
    handle.save_pretrained(tmp_path / "named", base_model="org/model")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    handle.model.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"lm_head.weight require a gradient and are no branches"):
        handle.save_pretrained(tmp_path, base_model="org/model")
    handle.model.lm_head.requires_grad_(False)
    activate(handle.model, ROLES[:2])
    with pytest.raises(UserError, match=r"image-expert, text-expert: not active, but an adapter acts with all"):
        handle.save_pretrained(tmp_path, base_model="org/model")
    activate(handle.model, ROLES)
    with pytest.raises(UserError, match=r"llama holds a whole model \(config.json\)"):
        handle.save_pretrained(bases / "llama", base_model="org/model")
    with pytest.raises(UserError, match=r"expected a folder to save into, .* is a file"):
        handle.save_pretrained(bases / "llama" / "config.json", base_model="org/model")
    (tmp_path / "link").symlink_to("nowhere")
    for place in (tmp_path / "link", Path("/dev/null/folder"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"expected a folder to save into, .* cannot be made: "):
            handle.save_pretrained(place, base_model="org/model")
    on_meta = attached(base(bases)).model.to("meta")
    with pytest.raises(UserError, match=r"q_proj.text-general.A, .*: on the meta device, without values to save"):
        on_meta.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    handle.detach()
    for call in (handle.save_pretrained, handle.push_to_hub):
        with pytest.raises(UserError, match="the branches of this handle were detached"):
            call("x")
    later = cnext.attach_mage(handle.model)
    train = lambda: handle.train_on(["text"], ["text"])  # noqa: E731
    for call in (handle.merged, handle.merge, handle.unmerge, handle.detach, train):
        with pytest.raises(UserError, match="the branches of this handle were detached"):
            call()
    assert not handle.layers
    assert later.layers
    assert copy.deepcopy(later).layers


def test_saving_changes_nothing(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases), dropout=0.2)
    handle.model.train()
    handle.model.model.layers[0].eval()
    modes = [module.training for module in handle.model.modules()]
    seen: list[Tensor] = []
    for layer in handle.layers.values():
        layer.observer = seen.append
    state = torch.get_rng_state()
    handle.save_pretrained(tmp_path)
    assert not seen
    assert all(layer.observer is not None for layer in handle.layers.values())
    assert [module.training for module in handle.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    expected = (tmp_path / "adapter_model.safetensors").read_bytes()
    handle.merge()
    handle.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == expected


def test_a_model_without_token_ids_is_saved_with_a_warning(bases: Path, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    handle = attached(Odd(base(bases)))
    with pytest.warns(UserWarning, match="no reference logits are saved with the branches.*: Odd gives none"):
        handle.save_pretrained(tmp_path, base_model="org/odd")
    other = Odd(base(bases))
    with pytest.warns(UserWarning, match="has no reference.json"):
        cnext.load(other, tmp_path)
    assert torch.equal(logits(other.inner), logits(handle.model.inner))


@pytest.mark.parametrize("labels", [1, 2, 3, 40])
def test_a_classifier_is_known_by_its_logits(labels: int, tmp_path: Path) -> None:
    import transformers as t

    def classifier(seed: int) -> Any:
        torch.manual_seed(seed)
        return t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, num_labels=labels))

    handle = attached(classifier(0))
    handle.save_pretrained(tmp_path, base_model="org/base")
    assert json.loads((tmp_path / "reference.json").read_text())["size"] == labels
    loaded = cnext.load(classifier(0), tmp_path).model
    assert torch.equal(logits(loaded), logits(handle.model))
    for other in (classifier(1), new()):
        with pytest.raises(UserError, match="the model is not the one that the branches are for"):
            cnext.load(other, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_merged_is_a_plain_model(kind: str, bases: Path, tmp_path: Path) -> None:
    model = base(bases, kind)
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    names = list(model.state_dict())
    handle = attached(model)
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    plain = handle.merged()
    assert type(plain) is type(base(bases, kind))
    assert list(plain.state_dict()) == names
    assert {name: each.requires_grad for name, each in plain.named_parameters()} == flags
    assert not plain.training
    assert plain.name_or_path == ""
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    handle.merge()
    torch.testing.assert_close(logits(handle.merged()), expected, rtol=0, atol=1e-5)
    assert all(layer.merged for layer in handle.layers.values())


def test_merged_refuses_tied_weights_and_takes_others(bases: Path) -> None:
    model = base(bases, "tied")
    with pytest.raises(UserError, match=r"weights that several layers own: model.embed_tokens is lm_head; .*save_pre"):
        attached(model, targets=("lm_head",), language_model=model).merged()
    model = base(bases, "tied")
    handle = attached(model)
    torch.testing.assert_close(logits(handle.merged()), logits(model), rtol=0, atol=1e-5)


def test_copies_and_pickles_save_themselves(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases))
    expected = logits(handle.model)
    for number, twin in enumerate([copy.deepcopy(handle.model), pickle.loads(pickle.dumps(handle.model))]):
        assert torch.equal(logits(twin), expected)
        with torch.no_grad():
            for parameter in branch_parameters(twin).values():
                parameter.mul_(1.5)
        twin.save_pretrained(tmp_path / str(number))
        other = base(bases)
        cnext.load(other, tmp_path / str(number))
        assert torch.equal(logits(other), logits(twin))
    assert torch.equal(logits(handle.model), expected)
    plain = handle.detach()
    assert "save_pretrained" not in vars(plain)
    assert not plain._load_state_dict_post_hooks
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").is_file()


def test_a_layer_at_several_places_is_told(bases: Path, tmp_path: Path) -> None:
    def sharing() -> Any:
        model = base(bases)
        model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
        return model

    handle = attached(sharing())
    with pytest.warns(
        UserWarning, match=r"layers.1.mlp.up_proj: the same layer as another one, to which PEFT gives no"
    ):
        handle.save_pretrained(tmp_path)
    other = sharing()
    cnext.load(other, tmp_path)
    assert torch.equal(logits(other), logits(handle.model))


def test_a_part_of_the_model_is_not_saved_alone(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases, "llava"))
    with pytest.raises(UserError, match="save_pretrained of LlamaModel, which is a part of the model with branches"):
        handle.model.get_decoder().save_pretrained(tmp_path)


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(3, 57, (8,), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def trainer(model: nn.Module, folder: Path, steps: int, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given: dict[str, Any] = {
        "max_steps": steps, "save_steps": 3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "report_to": [], "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return Trainer(model, TrainingArguments(str(folder), **given), train_dataset=rows(), eval_dataset=rows(8))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_trainer_saves_resumes_and_is_loaded(
    kind: str, named: bool, bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers as t
    from peft import PeftModel

    auto = t.AutoModelForCausalLM if kind == "llama" else t.AutoModelForImageTextToText

    def started(seed: int = 0) -> Any:
        model = base(bases, kind) if named else new(kind, seed)
        cnext.attach_mage(model, rank=2, generator=torch.Generator().manual_seed(3)).train_on(["text"], ["text"])
        return model

    torch.manual_seed(0)
    straight = trainer(started(), tmp_path / "straight", 6)
    straight.train()
    torch.manual_seed(0)
    trainer(started(), tmp_path / "resumed", 3).train()
    second = started(seed=1)
    again = trainer(second, tmp_path / "resumed", 6)
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text
    expected = logits(straight.model)
    assert torch.equal(logits(second), expected)

    straight.save_model(tmp_path / "final")
    saved = tmp_path / "final"
    assert not (saved / "config.json").exists()
    size = (saved / "model.safetensors").stat().st_size
    assert (size < 1e5) == named
    for loader in (auto, type(straight.model)):
        for folder in (saved, tmp_path / "straight" / "checkpoint-6"):
            torch.testing.assert_close(logits(loader.from_pretrained(folder)), expected, rtol=0, atol=1e-5)
    own = json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert own == str(bases / kind if named else saved / "base_model")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(auto.from_pretrained(own), saved)), expected, rtol=0, atol=1e-5
    )
    other = auto.from_pretrained(own)
    cnext.load(other, saved)
    assert torch.equal(logits(other), expected)


def test_a_checkpoint_knows_what_resumes_it(bases: Path, tmp_path: Path) -> None:
    model = attached(base(bases)).model
    model.save_pretrained(tmp_path)
    require_same(cnext.attach_mage(base(bases), rank=2, scale=0.5).model, tmp_path)
    require_same(base(bases), bases / "llama")
    refused = [({"scale": 4.0}, "scale=0.5, those of the model with scale=4"), ({"targets": ["q_proj"]}, "targets=")]
    for options, message in refused:
        with pytest.raises(UserError, match=message):
            require_same(attached(base(bases), **options).model, tmp_path)
    with pytest.raises(UserError, match="holds branches, and the model has none"):
        require_same(base(bases), tmp_path)
    with pytest.raises(UserError, match=r"trained beside .*llama, and the model without branches has other logits"):
        require_same(attached(new(seed=1)).model, tmp_path)
    model.lm_head.requires_grad_(True)  # so that its values are in the state
    model.save_pretrained(tmp_path)
    require_same(attached(new(seed=1)).model, tmp_path)


def test_trainer_loads_the_best_checkpoint(bases: Path, tmp_path: Path) -> None:
    model = base(bases)
    cnext.attach_mage(model, rank=2).train_on(["text"], ["text"])
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 1}
    # The loss falls, so that the first checkpoint is taken for the best.
    made = trainer(model, tmp_path, 6, metric_for_best_model="eval_loss", greater_is_better=True, **options)
    first: dict[str, Tensor] = {}
    from transformers import TrainerCallback

    class Kept(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                first.update({name: each.detach().clone() for name, each in branch_parameters(model).items()})

    made.add_callback(Kept())
    made.train()
    best = made.state.best_model_checkpoint
    assert best is not None
    assert Path(best).name == "checkpoint-3"
    assert all(torch.equal(value, first[name]) for name, value in branch_parameters(model).items())


def test_trainer_saves_what_was_trained_beside_the_branches(bases: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = base(bases)
    cnext.attach_mage(model, rank=2).train_on(["text"], ["text"])
    model.lm_head.requires_grad_(True)
    made = trainer(model, tmp_path / "out", 3)
    made.train()
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_a_base_model_that_was_changed_is_not_named(bases: Path, tmp_path: Path) -> None:
    """Trained and then frozen, loaded, or of another vocabulary: the folder that name_or_path names has it no more."""
    import transformers as t
    from transformers import AutoModelForCausalLM

    def trained(model: Any) -> None:
        torch.optim.AdamW([model.lm_head.requires_grad_(True).weight]).zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        torch.optim.AdamW([model.lm_head.weight], lr=0.1).step()
        model.lm_head.requires_grad_(False)

    def resized(model: Any) -> None:
        model.resize_token_embeddings(70, mean_resizing=False)

    for number, change in enumerate((trained, resized)):
        handle = attached(base(bases))
        handle.merge()
        handle.unmerge()
        handle.save_pretrained(tmp_path / "before")
        change(handle.model)
        with pytest.raises(UserError, match=r"lm_head.weight were trained, loaded or resized .*no longer .*llama"):
            handle.save_pretrained(tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        handle.save_pretrained(tmp_path / "named", base_model="org/model")
        copied = copy.deepcopy(handle)
        handle.model.save_pretrained(tmp_path / f"both{number}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"both{number}" / "base_model")
        cnext.load(loaded, tmp_path / f"both{number}")
        torch.testing.assert_close(logits(loaded), logits(copied.model))
    with pytest.raises(UserError, match="its vocabulary is another"):
        cnext.load(base(bases), tmp_path / "named")
    wide = t.LlamaForCausalLM.from_pretrained(bases / "llama")
    resized(wide)
    with pytest.raises(UserError, match="its vocabulary is another"):
        cnext.load(wide, tmp_path / "before")


def test_branches_that_are_not_finite(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases))
    with torch.no_grad():
        branch_parameters(handle.model)["model.layers.1.mlp.up_proj.text-expert.B"][0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.text-expert.B are not finite: training diverged"):
        handle.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"are not finite, .*up_proj.text-expert.B: training diverged") as seen:
        handle.model.save_pretrained(tmp_path / "out")
    assert len(seen) == 1
    with pytest.raises(UserError, match="finite"):
        cnext.load(base(bases), tmp_path / "out")


def test_a_state_dictionary_is_what_is_saved(bases: Path, tmp_path: Path) -> None:
    """As FSDP's and DeepSpeed's Trainer give it, with the prefixes of wrappers."""
    handle = attached(base(bases))
    expected = logits(handle.model)
    state = {f"module.{name}": value.clone() for name, value in handle.model.state_dict().items()}
    with torch.no_grad():
        for parameter in branch_parameters(handle.model).values():
            parameter.zero_()
    handle.model.save_pretrained(tmp_path / "none", is_main_process=False, state_dict=state)
    handle.model.save_pretrained(tmp_path / "none", state_dict={})
    assert not (tmp_path / "none").exists()
    handle.model.save_pretrained(tmp_path / "out", state_dict=state, safe_serialization=False)
    assert (tmp_path / "out" / "pytorch_model.bin").is_file()
    other = base(bases)
    with pytest.raises(UserError, match="the model is not the one"):  # its logits were of the zeros
        cnext.load(other, tmp_path / "out")
    cnext.load(other, tmp_path / "out", check=False)
    assert torch.equal(logits(other), expected)
    del state["module.model.layers.0.mlp.up_proj.branches.text-general.A"]
    with pytest.raises(UserError, match=r"lacks a branch, .*up_proj.branches.text-general.A"):
        handle.model.save_pretrained(tmp_path / "out", state_dict=state)


def test_strict_loading_still_needs_the_whole_model(bases: Path) -> None:
    handle = attached(base(bases))
    state = handle.model.state_dict()
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        handle.model.load_state_dict(state)
    branches = {name: value for name, value in handle.model.state_dict().items() if ".branches." in name}
    assert not handle.model.load_state_dict(branches, strict=False).missing_keys
    branches.pop(next(iter(branches)))
    assert len(handle.model.load_state_dict(branches, strict=False).missing_keys) > 1
    handle.detach()
    assert handle.model.load_state_dict({}, strict=False).missing_keys


class FakeHub:
    """HfApi that keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}

    def made(self, token: Any = None) -> FakeHub:
        self.calls.append(("HfApi", token, {}))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        from types import SimpleNamespace

        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Any, **options: Any) -> Any:
        from types import SimpleNamespace

        self.calls.append(("upload_folder", repo_id, options))
        folder = Path(folder_path)
        self.files = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
        return SimpleNamespace(commit_url="https://hub.test/commit", pr_url=None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake.made)
    return fake


def test_push_to_hub(bases: Path, hub: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import EvalResult, ModelCard

    handle = attached(base(bases))
    with pytest.raises(UserError, match=r"the base model is /.*/llama, which nobody else can load; pass base_model="):
        handle.push_to_hub("me/birds")
    assert not hub.calls
    results = [EvalResult("text-generation", "org/birds", "Birds", "accuracy", 61.5)]
    options = {"license": "apache-2.0", "tags": ["birds"], "eval_results": results, "base_model": "org/model"}
    url = handle.push_to_hub("me/birds", token="t", private=True, revision="dev", commit_message="One", **options)
    assert url == "https://hub.test/commit"
    calls = [("HfApi", "t"), ("create_repo", "me/birds"), ("upload_folder", "me/birds")]
    assert [call[:2] for call in hub.calls] == calls
    assert hub.calls[1][2] == {"private": True, "exist_ok": True}
    assert hub.calls[2][2] == {"commit_message": "One", "revision": "dev", "create_pr": False}
    names = "README.md adapter_config.json adapter_model.safetensors cnext_config.json reference.json"
    assert sorted(hub.files) == names.split()
    card = ModelCard(hub.files["README.md"].decode())
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == ("org/model", "apache-2.0", "peft")
    assert {"continual-learning", "cnext", "lora", "birds"} <= set(data["tags"])
    assert card.data.eval_results[0].metric_value == 61.5
    assert data["model-index"][0]["name"] == "birds"
    assert "`max_lora_rank` of at least 8" in card.text
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/model"
    with pytest.raises(UserError, match=r"expected huggingface_hub.EvalResult .* or EvalResultEntry .*, got dict"):
        handle.save_pretrained(tmp_path, eval_results=[{"accuracy": 1}])


def test_results_for_leaderboards_are_files(bases: Path, tmp_path: Path) -> None:
    import huggingface_hub
    import yaml

    if not hasattr(huggingface_hub, "EvalResultEntry"):  # older than the format
        return
    made = [
        huggingface_hub.EvalResultEntry(dataset_id="org/birds", task_id="default", value=61.5, notes="after 3 tasks"),
        huggingface_hub.EvalResultEntry(dataset_id="org/birds", task_id="hard", value=12.0),
    ]
    attached(base(bases)).save_pretrained(tmp_path, eval_results=made)
    text = (tmp_path / ".eval_results" / "birds.yaml").read_text()
    assert yaml.safe_load(text) == [
        {"dataset": {"id": "org/birds", "task_id": "default"}, "value": 61.5, "notes": "after 3 tasks"},
        {"dataset": {"id": "org/birds", "task_id": "hard"}, "value": 12.0},
    ]
    assert "model-index" not in (tmp_path / "README.md").read_text()


def test_a_refusal_of_the_hub_is_told(bases: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("cannot reach it")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UserError, match="push_to_hub: me/birds was not uploaded: cannot reach it"):
        attached(base(bases)).push_to_hub("me/birds", base_model="org/model")


def test_branches_from_the_hub(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    handle = attached(base(bases))
    handle.save_pretrained(tmp_path / "out")
    asked: list[Any] = []

    def fetched(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"], options["token"]))
        if repo_id != "me/birds":
            raise huggingface_hub.errors.HFValidationError("no such repository")
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    other = base(bases)
    cnext.load(other, "me/birds", revision="dev", token="t")
    assert asked == [("me/birds", "dev", "t")]
    assert torch.equal(logits(other), logits(handle.model))
    with pytest.raises(
        UserError, match="me/fish: no such folder, and not to be had from the Hugging Face Hub: no such"
    ):
        cnext.load(base(bases), "me/fish")


def test_a_card_of_ones_own_is_kept(bases: Path, tmp_path: Path) -> None:
    handle = attached(base(bases))
    handle.save_pretrained(tmp_path, license="mit")
    assert re.search(r"^license: mit$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    handle.save_pretrained(tmp_path, license="apache-2.0")
    assert re.search(r"^license: apache-2.0$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    (tmp_path / "README.md").write_text("# My card\n")
    handle.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My card\n"


def test_cnext_import_reads_what_is_saved(tmp_path: Path) -> None:
    from cnext.backbones.tiny.model import TinyBackbone
    from cnext.exchange.importing import import_adapter

    handle = cnext.attach_mage(TinyBackbone.load().outer_model(), rank=2)
    handle.save_pretrained(tmp_path / "out", base_model="cnext:tiny")
    told = import_adapter(tmp_path / "out", tmp_path / "run", method="mage")
    assert "reference logits as exported" in told
    assert "ignored" not in told


def test_the_page_of_the_documentation(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    page = (Path(__file__).parents[2] / "docs" / "saving.md").read_text(encoding="utf-8")
    first = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cnext, "attach_mage", attached)  # as if trained
    names: dict[str, Any] = {"cnext": cnext, "AutoModelForCausalLM": AutoModelForCausalLM, "PeftModel": PeftModel}
    names |= {"base": base(bases), "name": bases / "llama"}
    exec(first, names)
    expected = logits(names["base"])
    assert torch.equal(logits(names["again"].model), expected)
    torch.testing.assert_close(logits(names["model"]), expected, rtol=0, atol=1e-5)
