"""LLaMA decoder in plain torch, for the embedded model: names and outputs as of transformers, without needing it.

Of `transformers.LlamaForCausalLM` it has what the embedded model needs: no grouped queries, no bias, no scaled rotary
embeddings, no tied weights, no `generate`. `as_transformers` gives the whole, for export and adapters from elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROTARY_BASE, EPSILON = 10000.0, 1e-6


@dataclass
class Config:
    """The sizes, by the names that transformers has for them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


class Cache:
    """The keys and values of the positions so far, (B, heads, L, width) of each layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        """Positions so far."""
        return self.layers[0][0].shape[-2] if self.layers else 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends those of new positions to a layer's, and returns all."""
        if layer in self.layers:
            before = self.layers[layer]
            keys, values = torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)
        self.layers[layer] = keys, values
        return keys, values


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean square in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((-second, first), dim=-1) * sin)


class Attention(nn.Module):
    """Causal attention of queries and keys that are rotated by their positions."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.index, self.head = index, width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        heads = (*x.shape[:-1], -1, self.head)
        # In this form, so that adapters of the three are computed together: see `cnext.adapters.shared_input`.
        query = self.q_proj(x).view(heads).transpose(1, 2)
        key = self.k_proj(x).view(heads).transpose(1, 2)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        query, key = _rotated(query, *rotary), _rotated(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        causal = mask is None and query.shape[2] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=self.head**-0.5)
        return self.o_proj(mixed.transpose(1, 2).contiguous().reshape(x.shape).contiguous())


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual connection."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass
class States:
    """What the decoder returns. last_hidden_state: (B, L, hidden)."""

    last_hidden_state: Tensor


@dataclass
class Logits:
    """What the decoder and its head return. logits: (B, L, vocabulary)."""

    logits: Tensor


class Decoder(nn.Module):
    """Embeddings, (B, L, hidden), to hidden states."""

    new_cache = Cache

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            self.embed_tokens.weight[config.pad_token_id].zero_()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
    ) -> States:
        """Hidden states of new positions.

        Args:
            input_ids, inputs_embeds: one of both: (B, L) int64, or (B, L, hidden).
            attention_mask: (B, cached and new positions), 0 at padding; None: no padding.
            position_ids: (B, L) or (1, L); None: those after the cached ones.
            cache: gets the new positions' keys and values.
            use_cache: as of transformers; a cache is used where one is given.
        """
        x = inputs_embeds if inputs_embeds is not None else self.embed_tokens(input_ids)
        seen, new = cache.get_seq_length() if cache is not None else 0, x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new, device=x.device)[None]
        rotary, mask = self._rotary(x, position_ids), _mask(attention_mask, seen, new, x.device)
        for layer in self.layers[: self.config.num_hidden_layers]:
            if self.checkpointing and self.training:
                x: Any = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        return States(self.norm(x))

    def _rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, 1, L, width of a head)."""
        width = self.config.hidden_size // self.config.num_attention_heads
        # On the CPU, as transformers computes them, and then moved: powers differ between devices in the last bit.
        steps = torch.arange(0, width, 2, dtype=torch.float, device="cpu") / width
        angles = positions[..., None].float() * (1.0 / (ROTARY_BASE**steps)).to(x.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _mask(padding: Tensor | None, seen: int, new: int, device: torch.device) -> Tensor | None:
    """Which positions each new one attends to, (B, 1, new, all); None where that is all before it.

    padding: (B, seen + new), 0 at padding.
    """
    if padding is None or (bool(padding.all()) and (new == 1 or not seen)):
        if not seen or new == 1:
            return None
        padding = torch.ones(1, seen + new, device=device)
    queries, keys = torch.arange(seen, seen + new, device=device), torch.arange(seen + new, device=device)
    return (keys <= queries[:, None]) & padding.bool()[:, None, None]


class Llama(nn.Module):
    """The decoder and its head, with random weights; names of parameters as in transformers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.model.embed_tokens

    def forward(self, input_ids: Tensor) -> Logits:
        """Logits of (B, L) token ids without padding."""
        return Logits(self.lm_head(self.model(input_ids).last_hidden_state))

    def gradient_checkpointing_enable(self, options: dict[str, Any] | None = None) -> None:
        """Computes each layer's activations again in the backward pass."""
        self.model.checkpointing = True


def as_transformers(llama: Llama) -> Any:
    """A `transformers.LlamaForCausalLM` of the same layers: what is put into one's parameters is in the other's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**asdict(llama.config), rms_norm_eps=EPSILON, tie_word_embeddings=False)
    made: Any = LlamaForCausalLM(config)
    for name, layer in llama.named_modules():
        if isinstance(layer, (nn.Embedding, RMSNorm)) or name == "lm_head":
            made.set_submodule(name, layer)
    for here, there in zip(llama.model.layers, made.model.layers, strict=True):
        for part in ("self_attn", "mlp"):
            for name, layer in here.get_submodule(part).named_children():
                there.get_submodule(part).register_module(name, layer)
    return made.train(llama.training)
