"""The released SEED-X folder: finds its files and loads their tensors into modules, one file at a time.

    pretrained/
      seed_x_i/llm/                           config.json and the language model, in one file or several with an index
      seed_x_i/agent/pytorch_model.bin        both resamplers and patch_pos_embed
      seed_x_i/cvlm_llama2_tokenizer_100img_and_224loc_addpatch/       or beside seed_x_i, as downloaded
      QwenViT/qwen_vit_G.pt                   Qwen-VL's visual encoder
      seed_detokenizer/first_stage/           \\
      seed_detokenizer/second_stage/           > to write images, see `cnext.backbones.seed_x.drawing`
      stable-diffusion-xl-base-1.0/           /

Weights may be torch files (.bin, .pt) or safetensors. Torch files are read with weights_only=True, so no code in them
is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cnext.backbones.folders import shard_files
from cnext.errors import UserError, listed
from cnext.tensor_files import read_tensors

TOKENIZER = "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
NAMES = ("pytorch_model.bin", "model.safetensors")


@dataclass(frozen=True)
class Released:
    """Paths of the parts that every run needs. llm, tokenizer: folders.  agent, vision: files."""

    llm: Path
    agent: Path
    tokenizer: Path
    vision: Path

    @classmethod
    def find(cls, root: Path | None) -> Released:
        """The paths below a root folder. Raises UserError naming every missing file."""
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
    """The first of these files that exists; if none does, the first one."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: one, or those that an index names.

    Raises:
        UserError: there are none, or the index names files that are not there.
    """
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return shard_files(index)
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder}: expected {' or '.join(NAMES)}, or an index of several (<name>.index.json), found neither"
    )


def check(source: str, expected: dict[str, Tensor], found: dict[str, Tensor], optional: str = "(?!)") -> None:
    """Raises UserError naming and counting tensors that are missing, not of the model, or of another shape.

    optional: regular expression of names that may be missing.
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
    """Loads tensors into a module on the meta device, file by file: memory holds the module and one file at most.

    Args:
        device: maps a tensor's name to its device.
        ignored: regular expression of names in the files to skip.  optional: of names that the files may lack.
        prefix: of the module's names in the files; names without it are skipped.

    Raises:
        UserError: tensors missing, not of the model, or of another shape; the module is then unchanged.
    """

    def own(file: Path) -> dict[str, Tensor]:
        named = {name.removeprefix(prefix): t for name, t in read_tensors(file).items() if name.startswith(prefix)}
        return {name: tensor for name, tensor in named.items() if not re.fullmatch(ignored, name)}

    source = str(files[0] if len(files) == 1 else files[0].parent)
    check(source, module.state_dict(), {name: t for file in files for name, t in own(file).items()}, optional)
    for file in files:
        placed = {name: tensor.to(device(name), dtype) for name, tensor in own(file).items()}
        module.load_state_dict(placed, strict=False, assign=True)
