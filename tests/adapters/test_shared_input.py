"""Layers with a shared input are computed together, with the outputs that they have separately."""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import linecache
import pickle
import textwrap
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils.checkpoint import checkpoint

from cnext import adapters, ops
from cnext.adapters.shared_input import together

QKV = ("q_proj", "k_proj", "v_proj")
TARGETS = (*QKV, "o_proj")


class Attention(nn.Module):
    """Three projections of one input, of unequal widths as in grouped-query attention, and one of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4, bias=False)
        self.o_proj = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.q_proj(x) * torch.cat([k, v], -1))


class Three(nn.Module):
    """Three projections, and a helper that changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 4) for _ in range(3))

    def change(self, x: Tensor) -> None:
        x.mul_(2)


class Reads(Three):
    def forward(this, x: Tensor) -> tuple[Tensor, ...]:
        q = this.q_proj(x).view(*x.shape[:-1], 2, 2)
        assert_width(x.size(-1), x.dim())
        k = this.k_proj(x).to(x.dtype)
        x = this.v_proj(x)
        return q, k, x


def assert_width(width: int, dims: int) -> None:
    assert (width, dims) == (12, 3)


BETWEEN = "q = self.q_proj(x)\n{}\nreturn q, self.k_proj(x)"
UNSAFE = {
    "reassigned": BETWEEN.format("x = x + 1"),
    "augmented": BETWEEN.format("x += 1"),
    "changed by a method": BETWEEN.format("x.add_(1)"),
    "changed by an index": BETWEEN.format("x[0] = 1"),
    "changed by a function": BETWEEN.format("self.change(x)"),
    "changed in one statement": "return self.change(x), self.q_proj(x), self.k_proj(x)",
    "changed by another name": "other = x\n" + BETWEEN.format("other += 1"),
    "changed in a block": BETWEEN.format("if q.dim():\n    x = x + 1"),
    "changed by a nested function": "def later():\n    x.add_(1)\n" + BETWEEN.format("later()"),
    "not a variable": "pair = [x, x]\nreturn self.q_proj(pair[0]), self.k_proj(pair[0]), self.v_proj(*[x])",
    "another layer": BETWEEN.format("self.k_proj = copy.deepcopy(self.k_proj)"),
    "left": BETWEEN.format("if q.dim() == 3:\n    return (q,)"),
    "conditional": """\
q = self.q_proj(x)
k = self.k_proj(x) if q.dim() == 0 else q
last = q.dim() == 0 and self.v_proj(x)
return q, k, *[self.v_proj(x) for _ in range(1)], q if last is False else k""",
    "private": "self.__x = x.shape\nreturn self.q_proj(x), self.k_proj(x)",
}
"""Bodies of a forward pass whose calls must not be joined."""


def written(file: Path, body: str) -> type[nn.Module]:
    """A class whose forward pass has this body, imported from a file."""
    text = f"import copy\n\nclass Mixin:\n    def forward(self, x):\n{textwrap.indent(body, ' ' * 8)}\n"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("written", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return type("Written", (module.Mixin, Three), {})


class Outside(Three):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k = self.q_proj(x), self.k_proj(x)
        return q, k, offset(x)


def offset(x: Tensor) -> Tensor:
    return x + 1


def traced(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Three):
    @traced
    @torch.no_grad()
    def forward(self, x: Tensor, *, factor: float = 2.0) -> tuple[Tensor, ...]:
        """Three results."""
        return self.q_proj(x) * factor, self.k_proj(x), self.v_proj(x)


class DecoratedLater(Three):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


DecoratedLater.forward = traced(DecoratedLater.forward)


def enclosing(factor: float) -> type[nn.Module]:
    class Enclosed(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q_proj(x) * factor, self.k_proj(x)

    return Enclosed


class Cross(nn.Module):
    """Attention as encoder-decoders write it: k and v read the encoder's output, of another width, or x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 4), nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor, encoded: Tensor | None = None, cache: list | None = None) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        current = x if encoded is None else encoded
        if cache:
            k, v = cache
        else:
            k = self.k_proj(current)
            v = self.v_proj(current)
        return q, k, v


class Raising(Three):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        k = self.k_proj(x)
        raise ValueError("here")
        return q, k


def adapted(model: nn.Module, shared: tuple = adapters.SHARED, dropout: float = 0.0, targets: tuple = QKV) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    adapters.attach(model, targets, {"a": 2, "b": 3}, dropout=dropout, shared=shared, generator=generator)
    with torch.no_grad():
        for name, parameter in adapters.branch_parameters(model).items():
            if name.endswith(".B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def made(shared: tuple = adapters.SHARED, dropout: float = 0.0, kind: Callable[[], nn.Module] = Attention) -> Any:
    torch.manual_seed(0)
    return adapted(kind(), shared, dropout, TARGETS if kind is Attention else QKV)


def results(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    y = (run or model)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in adapters.branch_parameters(model).values())]


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linear layers each call of an op computes."""
    found: list[int] = []
    grouped, alone = ops.lora_branches_grouped, ops.lora_branches

    def counted(x: Tensor, weights: list, *rest: Any, **options: Any) -> Any:
        found.append(len(weights))
        return grouped(x, weights, *rest, **options)

    def counted_alone(*arguments: Any, **options: Any) -> Any:
        found.append(1)
        return alone(*arguments, **options)

    monkeypatch.setattr(ops, "lora_branches_grouped", counted)
    monkeypatch.setattr(ops, "lora_branches", counted_alone)
    return found


def test_outputs_and_gradients_are_those_of_the_layers_alone(x: Tensor) -> None:
    for one, other in zip(results(made(), x), results(made(shared=()), x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_three_layers_are_one_call(x: Tensor, calls: list[int]) -> None:
    model = made()
    model(x)
    assert calls == [3, 1], "q, k and v together; the output projection goes by the single op"
    assert adapters.joined(model) == {"": (QKV,)}


def test_a_layer_called_by_itself_computes_itself(x: Tensor, calls: list[int]) -> None:
    same(made().k_proj(x), made(shared=()).k_proj(x))
    assert calls == [1, 1]


def test_only_siblings_are_joined() -> None:
    model = nn.ModuleDict({"one": Attention(), "two": Attention()})
    adapters.attach(model, TARGETS, {"a": 2})
    assert adapters.joined(model) == {"one": (QKV,), "two": (QKV,)}
    assert type(model["one"]) is type(model["two"]), "one class, which compilers and sharding policies see once"


def test_only_adapted_layers_are_joined(x: Tensor, calls: list[int]) -> None:
    model = adapters.attach(Attention(), ("q_proj", "v_proj"), {"a": 2})
    assert adapters.joined(model) == {"": (("q_proj", "v_proj"),)}
    model(x)
    assert calls == [2]
    assert adapters.joined(adapters.attach(Attention(), ("q_proj",), {"a": 2})) == {}
    assert adapters.joined(made(shared=())) == {}


def test_harmless_uses_between_the_calls_are_allowed(x: Tensor, calls: list[int]) -> None:
    same(made(kind=Reads)(x), made(shared=(), kind=Reads)(x))
    assert calls == [3, 1, 1, 1]


@pytest.mark.parametrize("unsafe", [*UNSAFE, DecoratedLater, enclosing(2.0)])
def test_unsafe_calls_are_not_joined(unsafe: str | type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    kind = written(tmp_path / "unsafe.py", UNSAFE[unsafe]) if isinstance(unsafe, str) else unsafe
    model = made(kind=kind)
    assert adapters.joined(model) == {}
    assert type(model) is kind
    with torch.no_grad():
        same(model(x.clone()), made(shared=(), kind=kind)(x.clone()))
    assert adapters.joined(made(kind=written(tmp_path / "safe.py", BETWEEN.format(""))))


def test_another_input_width_of_k_and_v(x: Tensor, calls: list[int]) -> None:
    encoded = torch.randn(5, 7, 20, generator=torch.Generator().manual_seed(3))
    model = made(kind=lambda: Cross(20))
    assert adapters.joined(model) == {"": (("k_proj", "v_proj"),)}
    q, k, v = model(x, encoded)
    assert calls == [1, 2]
    calls.clear()
    same(model(x, cache=[k, v])[0], q)
    assert calls == [1], "k and v come from the cache"
    same((q, k, v), made(shared=(), kind=lambda: Cross(20))(x, encoded))


def test_k_and_v_of_self_attention_in_the_same_class(x: Tensor, calls: list[int]) -> None:
    same(made(kind=lambda: Cross(12))(x), made(shared=(), kind=lambda: Cross(12))(x))
    assert calls == [1, 2, 1, 1, 1]


def test_bart_computes_each_layer_once(calls: list[int]) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32, **sizes)
    torch.manual_seed(0)
    model = adapted(BartForConditionalGeneration(config).eval())
    ids = torch.arange(4, 10)[None]
    logits = model(input_ids=ids).logits
    assert calls == [1, 2] * 3, "of the encoder, of the decoder, and across: q, then k and v"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = adapted(adapters.detach(model), shared=())
    alone.load_state_dict(weights)
    same(logits, alone(input_ids=ids).logits)


def test_llama_joins_attention_and_mlp() -> None:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaModel(LlamaConfig(vocab_size=8, **sizes))
    adapters.attach(model, (*TARGETS, "gate_proj", "up_proj"), {"a": 2})
    assert adapters.joined(model) == {"layers.0.self_attn": (QKV,), "layers.0.mlp": (("gate_proj", "up_proj"),)}


def test_threads_with_other_inputs_do_not_interfere(x: Tensor) -> None:
    model, inputs = made(), [x, x + 1]
    with torch.inference_mode():
        expected = [model(one) for one in inputs]

    def work(number: int) -> None:
        for _ in range(50):
            with torch.inference_mode():
                torch.testing.assert_close(model(inputs[number % 2]), expected[number % 2])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_two_threads_inside_one_group_at_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made(), [x, x + 1]
    expected = [model(one).detach() for one in inputs]
    inside, grouped = threading.Barrier(2, timeout=60), ops.lora_branches_grouped

    def met(*arguments: Any, **options: Any) -> Any:
        inside.wait()
        outputs = grouped(*arguments, **options)
        inside.wait()
        return outputs

    monkeypatch.setattr(ops, "lora_branches_grouped", met)
    with ThreadPoolExecutor(2) as pool:
        same(list(pool.map(lambda one: model(one).detach(), inputs)), expected)


def test_a_replica_of_data_parallel_uses_its_own_layers(x: Tensor, calls: list[int]) -> None:
    def replicated(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            replica._modules[name] = replicated(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach() * 2)
        return replica

    model = made()
    replica = replicated(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        same(replica.forward(x), model(x))
    assert calls == [3, 1, 3, 1]


def test_hooks_of_a_layer_fire(x: Tensor, calls: list[int]) -> None:
    model, seen = made(), []
    expected = model(x)
    handles = [
        model.q_proj.register_forward_hook(lambda *_: seen.append("q after")),
        model.k_proj.register_forward_pre_hook(lambda *_: seen.append("k before")),
        model.v_proj.register_full_backward_hook(lambda *_: seen.append("v backward")),
    ]
    calls.clear()
    y = model(x.clone().requires_grad_(True))
    y.sum().backward()
    same(y, expected)
    assert seen == ["q after", "k before", "v backward"]
    assert calls == [1, 1, 1, 1]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x)
    assert calls == [3, 1]


def test_an_observer_sees_every_input_of_a_joint_call(x: Tensor, calls: list[int]) -> None:
    model, seen = made(), []
    for name in ("k_proj", "o_proj"):
        getattr(model, name).observer = lambda value, name=name: seen.append((name, value.shape[-1]))
    expected = model(x)
    assert seen == [("k_proj", 12), ("o_proj", 8)]
    assert calls == [3, 1]
    model.k_proj.merge()
    same(model(x), expected)
    assert seen[2:] == [("k_proj", 12), ("o_proj", 8)]
    assert calls == [3, 1, 1, 1, 1]


def test_hooks_of_every_module_fire(x: Tensor) -> None:
    model, seen = made(), []
    handle = modules.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert {model.q_proj, model.k_proj, model.v_proj} <= set(seen)


def test_a_forward_of_the_layer_itself_is_called(x: Tensor) -> None:
    model = made()
    forward = model.k_proj.forward
    model.k_proj.forward = lambda value: forward(value) + 1
    q, k, v = together((model.q_proj, model.k_proj, model.v_proj), x)
    same((q, k - 1, v), (model.q_proj(x), forward(x), model.v_proj(x)))


def test_a_forward_of_the_instance_stays(x: Tensor) -> None:
    model = Attention()
    model.forward = lambda value: value + 1
    adapted(model, targets=TARGETS)
    assert adapters.joined(model) == {}
    same(model(x), x + 1)


def test_merged_routed_and_disabled_layers_are_not_joined(x: Tensor, calls: list[int]) -> None:
    model, alone = made(), made(shared=())
    for layer in (model.k_proj, alone.k_proj):
        layer.merge()
    for layer in (model.v_proj, alone.v_proj):
        layer.router = lambda value: torch.full((*value.shape[:-1], 2), 0.5)
    same(model(x), alone(x))
    for one in (model, alone):
        one.v_proj.router = None
        one.k_proj.unmerge()
        adapters.activate(one, ["b"])
    assert 3 not in calls
    same(model(x), alone(x))
    assert 3 in calls
    calls.clear()
    for one in (model, alone):
        adapters.activate(one, [])
    same(model(x), alone(x))
    assert calls == []


@pytest.mark.parametrize("change", ["scale", "dropout", "independent", "training", "active", "rank"])
def test_layers_that_differ_are_not_joined(change: str, x: Tensor, calls: list[int]) -> None:
    model = made()
    changed = {"scale": 2.0, "dropout": 0.5, "independent": True, "training": False, "active": ("a",)}
    if change == "rank":
        model.v_proj = adapters.AdapterLinear(model.v_proj.base, dict.fromkeys("ab", model.v_proj.branches["a"]))
    else:
        setattr(model.v_proj, change, changed[change])
    model(x)
    assert calls == [1, 1, 1, 1]


def test_blocks_are_joined_each_by_itself(x: Tensor, calls: list[int]) -> None:
    class Blocks(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            for _ in range(2):
                q, k = self.q_proj(x), self.k_proj(x)
                x = x + q.sum()
            try:
                q = self.q_proj(x)
                assert_width(x.shape[-1], x.ndim)
                v = self.v_proj(x)
            finally:
                y = x.relu()
                k = self.k_proj(y) + self.v_proj(y)
            return q, k, v

    model = made(kind=Blocks)
    assert adapters.joined(model) == {"": (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("k_proj", "v_proj"))}
    same(model(x), made(shared=(), kind=Blocks)(x))
    assert calls[:4] == [2, 2, 2, 2]


def test_a_second_call_of_a_layer_begins_another_group(x: Tensor, calls: list[int]) -> None:
    class Twice(Three):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            one = self.q_proj(x), self.k_proj(x)
            return *one, self.q_proj(x), self.v_proj(x)

    model = made(kind=Twice)
    same(model(x), made(shared=(), kind=Twice)(x))
    assert calls[:2] == [2, 2]
    assert len(calls) == 6


def test_a_decorated_forward_keeps_its_decorators(x: Tensor, calls: list[int]) -> None:
    model = made(kind=Decorated)
    found = model(x, factor=3.0)
    assert calls == [3]
    assert model.seen == 1
    assert not found[0].requires_grad
    same(found, made(shared=(), kind=Decorated)(x, factor=3.0))
    same(model(x)[0], made(shared=(), kind=Decorated)(x)[0])
    inner, original = model.forward.__func__.__wrapped__.__wrapped__, Decorated.forward.__wrapped__.__wrapped__
    for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__qualname__", "__module__"):
        assert getattr(inner, name) == getattr(original, name)


def test_globals_are_those_of_the_module(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(kind=Outside)
    assert adapters.joined(model)
    monkeypatch.setitem(globals(), "offset", lambda value: value + 5)
    same(model(x)[2], x + 5)


def test_without_source_each_layer_is_computed_by_itself(x: Tensor) -> None:
    source = "def forward(self, x):\n    return self.q_proj(x), self.k_proj(x)\n"
    names: dict[str, Any] = {}
    exec(source, names)
    kind = type("Made", (Three,), {"forward": names["forward"], "__module__": __name__})
    model = made(kind=kind)
    assert adapters.joined(model) == {}
    same(model(x), made(shared=(), kind=kind)(x))


def test_a_file_changed_since_its_import_is_not_trusted(tmp_path: Path, x: Tensor) -> None:
    file = tmp_path / "written.py"
    kind = written(file, "return self.q_proj(x) + 1, self.k_proj(x)")
    assert adapters.joined(made(kind=kind))
    file.write_text(file.read_text().replace("+ 1", "- 1"))
    linecache.checkcache()
    model = made(kind=type("Written", kind.__bases__, {}))
    assert adapters.joined(model) == {}
    same(model(x), made(shared=(), kind=kind)(x))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, saved])
def test_a_copy_is_joined_too(way: Callable[[nn.Module], nn.Module], x: Tensor, calls: list[int]) -> None:
    model = made()
    other: Any = way(model)
    assert type(other) is type(model)
    same(other(x), model(x))
    assert calls == [3, 1, 3, 1]
    with torch.no_grad():
        other.q_proj.base.weight.zero_()
    assert bool(model.q_proj.base.weight.any())
    assert type(adapters.detach(other)) is Attention
    assert adapters.joined(model), "the original is as it was"


def test_the_class_is_the_same_to_everyone(x: Tensor) -> None:
    model = made()
    kind: type = type(model)
    assert isinstance(model, Attention)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(kind, name) == getattr(Attention, name)
    adapters.detach(model)
    assert type(model) is Attention
    assert type(made()) is not Attention


def test_detach_and_attach_again(x: Tensor, calls: list[int]) -> None:
    model = made()
    expected = model(x)
    for shared, counts in (((), [1, 1, 1, 1]), (adapters.SHARED, [3, 1])):
        adapters.detach(model)
        assert adapters.joined(model) == {}
        assert type(model) is Attention
        adapted(model, shared, targets=TARGETS)
        calls.clear()
        same(model(x), expected)
        assert calls == counts


def test_layers_adapted_one_after_the_other_are_joined(x: Tensor, calls: list[int]) -> None:
    model = adapters.attach(Attention(), ("q_proj", "k_proj"), {"a": 2})
    adapters.attach(model, ("v_proj",), {"a": 2})
    assert adapters.joined(model) == {"": (QKV,)}
    model(x)
    assert calls == [3]


def test_a_traceback_shows_the_lines_of_the_source(x: Tensor) -> None:
    model = made(kind=Raising)
    assert adapters.joined(model)
    with pytest.raises(ValueError, match="here") as caught:
        model(x)
    frame = traceback.extract_tb(caught.tb)[-1]
    assert (frame.filename, frame.name, frame.line) == (__file__, "forward", 'raise ValueError("here")')
    assert (frame.lineno, 1) == (Raising.forward.__code__.co_firstlineno + 3, 1)


def test_a_traceback_of_the_joint_call_shows_the_first_call() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is the op's own
        made(kind=Raising)(torch.zeros(2, 5))
    lines = [frame.line for frame in traceback.extract_tb(caught.tb) if frame.name == "forward"]
    assert lines == ["q = self.q_proj(x)"]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_recomputed_pass_makes_the_same_mask(reentrant: bool, x: Tensor) -> None:
    model = made(dropout=0.5)
    torch.manual_seed(3)
    plain = results(model, x)
    model.zero_grad()
    torch.manual_seed(3)
    again = results(model, x, lambda value: checkpoint(model, value, use_reentrant=reentrant))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_one_mask_is_drawn_for_a_group(x: Tensor) -> None:
    model = made(dropout=0.5)
    torch.manual_seed(3)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(2):
        torch.randint(-(2**63), 2**63 - 1, (1,))
    assert torch.equal(after, torch.get_rng_state()), "one of q, k and v, one of the output projection"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch before 2.9's own
def test_compiles_into_one_graph(backend: str, x: Tensor) -> None:
    compiled = torch.compile(made(), backend=backend, fullgraph=True)
    for one, other in zip(results(compiled, x), results(made(), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        same(made()(x.clone()), made(shared=())(x.clone()))
