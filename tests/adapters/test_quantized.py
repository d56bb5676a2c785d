"""Branches beside layers that bitsandbytes and torchao have quantized, and that accelerate has offloaded."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path

import pytest
import torch
from adapters.test_attach_mage import disturb
from safetensors.torch import load_file
from torch import Tensor, nn

import cnext
from cnext import adapters, ops
from cnext.adapters.exchange import branches_of, merged, put_branches
from cnext.adapters.exchange_peft import save_peft
from cnext.errors import UserError
from cnext.ops import branches_reference

BITSANDBYTES, TORCHAO = ("nf4", "fp4", "int8"), ("int8 weights", "float8 weights")
KINDS = BITSANDBYTES + TORCHAO
every_kind = pytest.mark.parametrize("kind", KINDS)
RANKS = {"one": 4, "two": 2, "three": 3}
IDS = torch.arange(3, 19).view(2, 8)


def quantized(layer: nn.Linear, kind: str) -> nn.Module:
    """The layer as a library quantizes it."""
    if kind in TORCHAO:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        net = nn.Sequential(layer)
        quantize_(net, Int8WeightOnlyConfig() if kind == "int8 weights" else Float8WeightOnlyConfig())
        return net[0]
    import bitsandbytes as bnb

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=layer.weight.dtype, quant_type=kind)
    made.load_state_dict(layer.state_dict())
    # Its training path: the other one packs the weight again on some processors, with other roundings.
    return made.to(layer.weight.dtype).to("cpu").train()


def dense(layer: nn.Module) -> Tensor:
    """W of a quantized layer, float64."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    if hasattr(weight, "SCB"):
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.double() * scale.double()[:, None] / 127
    return weight.dequantize().double()


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each call that it casts to float16


@every_kind
@pytest.mark.parametrize("options", [{}, {"dropout": 0.25}, {"dropout": 0.25, "independent": True}], ids=str)
@pytest.mark.parametrize("routed", [False, True], ids=["", "routed"])
def test_outputs_and_gradients_agree_with_the_dequantized_weight(kind: str, options: dict, routed: bool) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": quantized(nn.Linear(64, 48), kind)})
    own = copy.deepcopy(net["proj"])
    layer = adapters.layers(adapters.attach(net, ("proj",), RANKS, scale=0.5, **options))["proj"].train()
    x, dy = torch.randn(2, 7, 64, requires_grad=True), torch.randn(2, 7, 48)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(net).values():
            parameter.normal_(std=0.3)
    if routed:
        layer.router = nn.Linear(64, 3)
    torch.manual_seed(5)
    y = layer(x)
    assert ops.last_path("lora_branches") == "plain"
    y.backward(dy)
    assert ops.last_path("lora_branches_backward") == "plain"

    seed = None
    if options:
        torch.manual_seed(5)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    wide = x.detach().double().requires_grad_(True)
    pairs = [(b.A.detach().double().requires_grad_(True), b.B.detach().double().requires_grad_(True))
             for b in layer.branches.values()]  # fmt: skip
    routing = copy.deepcopy(layer.router).double()(wide) if routed else None
    weight, bias = dense(own), own.bias.detach().double()
    (expected,) = branches_reference.lora_branches(
        wide, [weight], [bias], [[a for a, _ in pairs]], [[b for _, b in pairs]], scale=0.5, seed=seed,
        routing=routing, **options,
    )  # fmt: skip
    expected.backward(dy.double())
    # LLM.int8 quantizes x too; its gradient is of 16 bits.
    loose = {"rtol": 0.02, "atol": 0.05} if kind == "int8" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **loose)
    torch.testing.assert_close(x.grad.double(), wide.grad, **loose)
    for branch, (a, b) in zip(layer.branches.values(), pairs, strict=True):
        assert branch.A.dtype == torch.float32
        torch.testing.assert_close(branch.A.grad.double(), a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(branch.B.grad.double(), b.grad, rtol=1e-4, atol=1e-4)
    layer.active = ()
    torch.testing.assert_close(layer(x), own(x), rtol=0, atol=0)


@every_kind
def test_in_bfloat16_the_parameters_are_float32_and_the_products_are_not(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"proj": quantized(nn.Linear(64, 48, dtype=torch.bfloat16), kind)})
    adapters.attach(net, ("proj",), RANKS)
    parameters = adapters.set_trainable(net, ["two"])
    with torch.no_grad():
        for parameter in adapters.branch_parameters(net).values():
            parameter.normal_(std=0.1)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = net["proj"](x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert {p.dtype for p in parameters.values()} == {p.grad.dtype for p in parameters.values()} == {torch.float32}
    frozen = net["proj"].base(x)
    added = sum(x.double() @ b.A.double().T @ b.B.double().T for b in net["proj"].branches.values())
    torch.testing.assert_close(y.double(), frozen.double() + added, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert net["proj"](x).dtype == torch.bfloat16
    for parameter in parameters.values():  # as SFTTrainer does beside a quantized model
        parameter.grad, parameter.data = None, parameter.data.bfloat16()
    moved = net["proj"](x)
    moved.sum().backward()
    assert {p.grad.dtype for p in parameters.values()} == {torch.bfloat16}
    torch.testing.assert_close(moved, y, rtol=0.02, atol=0.05)


def llama(folder: Path) -> Path:
    import transformers as t

    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    t.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def loaded(folder: Path, kind: str | None) -> nn.Module:
    """As users load a quantized model; None: dense."""
    import transformers as t

    if kind in TORCHAO:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = t.TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8 weights" else Float8WeightOnlyConfig())
    elif kind == "int8":
        config = t.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind) if kind else None
    options = {} if kind is None else {"quantization_config": config}
    return t.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
@every_kind
def test_a_quantized_model_is_trained_and_its_branches_are_stock_pefts(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    net = loaded(llama(tmp_path / "model"), kind)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = net(input_ids=IDS).logits
    handle = cnext.attach_mage(net, rank=2)
    assert len(handle.layers) == 14
    torch.testing.assert_close(net(input_ids=IDS).logits, before)
    assert adapters.joined(net), "q, k and v are joined, and are each computed by itself"
    parameters = handle.train_on(reads=["text"], writes=["text"])
    optimizer, losses = torch.optim.AdamW(parameters.values(), lr=0.01), []
    for _ in range(4):
        loss = net(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    trained = net(input_ids=IDS).logits
    save_peft(net, tmp_path / "adapter", one=True)
    learnt = branches_of(net)
    with pytest.raises(UserError, match=r"merge: the branches of \S+q_proj, .* and 11 more are beside a weight that"):
        handle.merge()
    layer = next(iter(handle.layers.values()))
    with pytest.raises(UserError, match="merge: the branches are beside a weight that is quantized or offloaded"):
        layer.merge()
    with pytest.raises(UserError, match=r"merge: the branches of \S+ are beside a weight"), merged(net):
        pass
    assert not any(layer.merged for layer in handle.layers.values())
    # In another model: what is learnt, merged into the weights before quantization.
    whole = loaded(tmp_path / "model", None)
    other = cnext.attach_mage(whole, rank=2)
    put_branches(whole, learnt)
    apart = whole(input_ids=IDS).logits
    other.merge()
    torch.testing.assert_close(whole(input_ids=IDS).logits, apart, rtol=1e-4, atol=1e-4)
    assert handle.detach() is net
    torch.testing.assert_close(net(input_ids=IDS).logits, before)
    assert all(torch.equal(dequantized(t), dequantized(state[name])) for name, t in net.state_dict().items())
    stock = PeftModel.from_pretrained(loaded(tmp_path / "model", kind), tmp_path / "adapter")
    torch.testing.assert_close(stock.train()(input_ids=IDS).logits, trained, rtol=1e-4, atol=1e-4)


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


@every_kind
def test_the_trainer_of_transformers_trains_branches_beside_quantized_weights(kind: str, tmp_path: Path) -> None:
    import transformers as t

    net = loaded(llama(tmp_path / "model"), kind)
    handle = cnext.attach_mage(net, rank=2)
    before = {name: p.clone() for name, p in net.named_parameters() if not hasattr(type(p), "__tensor_flatten__")}
    trained = handle.train_on(reads=["text"], writes=["image"])
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "save_strategy": "no"}
    arguments = t.TrainingArguments(tmp_path / "out", use_cpu=True, bf16=True, disable_tqdm=True, **options)
    t.Trainer(net, arguments, train_dataset=Sentences()).train()
    changed = {name for name, p in net.named_parameters() if name in before and not torch.equal(p, before[name])}
    # A has no gradient as long as B is zero, and it is not at the second step.
    expected = {re.sub(r"\.((text-general|image-expert)\.[AB])$", r".branches.\1", name) for name in trained}
    assert changed == expected
    assert len(changed) == 56
    assert not net.is_quantized
    assert handle.detach().is_quantized


@every_kind
def test_saving_leaves_a_quantized_model_as_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even asked for its state, which changes weights of 4 bits on a CPU."""
    net = loaded(llama(tmp_path / "model"), kind).eval()
    handle = cnext.attach_mage(net, rank=2)
    handle.train_on(reads=["text"], writes=["text"])
    before = net(input_ids=IDS).logits

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the whole state is asked for")

    with monkeypatch.context() as patched:
        patched.setattr(type(net), "state_dict", asked)
        net.save_pretrained(tmp_path / "saved")
        state = load_file(tmp_path / "saved" / "model.safetensors")
        assert not net.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(net(input_ids=IDS).logits, before)
    other = loaded(tmp_path / "model", kind)
    cnext.load(other, tmp_path / "saved")
    torch.testing.assert_close(other.eval()(input_ids=IDS).logits, before)
    with torch.no_grad():
        net(input_ids=IDS)
    handle.save_pretrained(tmp_path / "packed")


def dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if hasattr(type(tensor), "__tensor_flatten__") else tensor


@every_kind
def test_the_weight_of_a_quantized_layer_is_asked_and_not_computed_with(kind: str) -> None:
    net = nn.ModuleDict({"proj": quantized(nn.Linear(64, 48), kind)})
    base = net["proj"]
    layer = adapters.layers(adapters.attach(net, ("proj",), RANKS))["proj"]
    weight = layer.weight
    assert (weight.dtype, weight.shape, weight.device) == (base.weight.dtype, base.weight.shape, base.weight.device)
    assert isinstance(weight, nn.Parameter)
    with pytest.raises(UserError, match="the weight of a layer that has branches is read"):
        nn.functional.linear(torch.ones(2, 64), weight)
    assert (layer.in_features, layer.out_features) == (64, 48)
    assert repr(layer)


@pytest.mark.parametrize("kind", ["nf4", "int8 weights"])
def test_a_quantized_layer_beside_dense_ones(kind: str) -> None:
    """Of q, k and v one is quantized: each is computed by itself, and all right."""
    import transformers as t
    from backbones.small_folders import LANGUAGE

    torch.manual_seed(0)
    net = t.LlamaForCausalLM(t.LlamaConfig(**LANGUAGE | {"vocab_size": 64}))
    attention = net.model.layers[0].self_attn
    attention.k_proj = quantized(attention.k_proj, kind)
    before = net(input_ids=IDS).logits
    handle = cnext.attach_mage(net, rank=2)
    torch.testing.assert_close(net(input_ids=IDS).logits, before)
    x = torch.randn(3, 32)
    attention.k_proj(x)
    assert ops.last_path("lora_branches") == "plain"
    attention.q_proj(x)
    assert ops.last_path("lora_branches") != "plain"
    with pytest.raises(UserError, match=r"merge: the branches of layers.0.self_attn.k_proj are|k_proj are beside"):
        handle.merge()
    assert not any(layer.merged for layer in handle.layers.values()), "none or all"


def test_a_quantized_model_compiles() -> None:
    net = nn.Sequential(quantized(nn.Linear(64, 48), "int8 weights"))
    adapters.attach(net, ("0",), RANKS)
    with torch.no_grad():
        for parameter in adapters.branch_parameters(net).values():
            parameter.normal_(std=0.1)
    x = torch.randn(3, 64)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_other_layers_of_bitsandbytes_are_refused() -> None:
    import bitsandbytes as bnb

    net = nn.ModuleDict({"proj": bnb.nn.OutlierAwareLinear(64, 48)})
    with pytest.raises(UserError, match="proj is a OutlierAwareLinear; adapters need the plain weight"):
        adapters.attach(net, ("proj",), RANKS)


def test_offloaded_layers_are_computed_and_not_merged() -> None:
    from accelerate import cpu_offload
    from adapters.test_attach_mage import logits, model

    results = []
    for offloaded in (False, True):
        net = model("llama")
        if offloaded:
            net = cpu_offload(net, execution_device="cpu")
            assert net.model.layers[0].mlp.up_proj.weight.is_meta
        handle = cnext.attach_mage(net, rank=2, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        disturb(handle)
        parameters = handle.train_on(reads=["text"], writes=["text", "image"])
        y = logits(net)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in parameters.values())])
        assert (ops.last_path("lora_branches") == "plain") == offloaded
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match=re.escape("and 11 more are beside a weight that is quantized or offloaded")):
        handle.merge()
    assert net.model.layers[0].mlp.up_proj.weight.is_meta
    with pytest.raises(UserError, match="the weight of a layer that has branches is read"):
        net.model.layers[0].mlp.up_proj.weight.sum()
