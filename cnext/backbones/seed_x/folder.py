"""The released folder: where its parts are, and tensors from its files into a model, one file at a time.

    pretrained/
      seed_x_i/llm/                           config.json and the language model, in one file or several with an index
      seed_x_i/agent/pytorch_model.bin        both resamplers and patch_pos_embed
      seed_x_i/cvlm_llama2_tokenizer_100img_and_224loc_addpatch/       or beside seed_x_i, as downloaded
      QwenViT/qwen_vit_G.pt                   Qwen-VL's visual encoder
      seed_detokenizer/first_stage/           \\
      seed_detokenizer/second_stage/           > to write images, see `cnext.backbones.seed_x.drawing`
      stable-diffusion-xl-base-1.0/           /

Weights may be torch files (.bin, .pt) or safetensors. Torch files are read with weights_only=True: no code in them
runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cnext.errors import UserError, parse_json
from cnext.tensor_files import read_tensors

TOKENIZER = "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
NAMES = ("pytorch_model.bin", "model.safetensors")
SHOWN = 4


@dataclass(frozen=True)
class Released:
    """Where the parts are that every run needs. llm, tokenizer: folders.  agent, vision: files."""

    llm: Path
    agent: Path
    tokenizer: Path
    vision: Path

    @classmethod
    def find(cls, root: Path | None) -> Released:
        """Raises UserError naming everything that is not there."""
        if root is None:
            raise UserError("the seed-x backbone needs the folder of its released weights: --weights FOLDER")
        inside, beside = root / "seed_x_i" / TOKENIZER, root / TOKENIZER
        found = cls(
            root / "seed_x_i" / "llm",
            _first(root / "seed_x_i" / "agent", NAMES),
            beside if beside.is_dir() and not inside.is_dir() else inside,
            root / "QwenViT" / "qwen_vit_G.pt",
        )
        needed = (
            found.llm / "config.json",
            found.agent,
            found.tokenizer / "tokenizer.model",
            found.tokenizer / "added_tokens.json",
            found.vision,
        )
        if missing := [str(path.relative_to(root)) for path in needed if not path.is_file()]:
            there = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            raise UserError(
                f"{root}: expected the released SEED-X folder, with {', '.join(missing)}; found "
                f"{', '.join(there[:8]) if there else 'an empty folder' if root.is_dir() else 'no folder'}. SEED-X-17B "
                "and its tokenizer are at AILab-CVC/SEED-X-17B on Hugging Face, and qwen_vit_G.pt is the state of "
                "model.transformer.visual of Qwen/Qwen-VL"
            )
        return found


def _first(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there; where none is, the first that might be."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: one, or those that an index names.

    Raises:
        UserError: there are none, or the index names files that are not there.
    """
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder}: expected {' or '.join(NAMES)}, or an index of several (<name>.index.json), found neither"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(parse_json(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{index}: expected an object with 'weight_map', names of tensors and files: {error!r}"
        ) from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index}: expected names of files beside it, found {strange[0]!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise UserError(
            f"{index}: expected {len(names)} files beside it, {len(missing)} are missing: {listed(missing)}; download "
            "them again"
        )
    return [index.parent / name for name in names]


def listed(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check(source: str, expected: dict[str, Tensor], found: dict[str, Tensor], optional: str = "(?!)") -> None:
    """Raises UserError naming and counting the tensors that are missing, not of the model, or of another shape.

    optional: pattern of names that need not be there.
    """
    missing = [name for name in expected if name not in found and not re.fullmatch(optional, name)]
    strange = [name for name in found if name not in expected]
    shapes = [
        f"{name} {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "not of this model": strange, "of another shape": shapes}
    if any(kinds.values()):
        raise UserError(
            f"{source}: expected the {len(expected)} tensors of the released model, found {len(found)}: "
            + "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names)
        )


def fill(
    module: nn.Module,
    files: Sequence[Path],
    dtype: torch.dtype,
    device: Callable[[str], torch.device],
    *,
    ignored: str = "(?!)",
    optional: str = "(?!)",
    prefix: str = "",
) -> None:
    """Gives a module on the meta device its tensors, file by file: no more is in memory than the module and a file.

    Args:
        device: name of a tensor to where it goes.
        ignored: pattern of names in the files that are left out.  optional: of names that need not be in them.
        prefix: of the names in the files that are the module's; names without it are left out.

    Raises:
        UserError: tensors missing, not of the model, or of another shape, before anything is changed.
    """

    def own(file: Path) -> dict[str, Tensor]:
        named = {name.removeprefix(prefix): t for name, t in read_tensors(file).items() if name.startswith(prefix)}
        return {name: tensor for name, tensor in named.items() if not re.fullmatch(ignored, name)}

    source = str(files[0] if len(files) == 1 else files[0].parent)
    check(source, module.state_dict(), {name: t for file in files for name, t in own(file).items()}, optional)
    for file in files:
        placed = {name: tensor.to(device(name), dtype) for name, tensor in own(file).items()}
        module.load_state_dict(placed, strict=False, assign=True)
