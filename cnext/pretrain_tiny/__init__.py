"""Pretrains the tiny backbone from nothing: ``cnext pretrain-tiny``. Seeded, on pictures of the `pretrain` split only.

Three stages: the visual encoder with its detokenizer, the decoder, and the CLIP that scores pictures. The decoder
learns in two phases: first skills in templates of its own, then, for 30% of the batch, the benchmark's templates on
narrower data. Without the second phase the first task learnt wipes out all the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnext.backbones.tiny.model import TinyBackbone
from cnext.pretrain_tiny.corpus import SEEN_ICONS
from cnext.pretrain_tiny.stages import clip_vocabulary, pretrain_clip, pretrain_decoder, pretrain_vision

STAGES = {"vision": 2200, "decoder phase 1": 2600, "decoder phase 2": 1300, "clip": 1200}
"""Optimizer steps of each stage."""


def _save(module: nn.Module, path: Path) -> None:
    """Weights in float16: half the size, and the losses are measured after the rounding."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}, path)


def pretrain(out: Path, seed: int = 0, scale: float = 1.0, threads: int = 1) -> None:
    """Runs all stages and writes the weights, the vocabulary and the model card below ``out``.

    The layout is that of the package: ``cnext pretrain-tiny --out cnext`` in a checkout replaces what ships.
    """
    # Before twenty minutes of work, and not after them.
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    steps = {name: max(round(count * scale), 1) for name, count in STAGES.items()}
    seconds: dict[str, float] = {}
    final: dict[str, dict[str, float]] = {}

    def timed(name: str, run: Callable[[Callable[[str], None]], Any]) -> Any:
        started = time.perf_counter()
        result = run(lambda line: print(f"{name}: {line}", flush=True))
        seconds[name] = time.perf_counter() - started
        return result

    model = TinyBackbone()
    tiny, clip_folder = out / "backbones" / "tiny", out / "scoring" / "tiny_clip"
    final["vision"] = timed("vision", lambda log: pretrain_vision(model, steps["vision"], seed, log))
    phases = (steps["decoder phase 1"], steps["decoder phase 2"])
    final["decoder"] = timed("decoder", lambda log: pretrain_decoder(model, phases, seed, log))
    _save(model, tiny / "weights.safetensors")
    clip, final["clip"] = timed("clip", lambda log: pretrain_clip(model, steps["clip"], seed, log))
    _save(clip, clip_folder / "weights.safetensors")
    (clip_folder / "vocabulary.json").write_text(json.dumps(clip_vocabulary()) + "\n")
    counts = {
        "encoder": model.encoder,
        "detokenizer": model.detokenizer,
        "decoder": model.decoder,
        "CLIP": clip,
    }
    (tiny / "MODEL_CARD.md").write_text(
        _card(
            seed,
            threads,
            steps,
            seconds,
            final,
            {name: sum(p.numel() for p in m.parameters()) for name, m in counts.items()},
        )
    )
    print(f"written: {tiny}, {clip_folder}")


def _card(
    seed: int,
    threads: int,
    steps: dict[str, int],
    seconds: dict[str, float],
    final: dict[str, dict[str, float]],
    parameters: dict[str, int],
) -> str:
    measured = "\n".join(
        f"| {stage} | {seconds[stage]:.0f} | " + ", ".join(f"{name} {value}" for name, value in values.items()) + " |"
        for stage, values in final.items()
    )
    taken = ", ".join(f"{name} {count}" for name, count in steps.items())
    sizes = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    return f"""# Model card: the tiny backbone and its CLIP

Written by `cnext pretrain-tiny --seed {seed} --threads {threads}`. For tests, demonstrations and fast experiments on
continual learning; it knows colored shapes, icons and short words on 48 x 48 pictures and nothing else.

- Parameters: {sizes}.
- Data: pictures drawn by the package from the seed, of the `pretrain` split alone; a picture of a train, validation or
  test split is never drawn. Letters are random strings, and icons come as pictures; their names, but for
  {", ".join(SEEN_ICONS)}, are unknown to the decoder.
- Decoder: AdamW, batches of 32, CE + 6 MSE. Phase 1 learns captions, questions, places, letters, drawing and editing in
  templates of its own; phase 2 mixes in 30% of the benchmark's templates on narrower data (colors, shapes and counts;
  four icons; captions of one shape; two letters; scenes of one shape; recoloring and removing).
- Steps: {taken}.
- Stored in float16, used in float32.

| stage | seconds | at the last step (decoder: mean of the last 100) |
|---|---|---|
{measured}

The pictures' words, fonts and colors are Latin letters and eight hues; no person, no place and no personal data is in
them. Licence: Apache-2.0, as the package.
"""
