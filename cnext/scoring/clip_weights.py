"""Load CLIP weights from a file: OpenAI's, or those of a model of the same architecture.

Files: ``ViT-B-32.pt`` as OpenAI publishes it (a TorchScript archive, whose program is not run), or the same tensors as
``open_clip_model.safetensors`` or ``open_clip_pytorch_model.bin``, or as transformers saves a CLIPModel, with its
``config.json``. The configuration is inferred from their shapes; the activation is the quick GELU and a head 64 wide
unless ``open_clip_config.json`` or ``config.json`` beside them says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnext.errors import UserError, parse_json
from cnext.scoring.archive import is_archive, read_archive
from cnext.scoring.clip_transformers import FILES, configuration, is_of_transformers, renamed
from cnext.tensor_files import load_file, require_dense

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "ViT-B-32.pt", *FILES)
"""Files looked for in a folder of weights, in this order."""
_HEAD = 64
"""Width of an attention head in all of OpenAI's models, which no shape tells."""


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder, or None."""
    return next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)


def load_weights(path: Path) -> tuple[torch.nn.Module, Callable, Callable]:
    """A CLIP of OpenAI's architecture in float32, sized as the tensors of a file, as (model, transform, tokenizer).

    Raises:
        UserError: the file cannot be read, or does not hold such a CLIP.
    """
    import open_clip

    given = read_archive(path) if is_archive(path) else _read_tensors(path)
    if is_of_transformers(given):
        given = renamed(given)
        quick_gelu, preprocessing, heads = configuration(path.parent)
    else:
        quick_gelu, preprocessing, heads = _open_clip_config(path.parent / CONFIG_FILE)
    sizes = _sizes(given, path)
    for part, values in heads.items():
        sizes[part] |= values
    transform: Any
    model, _, transform = open_clip.create_model_and_transforms(
        "ViT-B-32",
        force_quick_gelu=quick_gelu,
        image_mean=preprocessing.get("mean"),
        image_std=preprocessing.get("std"),
        **sizes,
    )
    # Archives have attributes beside the parameters: sizes, and the mask of the text's attention.
    names = model.state_dict().keys()
    wanted = {name: tensor for name, tensor in given.items() if name in names} if is_archive(path) else given
    try:
        model.load_state_dict(wanted)
    except RuntimeError as error:
        raise UserError(f"{path}: expected the weights of a CLIP like OpenAI's: {error}") from error
    tokenizer = open_clip.SimpleTokenizer(context_length=sizes["text_cfg"]["context_length"])
    if tokenizer.vocab_size != (words := sizes["text_cfg"]["vocab_size"]):
        raise UserError(
            f"{path}: expected a CLIP with OpenAI's {tokenizer.vocab_size:,} tokens, got one with {words:,}"
        )
    return model, transform, tokenizer


def _open_clip_config(config: Path) -> tuple[bool, dict[str, Any], dict[str, dict[str, Any]]]:
    """The activation (quick GELU or not), the preprocessing, and the heads of the transformers where they are not
    `_HEAD` wide, in open_clip's configuration beside the weights."""
    if not config.is_file():
        return True, {}, {}
    try:
        values = parse_json(config.read_bytes())
        model = values["model_cfg"]
        kept = {"vision_cfg": ("head_width",), "text_cfg": ("heads",)}
        heads = {part: {k: model[part][k] for k in keys if k in model.get(part, {})} for part, keys in kept.items()}
        return model.get("quick_gelu", False), values.get("preprocess_cfg", {}), heads
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: expected open_clip's 'model_cfg' and 'preprocess_cfg': {error!r}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file, which is read with weights_only=True."""
    given = load_file(path, f"the weights of a CLIP ({', '.join(WEIGHTS_FILES)})")
    given = given.get("state_dict", given) if isinstance(given, dict) else given
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in given.items()
    ):
        raise UserError(f"{path}: expected the weights of a CLIP, a table of tensors; found {type(given).__name__}")
    require_dense(path, given)
    return {name.removeprefix("module."): tensor for name, tensor in given.items()}


def _sizes(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """open_clip's configuration of the vision and text transformers, from the shapes of their tensors."""
    needed = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "positional_embedding")
    ranks = {**dict.fromkeys(needed, 2), "visual.conv1.weight": 4, "text_projection": 2}
    lacking = [name for name, rank in ranks.items() if name not in tensors or tensors[name].ndim != rank]
    if lacking:
        raise UserError(
            f"{path}: expected the weights of a CLIP with a vision transformer, as OpenAI's ViT-B/32; "
            f"found {len(tensors)} tensors, without {', '.join(lacking)}"
        )
    patches, positions, words, contexts = (tensors[name].shape for name in needed)
    if patches[0] % _HEAD or words[1] % _HEAD:
        raise UserError(
            f"{path}: expected widths in multiples of {_HEAD}, as OpenAI's, got {patches[0]} and {words[1]}"
        )

    def mlp_ratio(prefix: str, width: int) -> float:
        inner = tensors.get(f"{prefix}0.mlp.c_fc.bias")
        return 4.0 if inner is None else len(inner) / width

    def layers(prefix: str) -> int:
        return len({name.split(".resblocks.")[1].split(".")[0] for name in tensors if name.startswith(prefix)})

    return {
        "embed_dim": tensors["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": patches[3] * round((positions[0] - 1) ** 0.5),
            "patch_size": patches[3],
            "width": patches[0],
            "layers": layers("visual.transformer.resblocks."),
            "mlp_ratio": mlp_ratio("visual.transformer.resblocks.", patches[0]),
            "head_width": _HEAD,
        },
        "text_cfg": {
            "context_length": contexts[0],
            "vocab_size": words[0],
            "width": words[1],
            "heads": words[1] // _HEAD,
            "layers": layers("transformer.resblocks."),
            "mlp_ratio": mlp_ratio("transformer.resblocks.", words[1]),
        },
    }
