"""CLIP weights as transformers saves them, by the names that open_clip has for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError, parse_json
from cnext.regular_files import read_text

FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a folder of transformers."""
_MARK = "text_model.embeddings.token_embedding.weight"
_WHOLE = {
    "logit_scale": "logit_scale",
    _MARK: "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_PREFIXES = {
    "text_model.final_layer_norm.": "ln_final.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
_PARTS = {
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}
_JOINED = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")
_BUFFERS = ("position_ids",)
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}


def is_of_transformers(tensors: dict[str, Tensor]) -> bool:
    """Whether tensors have the names of transformers' CLIPModel."""
    return _MARK in tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under open_clip's names, which joins q, k and v. Unknown names stay, for the model to refuse."""
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_BUFFERS):
            continue
        if match := _JOINED.fullmatch(name):
            joined.setdefault(f"{_renamed(match[1])}.attn.in_proj_{match[3]}", {})[match[2]] = tensor
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            found[_WHOLE.get(name) or _renamed(name)] = tensor
    complete = {name: parts for name, parts in joined.items() if len(parts) == 3}
    return found | {name: torch.cat([parts[one] for one in "qkv"]) for name, parts in complete.items()}


def _renamed(name: str) -> str:
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in _PARTS.items():
        name = name.replace(ours, theirs)
    return name


def configuration(folder: Path) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """What config.json and preprocessor_config.json say that no shape tells.

    Returns:
        Whether the activation is the quick GELU; mean and std of the preprocessing; heads of the text transformer and
        width of a head of the vision transformer, as open_clip's configuration has them.

    Raises:
        UserError: no config.json, or one of another model.
    """
    try:
        config = parse_json(read_text(folder / "config.json"))
        text, vision = config["text_config"], config["vision_config"]
        (activation,) = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
        heads = text.get("num_attention_heads", 8)
        head_width = vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12)
        quick_gelu = _ACTIVATIONS[activation]
        preprocessor = folder / "preprocessor_config.json"
        values = parse_json(preprocessor.read_bytes()) if preprocessor.is_file() else {}
        preprocessing = {key: values[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in values}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: expected config.json of a CLIP beside weights of transformers, with 'text_config' and "
            f"'vision_config', whose activation is {' or '.join(_ACTIVATIONS)}: {error!r}; copy the whole folder"
        ) from error
    return quick_gelu, preprocessing, {"text_cfg": {"heads": heads}, "vision_cfg": {"head_width": head_width}}
