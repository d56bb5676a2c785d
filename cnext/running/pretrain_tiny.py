"""Pretrains the tiny backbone from nothing: ``cnext pretrain-tiny``. Seeded, on pictures of the `pretrain` split only.

Three stages, each saved when done: the visual encoder with its detokenizer, the decoder, and the CLIP that scores
pictures. The decoder learns in two phases: first skills in templates of its own, then, for 30% of the batch, the
benchmark's templates on narrower data. Without the second phase the first task learnt wipes out all the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.tiny.model import Encoded, TinyBackbone
from cnext.backbones.tiny.vision import WIDTH, to_input
from cnext.scoring.clip import build_tiny_clip
from cnext.tasks import scenes, synthetic
from cnext.tasks.base import Sample, Turn
from cnext.tasks.scenes import COLORS, ICONS, PLACES, SHAPES, Icon, Lettering, Scene
from cnext.tasks.synthetic import Example

SAYABLE = [*COLORS, *SHAPES, *ICONS]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PICTURE = Path("picture")
"""Stands for "a picture is read (or written)" in samples that exist in memory only."""


def _kept(make: Callable[[], Any], content: Callable[[Any], str]) -> Any:
    """The first thing made that belongs to the `pretrain` split."""
    while True:
        made = make()
        if scenes.split_of(content(made)) == "pretrain":
            return made


def _scene(rng: Random, fewest: int = 1, most: int = 3) -> Scene:
    return _kept(lambda: scenes.random_scene(rng, fewest, most), scenes.key)


def _letters(rng: Random, fewest: int = 3, most: int = 3) -> Lettering:
    def make() -> Lettering:
        return scenes.random_lettering(rng, "".join(rng.choices(LETTERS, k=rng.randint(fewest, most))))

    return _kept(make, scenes.key)


def _icon(rng: Random) -> Icon:
    return _kept(lambda: scenes.random_icon(rng), scenes.key)


# ---- the decoder's corpus: (instruction, answer, picture read or None, picture written or None)
Item = tuple[str, str, Any, Any]


def _caption(rng: Random) -> Item:
    scene = _scene(rng)
    return "Describe the picture.", scene.caption, scene, None


def _question(rng: Random) -> Item:
    scene = _scene(rng)
    thing = rng.choice(scene.things)
    asked, answer = rng.choice(
        (
            (f"color of {thing.shape}", thing.color),
            (f"shape of {thing.color}", thing.shape),
            (f"shape at {thing.place}", thing.shape),
            (f"color at {thing.place}", thing.color),
            ("how many", str(len(scene.things))),
        )
    )
    if rng.random() < 0.5:
        return f"Short: {asked}", answer, scene, None
    return f"Tell me {asked}", f"it is {answer}", scene, None


def _location(rng: Random) -> Item:
    scene = _scene(rng)
    thing = rng.choice(scene.things)
    asked = rng.choice((thing.shape, thing.color, f"{thing.color} {thing.shape}"))
    x1, y1, x2, y2 = (min(max(round(100 * edge / scenes.SIZE), 0), 99) for edge in thing.box)
    if rng.random() < 0.4:
        return f"Find {asked}", f"at {(x1 + x2) // 2:02d} {(y1 + y2) // 2:02d}", scene, None
    return f"Where is {asked}", f"x {x1:02d} y {y1:02d} x {x2:02d} y {y2:02d}", scene, None


def _spelling(rng: Random) -> Item:
    lettering = _letters(rng)
    return "Read letters", f"text: {lettering.word}", lettering, None


def _drawing(rng: Random) -> Item:
    scene = _scene(rng, 1, 2)
    return "Draw " + "; ".join(f"{t.color} {t.shape} {t.place}" for t in scene.things), "", None, scene


def _edit(rng: Random) -> Item:
    def make() -> tuple[str, Example]:
        kind = rng.choice(("color", "shape", "remove", "add"))
        return kind, synthetic.editing(rng, (kind,))

    kind, example = _kept(make, lambda made: made[1].content)
    # The same edit in words of the corpus's own, so that the benchmark's phrasing stays to be learnt.
    words = [word for word in example.instruction.lower().rstrip(".").split() if word in {*COLORS, *SHAPES}]
    verb = {"color": "recolor", "shape": "morph", "remove": "erase", "add": "paint"}[kind]
    place = f" {example.target.things[-1].place}" if kind == "add" else ""
    return f"{verb} {' '.join(words)}{place}", "", example.picture, example.target


def _copy(rng: Random) -> Item:
    picture = rng.choice((_scene, _icon))(rng)
    return "Copy picture", "", picture, picture


def _saying(rng: Random) -> Item:
    """Words repeated. A word that was never written in pretraining could not be told from the others of its kind."""
    words = " ".join(rng.sample(SAYABLE, rng.randint(1, 4)))
    return f"Say: {words}", words, None, None


CORPUS: dict[Callable[[Random], Item], float] = {
    _caption: 0.15,
    _question: 0.21,
    _location: 0.19,
    _spelling: 0.15,
    _drawing: 0.12,
    _edit: 0.12,
    _copy: 0.02,
    _saying: 0.04,
}
SEEN_ICONS = ("house", "fish", "cup", "face")


def _reading_letters(rng: Random) -> Example:
    lettering = _letters(rng, 2, 2)
    return Example(synthetic.reading(rng).instruction, lettering.word, lettering)


NARROW: tuple[Callable[[Random], Example], ...] = (
    lambda rng: synthetic.vqa(rng, ("color", "shape", "count")),
    lambda rng: synthetic.classification(rng, SEEN_ICONS),
    lambda rng: synthetic.text_to_image(rng, 1),
    _reading_letters,
    lambda rng: synthetic.grounding(rng, 1),
    lambda rng: synthetic.editing(rng, ("color", "remove")),
)


def _official(rng: Random) -> Item:
    """The benchmark's template on narrower data than the benchmark's."""
    make = rng.choice(NARROW)
    example = _kept(lambda: make(rng), lambda made: made.content)
    if example.instruction == synthetic.DRAW:
        return f"{example.instruction} {example.answer}", "", None, example.picture
    return example.instruction, example.answer, example.picture, example.target


def corpus(seed: int, official_share: float) -> Iterator[Item]:
    """The decoder's endless pretraining corpus; ``official_share`` of it in the benchmark's own templates."""
    rng = Random(f"pretrain/{seed}/{official_share}")
    while True:
        if rng.random() < official_share:
            yield _official(rng)
        else:
            yield rng.choices(list(CORPUS), list(CORPUS.values()))[0](rng)


def _encode(model: TinyBackbone, items: list[Item]) -> list[Encoded]:
    def features(column: int) -> list[Tensor | None]:
        pixels = [scenes.draw(item[column]) for item in items if item[column] is not None]
        if not pixels:
            return [None] * len(items)
        with torch.no_grad():
            encoded = iter(model.encoder(to_input(torch.from_numpy(numpy.stack(pixels)))))
        return [next(encoded) if item[column] is not None else None for item in items]

    return [
        model.assemble(
            Sample("", (Turn(item[0], item[1]),), PICTURE if item[2] else None, PICTURE if item[3] else None),
            read,
            written,
        )
        for item, read, written in zip(items, features(2), features(3), strict=True)
    ]


class _Descent:
    """AdamW on a one-cycle schedule with clipping, and a log line now and then."""

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
    """Autoencoder with semantic heads, which stand for the semantics of a pretrained encoder.

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
    descent = _Descent([model.encoder, model.detokenizer, heads], 2e-3, steps, log)
    shown: dict[str, Tensor] = {}
    for _ in range(steps):
        drawn, icons, words = (
            [_scene(rng) for _ in range(28)],
            [_icon(rng) for _ in range(12)],
            [_letters(rng) for _ in range(32)],
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
        descent.step(loss, **shown)
    return {name: round(value.item(), 4) for name, value in shown.items()}


def pretrain_decoder(
    model: TinyBackbone, phases: tuple[int, int], seed: int, log: Callable[[str], None]
) -> dict[str, float]:
    """Both phases of the decoder: AdamW, batches of 32, CE + 6 MSE. Returns: the last 100 steps' mean losses."""
    torch.manual_seed(seed)
    model.encoder.requires_grad_(False)
    model.detokenizer.requires_grad_(False)
    final: dict[str, float] = {}
    for phase, (steps, share, rate) in enumerate(zip(phases, (0.0, 0.3), (2.5e-3, 2e-3), strict=True), 1):
        descent = _Descent([model], rate, steps, log)
        stream = corpus(seed, share)
        recent: list[tuple[Tensor, Tensor]] = []
        for _ in range(steps):
            loss = model.loss(_encode(model, [next(stream) for _ in range(32)]))
            descent.step(loss.total, text=loss.text, image=loss.image)
            recent = [*recent[-99:], (loss.text, loss.image)]
        text, image = torch.tensor(recent).mean(0).tolist()
        final |= {f"phase_{phase}_text_loss": round(text, 4), f"phase_{phase}_image_mse": round(image, 4)}
    return final


def clip_vocabulary() -> list[str]:
    """Pad, unknown, every word of the captions and of the instruction before them, end of text."""
    words = {*COLORS, *SHAPES, *["a", "an", "in", "the", "and", "please", "generate", "image"]}
    words |= {word for place in PLACES for word in place.split()}
    return ["<pad>", "<unknown>", *sorted(words), "<end>"]


def _pictured_caption(rng: Random, scene: Scene) -> str:
    """The scene's caption, its shapes in any order, now and then with the benchmark's instruction before it."""
    caption = Scene(tuple(rng.sample(scene.things, len(scene.things))), scene.background).caption
    return f"{synthetic.DRAW} {caption}" if rng.random() < 0.3 else caption


def pretrain_clip(
    model: TinyBackbone, steps: int, seed: int, log: Callable[[str], None]
) -> tuple[nn.Module, dict[str, float]]:
    """The CLIP that scores pictures: symmetric contrastive loss at a fixed temperature, batches of 96 scenes.

    Half of the pictures pass through the autoencoder first, so that the detokenizer's blur is not held against it.
    Returns: the model and its final loss, in-batch accuracy, and cosines of matched and of other pairs.
    """
    torch.manual_seed(seed)
    rng = Random(f"clip/{seed}")
    clip, _, tokenizer = build_tiny_clip(clip_vocabulary())
    clip.logit_scale.requires_grad_(False)
    clip.train()
    descent = _Descent([clip], 1e-3, steps, log)
    shown: dict[str, Tensor] = {}
    for _ in range(steps):
        drawn = [_scene(rng, 1, 3) for _ in range(96)]
        pixels = to_input(torch.from_numpy(numpy.stack([scenes.draw(scene) for scene in drawn])))
        with torch.no_grad():
            pixels[::2] = model.detokenizer(model.encoder(pixels[::2])).clamp(-1, 1)
        images = clip.encode_image(pixels, normalize=True)
        texts = clip.encode_text(tokenizer([_pictured_caption(rng, scene) for scene in drawn]), normalize=True)
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
        descent.step(loss, **shown)
    return clip.eval(), {name: round(value.item(), 4) for name, value in shown.items()}


def _save(module: nn.Module, path: Path) -> None:
    """Weights in float16: half the size, and the losses are measured after the rounding."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}, path)


STAGES = {"vision": 2200, "decoder phase 1": 2600, "decoder phase 2": 1300, "clip": 1200}


def pretrain(out: Path, seed: int = 0, scale: float = 1.0, threads: int = 1) -> None:
    """Runs all stages and writes the weights, the vocabulary and the model card below ``out``.

    The layout is that of the package: ``cnext pretrain-tiny --out cnext`` in a checkout replaces what ships.
    """
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
