"""Pretraining stages of the tiny backbone: visual encoder and detokenizer, decoder, CLIP."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.tiny.model import TinyBackbone, TinyInputs
from cnext.backbones.tiny.vision import WIDTH, to_input
from cnext.scoring.clip import build_tiny_clip
from cnext.tasks import scenes, synthetic
from cnext.tasks.base import Sample, Turn
from cnext.tasks.scenes import COLORS, ICONS, PLACES, SHAPES, Scene
from pretraining.corpus import LETTERS, Item, Picture, corpus, new_icon, new_letters, new_scene

PICTURE = Path("picture")
"""Placeholder path in samples whose images are in memory only."""


def _encode(model: TinyBackbone, items: list[Item]) -> list[TinyInputs]:
    def features(pictures: list[Picture | None]) -> list[Tensor | None]:
        pixels = [scenes.draw(picture) for picture in pictures if picture is not None]
        if not pixels:
            return [None] * len(pictures)
        with torch.no_grad():
            encoded = iter(model.encoder(to_input(torch.from_numpy(numpy.stack(pixels)))))
        return [None if picture is None else next(encoded) for picture in pictures]

    return [
        model.assemble(Sample("", (Turn(item[0], item[1]),), item[2] and PICTURE, item[3] and PICTURE), read, written)
        for item, read, written in zip(
            items, features([item[2] for item in items]), features([item[3] for item in items]), strict=True
        )
    ]


class _Optimizer:
    """AdamW with a one-cycle schedule, gradient clipping and a log line every 100 steps."""

    def __init__(self, modules: list[nn.Module], learning_rate: float, steps: int, log: Callable[[str], None]) -> None:
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, total_steps=steps)
        self.steps, self.done, self.started, self.log = steps, 0, time.perf_counter(), log

    def step(self, loss: Tensor, **shown: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.done += 1
        if self.done % 100 == 0 or self.done == self.steps:
            values = " ".join(f"{name} {value.item():.4f}" for name, value in shown.items())
            self.log(f"step {self.done}/{self.steps} {values} ({time.perf_counter() - self.started:.0f} s)")


def pretrain_vision(model: TinyBackbone, steps: int, seed: int, log: Callable[[str], None]) -> dict[str, float]:
    """Pretrains encoder and detokenizer as an autoencoder, with classification heads that give features semantics.

    Loss: 4 x pixel MSE + 0.1 x (shape CE + color CE, per quadrant) + 0.1 x icon CE + 0.2 x letter CE, with noise of 0.1
    on the features. Returns: the final pixel error and the heads' accuracies.
    """
    rng = Random(f"vision/{seed}")
    names = list(ICONS)
    heads = nn.ModuleDict(
        {
            "shape": nn.Linear(4 * WIDTH, 1 + len(SHAPES)),
            "color": nn.Linear(4 * WIDTH, 1 + len(COLORS)),
            "icon": nn.Linear(16 * WIDTH, len(names)),
            "letter": nn.Linear(16 * WIDTH, 3 * len(LETTERS)),
        }
    )
    weights = {"shape": 0.1, "color": 0.1, "icon": 0.1, "letter": 0.2}
    optimizer = _Optimizer([model.encoder, model.detokenizer, heads], 2e-3, steps, log)
    shown: dict[str, Tensor] = {}
    for _ in range(steps):
        drawn, icons, words = (
            [new_scene(rng) for _ in range(28)],
            [new_icon(rng) for _ in range(12)],
            [new_letters(rng) for _ in range(32)],
        )
        pixels = to_input(torch.from_numpy(numpy.stack([scenes.draw(picture) for picture in (*drawn, *icons, *words)])))
        features = model.encoder(pixels)
        pixel = F.mse_loss(model.detokenizer(features + 0.1 * torch.randn_like(features)), pixels)
        of_scenes, of_icons, of_words = features.split([len(drawn), len(icons), len(words)])
        # (scene, row half, row, column half, column, width) to one vector per quadrant, in the order of PLACES
        quadrants = of_scenes.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).reshape(len(drawn), 4, 4 * WIDTH)
        shape, color = torch.zeros(len(drawn), 4, dtype=torch.long), torch.zeros(len(drawn), 4, dtype=torch.long)
        for index, scene in enumerate(drawn):
            for thing in scene.things:
                place = list(PLACES).index(thing.place)
                shape[index, place] = 1 + SHAPES.index(thing.shape)
                color[index, place] = 1 + list(COLORS).index(thing.color)
        guesses = {
            "shape": (heads["shape"](quadrants), shape),
            "color": (heads["color"](quadrants), color),
            "icon": (heads["icon"](of_icons.flatten(1)), torch.tensor([names.index(icon.name) for icon in icons])),
            "letter": (
                heads["letter"](of_words.flatten(1)).unflatten(1, (3, len(LETTERS))),
                torch.tensor([[LETTERS.index(letter) for letter in word.word] for word in words]),
            ),
        }
        loss = 4 * pixel
        shown = {"pixel_mse": pixel}
        for name, (guess, wanted) in guesses.items():
            loss = loss + weights[name] * F.cross_entropy(guess.flatten(0, -2), wanted.flatten())
            shown[f"{name}_accuracy"] = (guess.argmax(-1) == wanted).float().mean()
        optimizer.step(loss, **shown)
    return {name: round(value.item(), 4) for name, value in shown.items()}


def pretrain_decoder(
    model: TinyBackbone, phases: tuple[int, int], seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Pretrains the decoder in both phases: AdamW, batches of 32, CE + 6 MSE.

    Returns: the mean losses of the last 100 steps of each phase.
    """
    torch.manual_seed(seed)
    model.encoder.requires_grad_(False)
    model.detokenizer.requires_grad_(False)
    final: dict[str, float] = {}
    for phase, (steps, share, rate) in enumerate(zip(phases, (0.0, 0.3), (2.5e-3, 2e-3), strict=True), 1):
        optimizer = _Optimizer([model], rate, steps, log)
        stream = corpus(seed, share)
        recent: list[tuple[Tensor, Tensor]] = []
        for _ in range(steps):
            loss = model.loss(_encode(model, [next(stream) for _ in range(32)]))
            optimizer.step(loss.total, text=loss.text, image=loss.image)
            recent = [*recent[-99:], (loss.text, loss.image)]
        text, image = torch.tensor(recent).mean(0).tolist()
        final |= {f"phase_{phase}_text_loss": round(text, 4), f"phase_{phase}_image_mse": round(image, 4)}
    return final


def clip_vocabulary() -> list[str]:
    """Tokens of the CLIP: pad, unknown, the words of captions and of their instruction, end of text."""
    words = {*COLORS, *SHAPES, *["a", "an", "in", "the", "and", "please", "generate", "image"]}
    words |= {word for place in PLACES for word in place.split()}
    return ["<pad>", "<unknown>", *sorted(words), "<end>"]


def _pictured_caption(rng: Random, scene: Scene) -> str:
    """A scene's caption with its shapes in random order, in 30% of cases after the benchmark's instruction."""
    caption = Scene(tuple(rng.sample(scene.things, len(scene.things))), scene.background).caption
    return f"{synthetic.DRAW} {caption}" if rng.random() < 0.3 else caption


def pretrain_clip(
    model: TinyBackbone, steps: int, seed: int, log: Callable[[str], None]
) -> tuple[nn.Module, dict[str, float]]:
    """Pretrains the CLIP that scores images: symmetric contrastive loss, fixed temperature, batches of 96 scenes.

    Half of the images pass through the autoencoder first, so that the detokenizer's blur does not lower scores.

    Returns: the model, and its final loss, in-batch accuracy, and mean cosines of matching and other pairs.
    """
    torch.manual_seed(seed)
    rng = Random(f"clip/{seed}")
    clip: Any
    clip, _, tokenizer = build_tiny_clip(clip_vocabulary())
    clip.logit_scale.requires_grad_(False)
    clip.train()
    optimizer = _Optimizer([clip], 1e-3, steps, log)
    shown: dict[str, Tensor] = {}
    for _ in range(steps):
        drawn = [new_scene(rng, 1, 3) for _ in range(96)]
        pixels = to_input(torch.from_numpy(numpy.stack([scenes.draw(scene) for scene in drawn])))
        with torch.no_grad():
            pixels[::2] = model.detokenizer(model.encoder(pixels[::2])).clamp(-1, 1)
        images = F.normalize(clip.encode_image(pixels), dim=-1)
        texts = F.normalize(clip.encode_text(tokenizer([_pictured_caption(rng, scene) for scene in drawn])), dim=-1)
        cosines = images @ texts.T
        wanted = torch.arange(len(drawn))
        logits = clip.logit_scale.exp() * cosines
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        shown = {
            "contrastive_loss": loss,
            "accuracy": (cosines.argmax(1) == wanted).float().mean(),
            "matched_cosine": cosines.diagonal().mean(),
            "other_cosine": (cosines.sum() - cosines.trace()) / (cosines.numel() - len(drawn)),
        }
        optimizer.step(loss, **shown)
    return clip.eval(), {name: round(value.item(), 4) for name, value in shown.items()}
