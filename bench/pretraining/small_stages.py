"""Pretraining stages of the small backbone: visual encoder and de-tokenizer, decoder, CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.small.model import SmallBackbone
from cnext.backbones.small.vision import SIZES
from cnext.backbones.tiny.model import TinyInputs
from cnext.backbones.tiny.vision import to_input
from cnext.tasks.base import Sample, Turn
from cnext.tasks.generated import DRAW
from cnext.tasks.next_real import examples, material, pictures
from cnext.tasks.next_real.examples import Source
from cnext.tasks.next_real.pictures import PLACES, TINTS, Picture, Scene
from pretraining import small_corpus as corpora
from pretraining.resumable import Step

PICTURE = Path("picture")
"""Placeholder path in samples whose images are in memory only."""
SYMBOLS = material.LETTERS + "0123456789"


def drawn(shown: list[Picture]) -> Tensor:
    """Inputs of the encoder, (B, 3, 96, 96)."""
    return to_input(torch.from_numpy(numpy.stack([pictures.draw(picture) for picture in shown])))


def in_cells(texts: Sequence[pictures.Lettering | pictures.Number], grid: int) -> Tensor:
    """The first and the second symbol whose center is in each cell, from the left: (B, cells, 2); 0 where none is."""
    found = torch.zeros(len(texts), grid * grid, 2, dtype=torch.long)
    for row, text in enumerate(texts):
        for symbol, x, y in text.symbols:
            cell = int(y * grid / pictures.SIDE) * grid + int(x * grid / pictures.SIDE)
            place = int(found[row, cell, 0] > 0)
            found[row, cell, place] = 1 + SYMBOLS.index(symbol)
    return found


class Vision(nn.Module):
    """Encoder, de-tokenizer and the heads that give features semantics: an autoencoder with classifiers.

    Loss: 8 x pixel MSE + 0.1 x (name CE + 0.5 tint CE, of each place) + 0.1 x name CE of one large thing + 0.4 x CE of
    the first and second symbol whose center is in a cell, with noise of 0.1 on the features.
    """

    def __init__(self, model: SmallBackbone) -> None:
        super().__init__()
        self.encoder, self.detokenizer = model.encoder, model.detokenizer
        width, names = model.sizes.width, 1 + len(material.things())
        self.name, self.tint = nn.Linear(9 * width, names), nn.Linear(9 * width, 1 + len(TINTS))
        self.alone = nn.Linear(36 * width, names)
        self.symbols = nn.Linear(width, 2 * (1 + len(SYMBOLS)))
        self.rare = torch.tensor([0.1] + [1.0] * len(SYMBOLS))

    def letters_step(self, rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
        """The CE of the symbols alone, of 48 new words and numbers: learnt beside all else, they take far longer."""
        texts = [corpora.new_letters(rng) for _ in range(36)] + [corpora.new_number(rng) for _ in range(12)]
        wanted = in_cells(texts, SIZES.grid)
        guess = self.symbols(self.encoder(drawn(texts))).unflatten(-1, (2, 1 + len(SYMBOLS)))
        loss = F.cross_entropy(guess.flatten(0, -2), wanted.flatten(), self.rare)
        return loss, {"symbol_accuracy": (guess.argmax(-1) == wanted)[wanted > 0].float().mean()}

    def step(self, rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of 64 new pictures."""
        names = material.things()
        several = [corpora.new_scene(rng, names, 1, 4) for _ in range(20)]
        alone = [corpora.new_single(rng, names) for _ in range(8)]
        captioned = [corpora.new_captioned(rng, names) for _ in range(6)]
        texts: list[Any] = [corpora.new_letters(rng) for _ in range(22)]
        texts += [corpora.new_number(rng) for _ in range(8)]
        pixels = drawn([*several, *alone, *captioned, *texts])
        features = self.encoder(pixels)
        pixel = F.mse_loss(self.detokenizer(features + 0.1 * torch.randn_like(features)), pixels)
        of_several, of_alone, _, of_texts = features.split([len(several), len(alone), len(captioned), len(texts)])
        # (scene, half, row, half, column, width) to one vector per place, in the order of PLACES
        places = of_several.unflatten(1, (2, 3, 2, 3)).transpose(2, 3).reshape(len(several), 4, -1)
        name, tint = torch.zeros(2, len(several), 4, dtype=torch.long).unbind()
        for row, scene in enumerate(several):
            for thing in scene.things:
                place = list(PLACES).index(thing.place)
                name[row, place] = 1 + names.index(thing.name)
                tint[row, place] = 1 + list(TINTS).index(thing.tint) if thing.tint else 0
        guesses = {
            "name": (0.1, self.name(places), name),
            "tint": (0.05, self.tint(places), tint),
            "alone": (
                0.1,
                self.alone(of_alone.flatten(1)),
                torch.tensor([1 + names.index(scene.things[0].name) for scene in alone]),
            ),
            "symbol": (
                0.4,
                self.symbols(of_texts).unflatten(-1, (2, 1 + len(SYMBOLS))),
                in_cells(texts, SIZES.grid),
            ),
        }
        loss, shown = 8 * pixel, {"pixel_mse": pixel}
        for kind, (weight, guess, wanted) in guesses.items():
            rare = self.rare if kind == "symbol" else None
            loss = loss + weight * F.cross_entropy(guess.flatten(0, -2), wanted.flatten(), rare)
            right = (guess.argmax(-1) == wanted)[wanted > 0]
            shown[f"{kind}_accuracy"] = right.float().mean() if len(right) else torch.ones(())
        return loss, shown


def encoded(model: SmallBackbone, items: list[corpora.Item]) -> list[TinyInputs]:
    """The model's inputs of new items."""

    def features(shown: list[Picture | None]) -> list[Tensor | None]:
        present = [picture for picture in shown if picture is not None]
        if not present:
            return [None] * len(shown)
        with torch.no_grad():
            found = iter(model.encoder(drawn(present)))
        return [None if picture is None else next(found) for picture in shown]

    read, written = (features([item[place] for item in items]) for place in (2, 3))
    return [
        model.assemble(Sample("", (Turn(item[0], item[1]),), item[2] and PICTURE, item[3] and PICTURE), one, other)
        for item, one, other in zip(items, read, written, strict=True)
    ]


def decoder_step(model: SmallBackbone, benchmark_share: float) -> Step:
    """Batches of 32, CE + 6 MSE."""

    def step(rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
        items = list(islice(corpora.corpus(rng, benchmark_share), 32))
        loss = model.loss(encoded(model, items))
        return loss.total, {"text_loss": loss.text, "image_mse": loss.image}

    return step


def clip_vocabulary() -> list[str]:
    """Tokens of the CLIP: pad, unknown, the words of the captions, end of text."""
    return ["<pad>", "<unknown>", *corpora.vocabulary(), "<end>"]


def clip_step(clip: Any, tokenizer: Any, model: SmallBackbone) -> Step:
    """Symmetric contrastive loss at a fixed temperature, batches of 96 pictures.

    Half are scenes to draw with their captions, in the wordings of training or others; half are scenes with tinted
    things, told by name, color and place. Half of all images pass through the autoencoder first, so that the
    de-tokenizer's blur does not lower scores.
    """

    def step(rng: Random) -> tuple[Tensor, dict[str, Tensor]]:
        shown: list[Scene] = [corpora.new_captioned(rng, material.things()) for _ in range(48)]
        texts = []
        for scene in shown:
            source = Source(rng, rng, corpora.SPLIT, (), rng.random() < 0.3)
            text = examples.caption(source, scene)
            texts.append(f"{DRAW} {text}" if rng.random() < 0.3 else text)
        shown += [corpora.new_scene(rng, material.things(), tinted=0.4) for _ in range(48)]
        texts += [corpora.told(scene) for scene in shown[48:]]
        pixels = drawn([*shown])
        with torch.no_grad():
            pixels[::2] = model.detokenizer(model.encoder(pixels[::2])).clamp(-1, 1)
        of_images = F.normalize(clip.encode_image(pixels), dim=-1)
        of_texts = F.normalize(clip.encode_text(tokenizer(texts)), dim=-1)
        cosines = of_images @ of_texts.T
        wanted = torch.arange(len(shown))
        logits = clip.logit_scale.exp() * cosines
        loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
        return loss, {
            "contrastive_loss": loss.detach(),
            "accuracy": (cosines.argmax(1) == wanted).float().mean(),
            "matched_cosine": cosines.diagonal().mean(),
            "other_cosine": (cosines.sum() - cosines.trace()) / (cosines.numel() - len(shown)),
        }

    return step
