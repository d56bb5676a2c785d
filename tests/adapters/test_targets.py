"""Layers that adapters cannot compute are refused when attaching, and the model stays as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from adapters.test_attach_mage import disturb, logits, model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import cnext
from cnext import adapters
from cnext.errors import UserError


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Quantized(Tensor):
    """A tensor subclass, as quantization libraries have."""


class QuantLinear(nn.Module):
    """As of a quantization library: no torch.nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 32, 32
        self.register_buffer("qweight", torch.zeros(32, 32, dtype=torch.int8))


def weight(layer: nn.Linear, tensor: Tensor) -> None:
    layer.weight = nn.Parameter(tensor, requires_grad=False)


def own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)


def hooked(layer: nn.Linear) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


def meta_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.empty(32, device="meta"))


CHANGED: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "int8": (lambda layer: weight(layer, torch.zeros(32, 32, dtype=torch.int8)), "holds Tensor of torch.int8, as"),
    "float8": (lambda layer: weight(layer, torch.zeros(32, 32).to(torch.float8_e4m3fn)), "holds Tensor of torch.floa"),
    "complex": (lambda layer: weight(layer, torch.zeros(32, 32) + 0j), "holds Tensor of torch.complex64"),
    "subclass": (lambda layer: weight(layer, torch.zeros(32, 32).as_subclass(Quantized)), "holds Quantized of torch"),
    "meta": (lambda layer: layer.to("meta"), "is on the meta device, without values"),
    "meta bias": (meta_bias, "is on the meta device, without values"),
    "sparse": (lambda layer: weight(layer, torch.eye(32).to_sparse()), "has a weight of torch.sparse_coo"),
    "packed": (lambda layer: weight(layer, torch.ones(9, 1)), r"has a weight of .*\(9, 1\); expected .*\(32, 32\)"),
    "sharded": (lambda layer: weight(layer, torch.zeros(0)), r"has a weight of .*\(0,\); expected"),
    "parametrized": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        "has a parametrized weight; call .*remove_parametrizations",
    ),
    "parametrized bias": (
        lambda layer: (meta_bias(layer), setattr(layer, "bias", nn.Parameter(torch.zeros(32))),
                       parametrize.register_parametrization(layer, "bias", Doubled())),
        "has a parametrized weight",
    ),
    "weight norm": (parametrizations.weight_norm, "has a parametrized weight"),
    "spectral norm": (nn.utils.spectral_norm, "computes its weight in a hook"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "computes its weight in a hook"),
    "forward hook": (lambda layer: layer.register_forward_hook(lambda *_: None), "has hooks, which an adapter"),
    "pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda *_: None), "has hooks"),
    "backward hook": (lambda layer: layer.register_full_backward_hook(lambda *_: None), "has hooks"),
    "accelerate": (hooked, "has hooks of accelerate that do more than place its weight"),
    "own forward": (own_forward, "has a forward of its own, set by another library"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_what_an_adapter_cannot_compute_is_refused_and_nothing_changes(case: str) -> None:
    change, message = CHANGED[case]
    plain = model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, for what it replaced by parametrizations
        change(plain.model.layers[1].self_attn.q_proj)
    names = list(plain.state_dict())
    with pytest.raises(UserError, match=rf"cannot be attached: \S*layers.1.self_attn.q_proj {message}"):
        cnext.attach_mage(plain)
    assert list(plain.state_dict()) == names
    assert not adapters.layers(plain)
    assert plain.lm_head.weight.requires_grad


def test_a_layer_of_another_class_among_linear_ones_is_refused() -> None:
    """It would be left out without a word."""
    plain = model("llama")
    plain.model.layers[1].self_attn.q_proj = QuantLinear()
    with pytest.raises(
        UserError, match=r"layers.1.self_attn.q_proj is a \w+\.QuantLinear; adapters need a torch.nn.Linear"
    ):
        cnext.attach_mage(plain)
    for layer in plain.model.layers:
        layer.self_attn.q_proj = QuantLinear()
    with pytest.raises(
        UserError, match=r"named q_proj \(there is \w+\.QuantLinear of that name\); its linear layers are"
    ):
        cnext.attach_mage(plain)


def test_a_convolution_of_a_targets_name_is_no_linear_layer() -> None:
    net = nn.ModuleDict({"patches": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)}),
                         "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})  # fmt: skip
    adapters.attach(net, ("proj",), {"a": 2})
    assert list(adapters.layers(net)) == ["block.proj"]


def test_all_layers_and_reasons_are_named_at_once() -> None:
    plain = model("llama")
    for layer in plain.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)
    prune.identity(plain.model.layers[0].mlp.up_proj, "weight")
    with pytest.raises(
        UserError, match=r"0.self_attn.q_proj, layers.1.self_attn.q_proj has hooks, .*; layers.0.mlp.up_p"
    ):
        cnext.attach_mage(plain)


@pytest.mark.parametrize(
    ("net", "target"),
    [(nn.MultiheadAttention(8, 2), "out_proj"), (nn.TransformerEncoderLayer(8, 2, 16), "linear1")],
    ids=["attention", "encoder layer"],
)
def test_layers_whose_weight_is_read_without_a_call_are_refused(net: nn.Module, target: str) -> None:
    with pytest.raises(UserError, match=rf"{target} is part of a \w+, which reads its weight without calling it"):
        adapters.attach(nn.ModuleList([net]), (target,), {"a": 2})


def test_a_layer_without_a_shape_is_refused() -> None:
    net = nn.ModuleDict({"q_proj": nn.LazyLinear(4)})
    with pytest.raises(UserError, match="q_proj has no shape yet; run the model once first"):
        adapters.attach(net, ("q_proj",), {"a": 2})


@torch.no_grad()
def test_a_model_that_accelerate_has_placed_without_offloading_computes_the_same() -> None:
    from accelerate import dispatch_model

    placed = dispatch_model(model("llama").eval(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    plain = model("llama").eval()
    assert hasattr(placed.model.layers[0].self_attn.q_proj, "_hf_hook")
    for net in (placed, plain):
        handle = cnext.attach_mage(net, dropout=0.0)
        torch.manual_seed(1)
        disturb(handle)
    torch.testing.assert_close(logits(placed), logits(plain))


def test_sizes_are_counted_on_the_meta_device_and_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        plain = model("llama")
    with pytest.raises(UserError, match="on the meta device, without values; load the weights first"):
        cnext.attach_mage(plain)
    adapters.attach(plain, ("q_proj",), {"a": 2})
    assert sum(p.numel() for p in adapters.branch_parameters(plain).values()) == 2 * 2 * (32 + 32)


@torch.no_grad()
def test_cross_attention_with_keys_of_another_width() -> None:
    """Read from an encoder, as in TrOCR."""
    import transformers

    config = transformers.TrOCRConfig(
        vocab_size=64, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        cross_attention_hidden_size=48, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    decoder = transformers.TrOCRForCausalLM(config).eval()
    given = {"input_ids": torch.arange(3, 9)[None], "encoder_hidden_states": torch.randn(1, 5, 48)}
    before = decoder(**given).logits
    handle = cnext.attach_mage(decoder, targets=("q_proj", "k_proj", "v_proj", "out_proj"), dropout=0.0)
    assert torch.equal(decoder(**given).logits, before)
    disturb(handle)
    apart = decoder(**given).logits
    assert not torch.allclose(apart, before, atol=1e-3)
    handle.merge()
    torch.testing.assert_close(decoder(**given).logits, apart, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_of_several_dtypes_side_by_side_under_autocast() -> None:
    results = []
    for shared in (adapters.SHARED, ()):
        plain = model("llama").eval()
        plain.model.layers[0].self_attn.k_proj.bfloat16()
        handle = cnext.attach_mage(plain, dropout=0.0, shared=shared, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        disturb(handle)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(logits(plain).float())
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


def t5(projection: str) -> nn.Module:
    import transformers as t

    config = t.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj=projection,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return t.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_a_model_that_asks_for_the_dtype_of_a_weight_is_computed(projection: str) -> None:
    net, ids = t5(projection), torch.arange(3, 11)[None]
    before = net(input_ids=ids, labels=ids).logits
    handle = cnext.attach_mage(net, targets=("wo", "q"), language_model=net, rank=2)
    torch.testing.assert_close(net(input_ids=ids, labels=ids).logits, before)
    disturb(handle)
    branched = net(input_ids=ids, labels=ids).logits
    assert not torch.allclose(branched, before)
    handle.merge()
    torch.testing.assert_close(net(input_ids=ids, labels=ids).logits, branched, rtol=1e-4, atol=1e-4)


class Reading(nn.Module):
    """Calls proj and down, and computes with the weights of raw, scaled and inner.deep."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.down, self.raw, self.scaled, self.started = (nn.Linear(8, 8) for _ in range(5))
        self.inner = nn.ModuleDict({"deep": nn.Linear(8, 8)})
        nn.init.ones_(self.started.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.proj(x).to(self.down.weight.dtype))
        if self.proj.weight is not None and x.shape[-1] == self.proj.weight.shape[0]:
            x = x @ self.raw.weight.t() + self.started(x)
        return self.fast_forward(x)

    def fast_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.scaled.weight) + nn.functional.linear(x, self.inner.deep.weight)


@pytest.mark.parametrize("target", ["raw", "scaled", "deep"])
def test_layers_that_a_forward_computes_by_itself_are_refused(target: str) -> None:
    net = nn.Sequential(Reading())
    with pytest.raises(UserError, match=f"{target} is part of a Reading, which reads its weight without calling it"):
        adapters.attach(net, ("proj", target), {"lora": 2})


def test_layers_whose_weights_say_a_dtype_or_size_alone_are_taken() -> None:
    net = adapters.attach(nn.Sequential(Reading()), ("proj", "down", "started"), {"lora": 2})
    layer = adapters.layers(net)["0.proj"]
    assert (layer.in_features, layer.out_features) == (8, 8)
    assert layer.bias is layer.base.bias
    net(torch.ones(1, 8))


def test_a_weight_without_its_branches_is_not_computed_with() -> None:
    net = adapters.attach(nn.Sequential(nn.Linear(8, 4)), ("0",), {"lora": 2})
    layer, x = adapters.layers(net)["0"], torch.ones(3, 8)
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape, weight.size(0), weight.dim()) == (
        torch.float32, x.device, (4, 8), 4, 2,
    )  # fmt: skip
    assert "ReadOnlyWeight" in repr(weight)
    assert isinstance(weight, nn.Parameter)
    assert (len(weight), weight.grad, weight.is_floating_point(), weight.element_size()) == (4, None, True, 4)
    assert (weight.data.dtype, weight.detach().shape, weight.requires_grad) == (torch.float32, (4, 8), False)
    assert layer.base.weight.sum().isfinite(), "the way to the values, without the branches"
    uses = (
        lambda: x @ weight.t(), lambda: x @ weight.T, lambda: nn.functional.linear(x, weight), lambda: 2 * weight,
        lambda: weight[0], lambda: weight.data @ x.T, lambda: weight.float(), lambda: weight.sum().item(),
        lambda: weight.copy_(torch.zeros(4, 8)), lambda: weight.numpy(), lambda: torch.equal(weight, weight),
        lambda: weight.detach().sum(), lambda: setattr(weight, "data", x),
    )  # fmt: skip
    for use in uses:
        with pytest.raises(UserError, match="the weight of a layer that has branches is read"):
            use()
    layer.merge()
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), net(x))


class Bloom(nn.Module):
    """As BLOOM's projections: the weight is read only where a setting says so."""

    def __init__(self, exact: bool) -> None:
        super().__init__()
        self.dense, self.slow_but_exact, self.slices = nn.Linear(8, 8), exact, 2

    def forward(self, x: Tensor) -> Tensor:
        if self.slices > 1 and self.slow_but_exact:
            return x @ self.dense.weight.t()
        return self.dense(x)


def test_a_read_that_a_setting_turns_on_is_refused_where_it_happens() -> None:
    for exact in (False, True):
        net = adapters.attach(nn.Sequential(Bloom(exact)), ("dense",), {"lora": 2})
        if exact:
            with pytest.raises(UserError, match=r"the weight of a layer that has branches is read \(t\)"):
                net(torch.ones(1, 8))
        else:
            assert net(torch.ones(1, 8)).shape == (1, 8)


def test_bloom_is_taken() -> None:
    import transformers as t

    net = t.BloomForCausalLM(t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)).eval()
    ids = torch.arange(3, 11)[None]
    before = net(input_ids=ids).logits
    handle = cnext.attach_mage(net, targets=("query_key_value", "dense", "dense_4h_to_h"), rank=2)
    torch.testing.assert_close(net(input_ids=ids).logits, before)
    disturb(handle)
    branched = net(input_ids=ids).logits
    assert not torch.allclose(branched, before)
    handle.merge()
    torch.testing.assert_close(net(input_ids=ids).logits, branched, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["dt_proj", "x_proj"])
def test_mamba_computes_with_weights_of_its_projections(target: str) -> None:
    import transformers as t

    net = t.MambaForCausalLM(t.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match=f"{target} is part of a MambaMixer"):
        cnext.attach_mage(net, targets=("in_proj", target), language_model=net)
    assert cnext.attach_mage(net, targets=("in_proj",), language_model=net).layers
