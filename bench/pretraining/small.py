"""Pretraining of the small backbone and its CLIP from scratch: ``python bench/pretrain_small.py --out FOLDER``.

Stages: the visual encoder on letters, and then with its de-tokenizer on all pictures; the decoder, first on skills in
wordings of its own, then with some of the benchmark's wordings on narrower data in 30% of a batch; and the CLIP that
scores images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnext.backbones.small.model import SmallBackbone, packed, unpacked
from cnext.backbones.tiny.tokenizer import TinyTokenizer
from cnext.scoring import clip as scorers
from cnext.tasks.next_real import material
from pretraining.resumable import train
from pretraining.small_corpus import narrow_things, seen_things, vocabulary
from pretraining.small_stages import Vision, clip_step, clip_vocabulary, decoder_step

STAGES = {
    "letters": (1600, 2e-3),
    "vision": (1600, 2e-3),
    "decoder-1": (4400, 2e-3),
    "decoder-2": (1800, 1.2e-3),
    "clip": (800, 1e-3),
}
"""Optimizer steps and learning rate of each stage."""
SHARES = {"decoder-1": 0.0, "decoder-2": 0.3}
"""Share of a batch in the benchmark's wordings."""
Log = Callable[[str], None]


def pretrain(out: Path, seed: int = 0, scale: float = 1.0, threads: int = 2) -> None:
    """Pretrain the small backbone and its CLIP, and write weights, vocabularies and model card to a folder.

    The folder has the package's layout: ``python bench/pretrain_small.py --out cnext`` in a checkout replaces the files
    that ship. Stages that are done, and the steps up to the last checkpoint of one that is not, are in
    ``.pretraining`` there and are not repeated.

    Args:
        scale: factor on the steps of each stage; 1 takes about 80 minutes on two cores.
        threads: CPU threads of torch; the same seed and number give the same weights.
    """
    # First, as the stages take an hour and an error should come before them.
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    scratch, metrics = out / ".pretraining", {}
    steps = {name: max(round(count * scale), 1) for name, (count, _) in STAGES.items()}

    def stage(name: str, module: nn.Module, step: Any) -> None:
        log: Log = lambda line: print(line, flush=True)  # noqa: E731
        metrics[name] = train(name, module, step, steps[name], STAGES[name][1], seed, scratch, log)

    torch.manual_seed(seed)
    model = SmallBackbone(TinyTokenizer(tuple(vocabulary())))
    vision = Vision(model)
    stage("letters", vision, vision.letters_step)
    stage("vision", vision, vision.step)
    model.encoder.requires_grad_(False)
    model.detokenizer.requires_grad_(False)
    for name, share in SHARES.items():
        stage(name, model, decoder_step(model, share))
    folder = out / "backbones" / "small"
    _save(model, folder)
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary()) + "\n")

    clip: Any
    clip_folder = out / "scoring" / "small_clip"
    clip_folder.mkdir(parents=True, exist_ok=True)
    (clip_folder / "model.json").write_text((scorers.SMALL_CLIP / "model.json").read_text())
    torch.manual_seed(seed)
    clip, _, tokenizer = scorers.build_tiny_clip(clip_vocabulary(), scorers.SMALL_CLIP)
    clip.logit_scale.requires_grad_(False)
    stage("clip", clip.train(), clip_step(clip, tokenizer, model))
    _save(clip, clip_folder, half=True)
    (clip_folder / "vocabulary.json").write_text(json.dumps(clip_vocabulary()) + "\n")
    parts = {"encoder": model.encoder, "de-tokenizer": model.detokenizer, "decoder": model.decoder, "CLIP": clip}
    parameters = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    (folder / "MODEL_CARD.md").write_text(_card(seed, threads, steps, metrics, parameters))
    print(f"written: {folder}, {clip_folder}; {scratch} can be deleted")


def _save(module: nn.Module, folder: Path, half: bool = False) -> None:
    """Saves weights in 8 bits or in float16, and gives the module what was saved."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict()
    stored = {name: tensor.half() for name, tensor in state.items()} if half else packed(state)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "weights.safetensors")
    module.load_state_dict({name: tensor.float() for name, tensor in unpacked(stored).items()})


def _card(
    seed: int, threads: int, steps: dict[str, int], metrics: dict[str, dict[str, float]], counts: dict[str, int]
) -> str:
    measured = "\n".join(
        f"| {stage} | {steps[stage]} | {values.pop('seconds'):.0f} | "
        + ", ".join(f"{name} {value}" for name, value in values.items())
        + " |"
        for stage, values in metrics.items()
    )
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"""# Model card: the small backbone and its CLIP

Written by `python bench/pretrain_small.py --seed {seed} --threads {threads}`, which goes on where it was interrupted.
For experiments on continual learning with the suite `next-real`; it knows {len(seen_things())} things by name, and
nothing of the world beside the suite's pictures.

- Parameters: {sizes}.
- Data: pictures composed by the package from the seed, of the `pretrain` split alone, which shares no photograph, no
  handwritten digit, no word and no scene with train, validation and test. The encoder sees the drawings of all
  {len(material.things())} things; the decoder learns the names of two of three ({", ".join(seen_things())}).
- Encoder and de-tokenizer: an autoencoder whose features also tell, by linear heads that are not kept, which things are
  where, their tints, and which letters and digits are in a cell.
- Decoder: AdamW, batches of 32, CE + 6 MSE. Stage 1 learns descriptions, questions, places, letters, drawing and
  editing in wordings of its own; stage 2 adds 30% in the first quarter of the benchmark's training wordings, of
  boxes the first half, on narrower data (what, how many and whether; things: {", ".join(narrow_things())};
  captions of one thing; two or three letters; the box of one thing by its name or place; recoloring and replacing).
- The decoder and the visual parts are stored in 8 bits (int8 rows with a float16 scale), the CLIP in float16; all are
  used in float32.

| stage | steps | seconds | mean of the last 100 steps |
|---|---|---|---|
{measured}

The pictures are drawings, photographs, digits and fonts that others have made, under their licenses:
`cnext/tasks/next_real/material/LICENSES.md`. The weights are under Apache-2.0, as the package.
"""
