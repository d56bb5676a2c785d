"""Models whose layers have other names, or are no torch.nn.Linear: `targets="all-linear"`, Conv1D, experts."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from adapters.test_attach_mage import disturb, logits, model
from torch import Tensor, nn

import cnext
from cnext import adapters
from cnext.adapters.exchange_peft import read_peft, save_peft
from cnext.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(3, 19).view(2, 8)
EXPECTED = {
    "bert": (12, "dense key query value", "bert.encoder"),
    "opt": (14, "fc1 fc2 k_proj out_proj project_in project_out q_proj v_proj", "model.decoder"),
    "gpt2": (8, "c_attn c_fc c_proj", "transformer.h"),
    "phi3": (8, "down_proj gate_up_proj o_proj qkv_proj", "model.layers"),
    "neox": (8, "dense dense_4h_to_h dense_h_to_4h query_key_value", "gpt_neox.layers"),
    "t5": (16, "k o q v wi wo", ""),
    "bart": (16, "fc1 fc2 k_proj out_proj q_proj v_proj", "model"),
}
every_family = pytest.mark.parametrize("name", EXPECTED)


def family(name: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if name == "bert":
        return t.BertForMaskedLM(t.BertConfig(**SIZES)).eval()
    if name == "opt":
        config = t.OPTConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=24,
        )  # fmt: skip
        return t.OPTForCausalLM(config).eval()
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        return t.GPT2LMHeadModel(config).eval()
    if name == "phi3":
        return t.Phi3ForCausalLM(t.Phi3Config(**SIZES)).eval()
    if name == "neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)).eval()
    if name == "t5":
        config = t.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
        )  # fmt: skip
        return t.T5ForConditionalGeneration(config).eval()
    config = t.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    return t.BartForConditionalGeneration(config).eval()


def out(net: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if net.config.is_encoder_decoder else {}
    return net(input_ids=IDS, **more).logits


@every_family
@torch.no_grad()
def test_every_linear_layer_of_the_language_model_but_the_head(name: str) -> None:
    net = family(name)
    before, count = out(net), EXPECTED[name][0]
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    handle = cnext.attach_mage(net, targets="all-linear", rank=2)
    assert len(handle.layers) == count
    assert " ".join(sorted({one.rpartition(".")[2] for one in handle.layers})) == EXPECTED[name][1]
    assert all(one.startswith(EXPECTED[name][2]) for one in handle.layers)
    torch.testing.assert_close(out(net), before)
    disturb(handle)
    apart = out(net)
    assert not torch.allclose(apart, before, atol=1e-3)
    handle.merge()
    torch.testing.assert_close(out(net), apart, rtol=1e-4, atol=1e-4)
    handle.unmerge()
    assert torch.equal(out(net), apart)
    handle.detach()
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(out(net), before)


@every_family
def test_all_linear_means_what_it_means_in_peft(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(family(name), LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2"))
    found = {one.removeprefix("base_model.model.") for one, m in theirs.named_modules() if hasattr(m, "lora_A")}
    ours = family(name)
    adapters.attach(ours, "all-linear", {"lora": 2})
    assert set(adapters.layers(ours)) == found
    assert not any(isinstance(m, adapters.AdapterLinear) for m in [ours.get_output_embeddings()])


@every_family
def test_a_default_that_finds_no_standard_names_tells_of_all_linear(name: str) -> None:
    with pytest.raises(UserError, match=r'no linear layer .* is named .*gate_proj.*, or targets="all-linear" for all'):
        cnext.attach_mage(family(name))


def test_all_linear_leaves_the_vision_tower_and_tied_heads_out() -> None:
    net = model("janus")
    names = set(cnext.attach_mage(net, targets="all-linear").layers)
    assert names == set(cnext.attach_mage(model("janus")).layers)
    tied = nn.ModuleDict({"words": nn.Embedding(16, 8), "proj": nn.Linear(8, 8), "out": nn.Linear(8, 16, bias=False)})
    tied["out"].weight = tied["words"].weight
    assert list(adapters.layers(adapters.attach(tied, "all-linear", {"lora": 2}))) == ["proj"]
    with pytest.raises(UserError, match="all-linear: the model has no linear layer but output heads"):
        adapters.attach(nn.ModuleDict({"words": tied["words"], "out": tied["out"]}), "all-linear", {"lora": 2})


def test_an_encoder_of_sound_is_no_part_of_the_language_model() -> None:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    layers = cnext.attach_mage(t.WhisperForConditionalGeneration(config), targets="all-linear").layers
    assert len(layers) == 10
    assert all(name.startswith("model.decoder.layers") for name in layers)


def test_what_all_linear_cannot_take_is_named() -> None:
    import transformers as t

    mamba = t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"dt_proj.* is part of a MambaMixer, .*; name the other layers as targets"):
        cnext.attach_mage(mamba, targets="all-linear", language_model=mamba)
    net = model("llama")
    net.model.layers[0].mlp.up_proj = nn.ModuleDict()
    net.model.layers[0].mlp.up_proj.in_features = 32
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj is a torch.ModuleDict; adapters need a torch.nn.Linear"):
        cnext.attach_mage(net, targets="all-linear")


def test_targets_that_are_a_text_are_refused() -> None:
    for attach in (cnext.attach_mage, lambda net, targets: adapters.attach(net, targets, {"lora": 2})):
        with pytest.raises(UserError, match=r'targets must be a list of names, or "all-linear"; got the text .q_proj.'):
            attach(model("llama"), targets="q_proj")


def test_targets_may_have_more_of_the_path() -> None:
    net = model("llama")
    handle = cnext.attach_mage(net, targets=("0.self_attn.q_proj", "mlp.up_proj"))
    assert set(handle.layers) == {
        f"model.layers.{one}" for one in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.mlp.up_proj")
    }
    with pytest.raises(UserError, match=r"no linear layer of the model is named elf.q_proj"):
        cnext.attach_mage(model("llama"), targets=("elf.q_proj",))


@pytest.mark.parametrize("second", [cnext.adapters.mage.TARGETS, ("k_proj",), "all-linear"], ids=str)
def test_attaching_twice_is_refused(second: object) -> None:
    net = model("llama")
    cnext.attach_mage(net, targets=("q_proj",))
    with pytest.raises(UserError, match=r"^the model has adapters already; detach them first$"):
        cnext.attach_mage(net, targets=second)
    if "k_proj" not in second:
        with pytest.raises(UserError, match=r"^the model has adapters already \(.*q_proj\); detach them first$"):
            adapters.attach(net, second, {"lora": 2})
    with pytest.raises(UserError, match=r"^the model has adapters already \(.*q_proj\); detach them first$"):
        adapters.attach(net, ("q_proj", "v_proj"), {"lora": 2})


def test_all_linear_does_not_reach_into_adapters_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="the model has adapters of PEFT; merge them or unload them first"):
        cnext.attach_mage(net, targets="all-linear", language_model=net)


def test_no_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r'^targets is empty; expected names of linear layers, or "all-linear"$'):
        cnext.attach_mage(model("llama"), targets=[])


def test_a_text_in_place_of_a_list_of_modalities_or_branches() -> None:
    handle = cnext.attach_mage(model("llama"))
    with pytest.raises(UserError, match=r"^reads must be a list of modalities, got the text 'text'; write .'text'.$"):
        handle.train_on(reads="text", writes=["text"])
    with pytest.raises(UserError, match=r"^writes must be a list of modalities, got the text 'image'; write"):
        handle.train_on(reads=["text"], writes="image")
    with pytest.raises(UserError, match=r"^unknown modality .?smell.?; valid: text, image$"):
        handle.train_on(reads=["smell"], writes=[])
    with pytest.raises(UserError, match=r"^branches must be a list of names, got the text 'text-general'; valid: "):
        adapters.activate(handle.model, "text-general")
    with pytest.raises(UserError, match=r"^unknown branch 'nose'; valid: text-general, image-"):
        adapters.activate(handle.model, ["nose"])


@torch.no_grad()
def test_gpt2_agrees_with_stock_peft_merged_and_not(tmp_path: Path) -> None:
    """Its weights are (in, out)."""
    from peft import PeftModel

    net = family("gpt2")
    handle = cnext.attach_mage(net, targets=("c_attn", "c_fc"), rank=2, scale=0.5)
    layer = handle.layers["transformer.h.0.attn.c_attn"]
    assert (layer.in_features, layer.out_features, tuple(layer.weight.shape)) == (32, 96, (32, 96))
    disturb(handle)
    expected = logits(net)
    for one in (False, True):
        save_peft(net, tmp_path / str(one), one)
        assert list(read_peft(tmp_path / str(one)).pairs) == list(handle.layers)
    stock = PeftModel.from_pretrained(family("gpt2"), tmp_path / "True").eval()
    torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    wide = layer.base.weight.double()
    for branch in layer.branches.values():
        wide += 0.5 * (branch.B.double() @ branch.A.double()).T
    layer.merge()
    torch.testing.assert_close(layer.weight.double(), wide, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.25}, {"dropout": 0.25, "independent": True}], ids=str)
def test_the_gradients_of_a_conv1d_are_those_of_the_linear_layer(options: dict) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    results, linear = [], nn.Linear(40, 24)
    conv = Conv1D(24, 40)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    for base in (linear, conv):
        net = nn.ModuleDict({"proj": base})
        adapters.attach(net, ("proj",), {"a": 4, "b": 2}, generator=torch.Generator().manual_seed(0), **options)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.branch_parameters(net).values():
                parameter.normal_()
        x = torch.randn(70, 40, requires_grad=True)
        y = net["proj"](x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in adapters.branch_parameters(net).values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def mixture(name: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2}
    if name == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_local_experts=4)).eval()
    config = t.Qwen2MoeConfig(
        **sizes, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2
    )  # fmt: skip
    return t.Qwen2MoeForCausalLM(config).eval()


def experts_are_layers(net: nn.Module) -> bool:
    """As before transformers 5."""
    return not any(p.ndim == 3 for p in net.parameters())


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_that_are_no_layers_are_not_left_out_in_silence(name: str) -> None:
    net = mixture(name)
    if experts_are_layers(net):
        return
    names = list(net.state_dict())
    left = r"layers.0.mlp.experts.gate_up_proj, layers.0.mlp.experts.down_proj, layers.1.mlp.experts.gate_up_proj and 1"
    with pytest.raises(UserError, match=rf"gate_proj, up_proj, down_proj: also of experts .*: {left} more; leave"):
        cnext.attach_mage(net)
    assert list(net.state_dict()) == names
    with pytest.warns(UserWarning, match=rf'"all-linear" leaves experts without branches: .*: {re.escape(left)} more'):
        handle = cnext.attach_mage(net, targets="all-linear")
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {one.rpartition(".")[2] for one in handle.layers}
    handle.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cnext.attach_mage(net, targets=("q_proj", "k_proj", "v_proj", "o_proj")).layers) == 8


def test_a_shared_expert_by_its_path() -> None:
    net = mixture("qwen2-moe")
    handle = cnext.attach_mage(net, targets=("o_proj", "shared_expert.up_proj", "shared_expert.down_proj"))
    assert len(handle.layers) == 6
    disturb(handle)
    apart = logits(net)
    handle.merge()
    torch.testing.assert_close(logits(net), apart, rtol=1e-4, atol=1e-4)


def test_dropout_is_off_by_default_everywhere() -> None:
    import inspect

    from cnext.methods.lora import Lora

    for function in (cnext.attach_mage, adapters.attach, adapters.AdapterLinear):
        assert inspect.signature(function).parameters["dropout"].default == 0.0
    assert Lora.dropout == 0.0
