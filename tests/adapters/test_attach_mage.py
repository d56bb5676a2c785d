"""`cnext.attach_mage` on small random transformers models, and its agreement with PEFT."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from backbones.small_folders import LANGUAGE
from torch import nn

import cnext
from cnext.adapters import AttachedMage, activate, activated, branch_parameters
from cnext.averaging import Constant
from cnext.errors import UserError

TEXT = LANGUAGE | {"vocab_size": 64}


def model(name: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if name == "janus":
        vision = t.JanusVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4, projection_dim=32,
            num_image_tokens=16, mlp_ratio=2.0,
        )  # fmt: skip
        pictures = t.JanusVQVAEConfig(
            embed_dim=4, num_embeddings=16, latent_channels=32, base_channels=32, channel_multiplier=[1],
            num_res_blocks=1, projection_dim=32, image_token_embed_dim=32, num_hidden_layers=1,
        )  # fmt: skip
        text = t.LlamaConfig(**TEXT)
        config = t.JanusConfig(text_config=text, vision_config=vision, vq_config=pictures, image_token_id=60)
        return t.JanusForConditionalGeneration(config)
    if name == "emu3":
        pictures = t.Emu3VQVAEConfig(
            codebook_size=8, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1],
            num_res_blocks=1, num_attention_heads=1, hidden_size=32, attn_resolutions=[2],
        )  # fmt: skip
        words = {"<image>": 60} | {f"<|visual token {i:06d}|>": 20 + i for i in range(8)}
        config = t.Emu3Config(text_config=t.Emu3TextConfig(**TEXT), vq_config=pictures, vocabulary_map=words)
        return t.Emu3ForConditionalGeneration(config)
    kinds = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM),
        "qwen": (t.Qwen2Config, t.Qwen2ForCausalLM),
        "mistral": (t.MistralConfig, t.MistralForCausalLM),
    }
    config, made = kinds[name]
    return made(config(**TEXT))


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 19).view(2, 8)).logits


@torch.no_grad()
def disturb(handle: AttachedMage) -> None:
    for parameter in branch_parameters(handle.model).values():
        parameter.normal_(std=0.1)


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("llama", "model.layers"),
        ("qwen", "model.layers"),
        ("mistral", "model.layers"),
        ("janus", "model.language_model.layers"),
        ("emu3", "model.text_model.layers"),
    ],
)
def test_attach_merge_and_detach(name: str, language: str) -> None:
    plain = model(name).eval()
    plain.lm_head.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in plain.named_parameters()}
    weights = {n: t.clone() for n, t in plain.state_dict().items()}
    before = logits(plain)
    handle = cnext.attach_mage(plain, rank=2)
    assert len(handle.layers) == 14
    assert {re.sub(r"\.\d+\..*", "", n) for n in handle.layers} == {language}
    assert torch.equal(logits(plain), before)
    live = {n for n, p in plain.named_parameters() if p.requires_grad}
    assert live == {f"{layer}.branches.{key}" for layer in handle.layers for key in KEYS}
    disturb(handle)
    with_branches = logits(plain)
    assert not torch.allclose(with_branches, before, atol=1e-3)
    handle.merge()
    torch.testing.assert_close(logits(plain), with_branches, rtol=1e-4, atol=1e-4)
    assert handle.detach() is plain
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == flags
    assert all(torch.equal(t, weights[n]) for n, t in plain.state_dict().items())
    assert torch.equal(logits(plain), before)


KEYS = [f"{side}.{half}" for side in ("text-general", "image-general", "text-expert", "image-expert") for half in "AB"]


@pytest.mark.parametrize("a", ["fixed", "trained"])
def test_train_all_trains_every_branch(a: str) -> None:
    handle = cnext.attach_mage(model("llama"))
    handle.train_on(reads=["text"], writes=["text"])
    parameters = handle.train_all(a)
    every = branch_parameters(handle.model)
    assert parameters.keys() == {name for name in every if a == "trained" or name.endswith(".B")}
    assert {id(p) for p in handle.model.parameters() if p.requires_grad} == {id(p) for p in parameters.values()}
    logits(handle.model).sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in parameters.items() if name.endswith(".B"))


def test_train_all_refuses_another_a() -> None:
    handle = cnext.attach_mage(model("llama"))
    with pytest.raises(UserError, match="unknown value of a 'frozen'; valid: fixed, trained"):
        handle.train_all("frozen")
    handle.detach()
    with pytest.raises(UserError, match="train_all: the branches of this handle were detached"):
        handle.train_all()


def test_train_on_trains_only_the_branches_of_the_task() -> None:
    plain = model("llama")
    handle = cnext.attach_mage(plain, rank=2)
    parameters = handle.train_on(reads=("text",), writes=("image",))
    assert {name.split(".")[-2] for name in parameters} == {"text-general", "image-expert"}
    logits(plain).square().mean().backward()
    assert {n for n, p in plain.named_parameters() if p.grad is not None} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }
    assert len(parameters) == 14 * 4


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(UserError, match=r"named fc1, query; its linear layers are named down_proj, gate_proj, k_proj"):
        cnext.attach_mage(model("janus"), targets=("q_proj", "fc1", "query"))


def test_a_second_attach_is_refused() -> None:
    attached = model("llama")
    cnext.attach_mage(attached)
    with pytest.raises(UserError, match="the model has adapters already; detach them first"):
        cnext.attach_mage(attached)


def test_a_subclass_of_linear_is_refused_and_nothing_changes() -> None:
    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    plain = model("llama")
    plain.model.layers[1].mlp.up_proj = Packed(32, 48)
    names = list(plain.state_dict())
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj is a Packed; adapters need the plain weight"):
        cnext.attach_mage(plain)
    assert list(plain.state_dict()) == names
    assert all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_agrees_with_one_peft_adapter_of_rank_32() -> None:
    from peft import LoraConfig, get_peft_model

    handle = cnext.attach_mage(model("llama").double())
    disturb(handle)
    other = get_peft_model(
        model("llama").double(), LoraConfig(r=32, lora_alpha=32, target_modules=list(cnext.adapters.mage.TARGETS))
    )
    with torch.no_grad():
        for name, layer in handle.layers.items():
            theirs = other.base_model.model.get_submodule(name)
            branches = layer.branches.values()
            theirs.lora_A["default"].weight.copy_(torch.cat([branch.A for branch in branches]))
            theirs.lora_B["default"].weight.copy_(torch.cat([branch.B for branch in branches], 1))
    torch.testing.assert_close(logits(handle.model.eval()), logits(other.eval()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(handle.model.float()), logits(other.float()), rtol=1e-6, atol=1e-6)


def test_generates_with_a_cache() -> None:
    plain = model("qwen").eval()
    handle = cnext.attach_mage(plain, rank=2)
    disturb(handle)
    prompt = torch.arange(3, 9).view(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    apart = plain.generate(prompt, **options)
    handle.merge()
    assert torch.equal(plain.generate(prompt, **options), apart)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_nothing(dropout: float) -> None:
    gradients = []
    for checkpointed in (False, True):
        plain = model("llama").train()
        plain.config.use_cache = False  # which checkpointing would make it, and which decides the last bits
        handle = cnext.attach_mage(plain, rank=2, dropout=dropout, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        disturb(handle)
        if checkpointed:
            newer = getattr(plain, "activation_checkpointing_enable", None)  # transformers 5 has renamed it
            (newer or plain.gradient_checkpointing_enable)({"use_reentrant": False})
        torch.manual_seed(1)
        logits(plain).square().mean().backward()
        gradients.append([p.grad for p in branch_parameters(plain).values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def merged_model() -> tuple[nn.Module, AttachedMage]:
    plain = model("llama").eval()
    handle = cnext.attach_mage(plain, rank=2)
    disturb(handle)
    return plain, handle


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_means_the_same_merged_or_not(saved: bool, into: bool, assign: bool) -> None:
    plain, handle = merged_model()
    expected, state = logits(plain), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    if saved:
        handle.merge()
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
        state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    other = model("llama").eval()
    with torch.no_grad():
        other.lm_head.weight.normal_()
    fresh = cnext.attach_mage(other, rank=2)
    disturb(fresh)
    if into:
        fresh.merge()
    other.load_state_dict(state, assign=assign)
    assert all(layer.merged == into for layer in fresh.layers.values())
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    if into:
        fresh.unmerge()
    assert torch.equal(logits(other), expected)


def test_a_copy_of_a_merged_model_saves_and_loads_alike() -> None:
    plain, handle = merged_model()
    expected, state = logits(plain), {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    handle.merge()
    copied = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.unmerged_weight.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in copied.state_dict().items())
    plain.load_state_dict(copied.state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    layer = next(iter(handle.layers.values()))
    assert layer.state_dict(keep_vars=True)["base.weight"] is layer.unmerged_weight
    assert layer.state_dict(prefix="x.")["x.base.weight"].data_ptr() == layer.unmerged_weight.data_ptr()


def test_what_has_no_effect_on_merged_branches_is_refused() -> None:
    plain, handle = merged_model()
    active = next(iter(handle.layers.values())).active
    handle.merge()
    expected = logits(plain)
    for names in ([], ["text-general"], list(active)[::-1]):
        with pytest.raises(UserError, match=r"activate: the branches are merged into .*call unmerge first"):
            activate(plain, names)
        with pytest.raises(UserError, match="call unmerge first"), activated(plain, names):
            pass
    activate(plain, active)
    with pytest.raises(UserError, match=r"set_trainable: the branches are merged into .* and 11 more"):
        handle.train_on(reads=["text"], writes=["text"])
    assert torch.equal(logits(plain), expected)


def test_branches_that_change_after_a_merge_are_refused() -> None:
    """As where an average is swapped in, or a task ends: the merged weights have the branches from before."""
    plain, handle = merged_model()
    handle.merge()
    with (average := Constant()).task(branch_parameters(plain), steps=1):
        average.update()
        next(iter(average.parameters.values())).data.add_(1.0)  # in place of an optimizer's step
    for call in (lambda: logits(plain), handle.merged):
        with pytest.raises(UserError, match=r"averaged or loaded after they had been merged.*call unmerge, and merge"):
            call()
    handle.unmerge()
    expected = logits(plain)
    handle.merge()
    plain.double().float()
    for each in (plain, copy.deepcopy(plain), handle.merged()):
        torch.testing.assert_close(logits(each), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merged", [False, True])
def test_a_weight_that_is_parametrized_after_attaching_is_not_merged(merged: bool) -> None:
    plain, handle = merged_model()
    expected = logits(plain)
    nn.utils.parametrizations.weight_norm(next(iter(handle.layers.values())).base, "weight")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"a weight that was parametrized after .*remove_parametrizations first"):
        handle.merged() if merged else handle.merge()
    assert not any(layer.merged for layer in handle.layers.values())


def test_merging_changes_all_layers_or_none() -> None:
    _, handle = merged_model()
    names = list(handle.layers)
    last = handle.layers[names[-1]]
    last.merge()
    with pytest.raises(UserError, match=f"merge: the branches of {re.escape(names[-1])} are merged already"):
        handle.merge()
    assert [layer.merged for layer in handle.layers.values()] == [False] * 13 + [True]
    with pytest.raises(UserError, match=r"unmerge: the branches of .* and 10 more are not merged"):
        handle.unmerge()
    last.unmerge()
    last.router = nn.Linear(last.in_features, 4)
    with pytest.raises(UserError, match="are routed by their input"):
        handle.merge()
    assert not any(layer.merged for layer in handle.layers.values())


def test_branches_that_were_detached_cannot_be_merged() -> None:
    _, handle = merged_model()
    handle.detach()
    for call in (handle.merge, handle.unmerge):
        with pytest.raises(UserError, match="the branches of this handle were detached"):
            call()


def test_a_layer_outside_of_the_language_model_is_told_how_to_be_reached() -> None:
    with pytest.raises(UserError, match=r"lm_head: .*outside of its language model, LlamaModel; pass language_model="):
        cnext.attach_mage(model("llama"), targets=("lm_head", "q_proj"))
    whole = model("llama")
    assert "lm_head" in cnext.attach_mage(whole, targets=("lm_head", "q_proj"), language_model=whole).layers
    with pytest.raises(UserError, match=r"fc1: .*outside of its language model"):
        cnext.attach_mage(model("janus"), targets=("fc1",))
