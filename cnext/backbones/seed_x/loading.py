"""From the released folder to a model on its devices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cnext.backbones.seed_x import placing
from cnext.backbones.seed_x.drawing import STAGES, Drawing
from cnext.backbones.seed_x.folder import Released, fill, weight_files
from cnext.backbones.seed_x.resampler import sinusoids
from cnext.backbones.seed_x.sizes import VisionSizes
from cnext.backbones.seed_x.tokenizer import Tokenizer
from cnext.errors import UserError, parse_json, unknown
from cnext.tensor_files import read_tensors

if TYPE_CHECKING:
    from cnext.backbones.seed_x.model import SeedX

POSITIONS = r"(.*\.)?pos_embed"
"""Names of position embeddings, which follow from their size: files need not have them."""


def llama_config(values: Mapping[str, Any]) -> Any:
    """The LlamaConfig of a config.json, as far as it says what the model computes.

    pretraining_tp, of no meaning here, and pad_token_id, which would freeze a row of the embeddings, are left out.
    """
    from transformers import LlamaConfig

    known = {name: value for name, value in values.items() if name not in ("pretraining_tp", "pad_token_id")}
    return LlamaConfig.from_dict(known, attn_implementation="sdpa")


def read_config(file: Path, tokenizer: Tokenizer) -> Any:
    """The language model's config. Raises UserError where it is of another architecture, or of another tokenizer."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        values = parse_json(file.read_bytes())
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


def load(
    kind: type[SeedX],
    device: torch.device,
    weights: Path | None,
    dtype: torch.dtype,
    device_map: str | None,
    options: Mapping[str, Any],
) -> SeedX:
    """See `SeedX.load`. options: edit_stage, resolution and steps of a `Drawing`."""
    parts = Released.find(weights)
    assert weights is not None, "found"
    drawing = Drawing(weights, device=device, dtype=dtype, **_checked(options))
    if missing := drawing.missing():
        warnings.warn(missing, stacklevel=3)
    tokenizer = Tokenizer.read(parts.tokenizer)
    config = read_config(parts.llm / "config.json", tokenizer)
    files = weight_files(parts.llm)
    shapes = {name: tensor.shape for name, tensor in read_tensors(parts.vision).items()}
    with torch.device("meta"):
        model = kind(config, VisionSizes.of(shapes, str(parts.vision)), tokenizer, drawing).requires_grad_(False)
    placed = {} if device_map is None else placing.plan(model.llm.model, device_map, dtype)
    main = placing.device_of("embed_tokens.weight", placed, device)
    fill(model.vit, [parts.vision], dtype, lambda _: main, optional=POSITIONS)
    beside = torch.nn.ModuleDict({"input_resampler": model.input_resampler, "output_resampler": model.output_resampler})
    beside.register_parameter("patch_pos_embed", model.patch_pos_embed)
    fill(beside, [parts.agent], dtype, lambda _: main, optional=POSITIONS)
    model.patch_pos_embed = beside.get_parameter("patch_pos_embed")
    for resampler in (model.vit.attn_pool, model.input_resampler, model.output_resampler):
        if resampler.pos_embed.is_meta:
            queries, width = resampler.query.shape
            resampler.pos_embed = sinusoids(int(queries**0.5), width).to(main, dtype)
    fill(
        model.llm,
        files,
        dtype,
        lambda name: placing.device_of(name.removeprefix("model."), placed, main),
        ignored=r".*rotary_emb\.inv_freq",
    )
    # Its buffers are in no file, and stay in float32.
    model.llm.model.rotary_emb = type(model.llm.model.rotary_emb)(config).to(main)
    if placed:
        placing.connect(model.llm.model, placed)
    return model


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if options["edit_stage"] not in STAGES:
        raise unknown("edit_stage", options["edit_stage"], STAGES)
    resolution = options["resolution"]
    if resolution is not None and (resolution < 8 or resolution % 8):
        raise UserError(f"resolution must be a multiple of 8, got {resolution}")
    if options["steps"] < 1:
        raise UserError(f"steps must be at least 1, got {options['steps']}")
    return options
