"""A small file in the layout of the released adapters, with every kind of key."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16),
          "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48),
          "mlp.down_proj": (48, 32)}  # fmt: skip
LLM = "llm.base_model.model."


def released(kind: str, spelling: str = "weight", prefix: str = "", rank: int = 2) -> dict[str, Tensor]:
    """Two layers as `test_attach_mage.model` has them. spelling: "weight", "mlp" or "both"."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = {f"{LLM}model.embed_tokens.weight": torch.randn(64, 32)}
    ends = {"weight": ["weight"], "mlp": ["mlp.weight"], "both": ["weight", "mlp.weight"]}[spelling]
    for number in range(2):
        layer = f"{LLM}model.layers.{number}"
        for name, (width, out) in WIDTHS.items():
            for half, (rows, columns) in {"A": (rank, width), "B": (out, rank)}.items():
                at = f"{layer}.{name}.lora_{half}.default"
                if kind == "lora":
                    state[f"{at}.weight"] = torch.randn(rows, columns) * 0.1
                for expert in range(4) if kind != "lora" else ():
                    tensor = torch.randn(rows, columns) * 0.1
                    state |= {f"{at}.lora{half}.{expert}.{end}": tensor for end in ends}
            if kind != "lora":
                state[f"{layer}.{name}.lora_router.default.weight"] = torch.randn(4, width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{norm}.original_module.weight"] = torch.ones(32)
            state[f"{layer}.{norm}.modules_to_save.default.weight"] = torch.rand(32) + 0.5
        state[f"{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state[f"{LLM}model.norm.original_module.weight"] = torch.ones(32)
    state[f"{LLM}model.norm.modules_to_save.default.weight"] = torch.rand(32) + 0.5
    state[f"{LLM}lm_head.weight"] = torch.randn(64, 32)
    for side in ("input_resampler", "output_resampler"):
        state[f"{side}.query"] = torch.randn(4, 8)
        state[f"{side}.attn.in_proj_weight"] = torch.randn(24, 8)
    state["patch_pos_embed"] = torch.randn(4, 32)
    return {prefix + name: tensor for name, tensor in state.items()}
