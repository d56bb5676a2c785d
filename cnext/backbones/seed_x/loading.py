"""Reads the released files of SEED-X and loads them into its modules, on one device or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cnext.backbones.seed_x import placing
from cnext.backbones.seed_x.folder import Released, fill, weight_files
from cnext.backbones.seed_x.resampler import Resampler, sinusoids
from cnext.backbones.seed_x.sizes import VisionSizes
from cnext.backbones.seed_x.tokenizer import Tokenizer
from cnext.errors import UserError, parse_json
from cnext.regular_files import read_bytes
from cnext.tensor_files import read_tensors

POSITIONS = r"(.*\.)?pos_embed"
"""Names of position embeddings, which follow from their size: files need not contain them."""


def llama_config(values: Mapping[str, Any]) -> Any:
    """The LlamaConfig of a config.json, as far as it determines what the model computes.

    pretraining_tp, which has no meaning here, and pad_token_id, which would freeze a row of the embeddings, are left
    out.
    """
    from transformers import LlamaConfig

    known = {name: value for name, value in values.items() if name not in ("pretraining_tp", "pad_token_id")}
    return LlamaConfig.from_dict(known, attn_implementation="sdpa")


def read_config(file: Path, tokenizer: Tokenizer) -> Any:
    """The language model's config. Raises UserError where it is of another architecture, or of another tokenizer."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        values = parse_json(read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: expected the config of a LLaMA model, cannot read it: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llama":
        raise UserError(f"{file}: expected model_type 'llama', found {kind!r}; is this the folder of another model?")
    if values.get("vocab_size") != len(tokenizer):
        raise UserError(
            f"{file}: expected vocab_size {len(tokenizer)}, as many as the tokenizer has tokens, found "
            f"{values.get('vocab_size')}; model and tokenizer must have been released together"
        )
    try:
        return llama_config(values)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"{file}: expected the config of a LLaMA model: {error}") from error


class Parts(NamedTuple):
    """What a model is constructed from. config: a LlamaConfig.  released: the files of its weights."""

    config: Any
    vision: VisionSizes
    tokenizer: Tokenizer
    released: Released


def read_parts(weights: Path | None) -> Parts:
    """Reads everything but the weights. Raises UserError where a file is missing or does not fit."""
    released = Released.find(weights)
    tokenizer = Tokenizer.from_folder(released.tokenizer)
    config = read_config(released.llm / "config.json", tokenizer)
    shapes = {name: tensor.shape for name, tensor in read_tensors(released.vision).items()}
    return Parts(config, VisionSizes.of(shapes, str(released.vision)), tokenizer, released)


def load_weights(
    parts: Parts,
    llm: Any,
    vit: nn.Module,
    agent: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | None,
) -> None:
    """Loads the weights into modules on the meta device.

    Args:
        llm: the LlamaForCausalLM.  vit: the visual encoder.  agent: both resamplers and ``patch_pos_embed``.
        device: of all parts, unless ``device_map`` distributes the language model.
    """
    placed = {} if device_map is None else placing.plan(llm.model, device_map, dtype)
    main = placing.device_of("embed_tokens.weight", placed, device)
    fill(vit, [parts.released.vision], dtype, lambda _: main, optional=POSITIONS)
    fill(agent, [parts.released.agent], dtype, lambda _: main, optional=POSITIONS)
    for resampler in [module for part in (vit, agent) for module in part.modules() if isinstance(module, Resampler)]:
        if resampler.pos_embed.is_meta:
            queries, width = resampler.query.shape
            resampler.pos_embed = sinusoids(int(queries**0.5), width).to(main, dtype)
    fill(
        llm,
        weight_files(parts.released.llm),
        dtype,
        lambda name: placing.device_of(name.removeprefix("model."), placed, main),
        ignored=r".*rotary_emb\.inv_freq",
    )
    # Its buffers are in no file, and stay in float32.
    llm.model.rotary_emb = type(llm.model.rotary_emb)(parts.config).to(main)
    if placed:
        placing.connect(llm.model, placed)
