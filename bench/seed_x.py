"""Benchmark of SEED-X at its published size with random weights: training on two tasks with MAGE, and generation.

    python bench/seed_x.py                 on a GPU of 80 GB; writes bench/results/<gpu>_<date>_seed-x.json
    python bench/seed_x.py --small         the same program on a small model on any machine; writes nothing

Speed and memory are those of the released weights; losses and answers are meaningless. Trains ten steps each of VQAv2
(text output) and HQEdit (image output), in bfloat16 with activation checkpointing, each followed by its average. New
tokens per second include the prefill of image and question.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from gpu import file
from torch import Tensor, nn

from cnext import adapters, methods
from cnext.backbones.pretrained import checkpoint_activations
from cnext.backbones.seed_x.drawing import Drawing, Stage
from cnext.backbones.seed_x.loading import llama_config
from cnext.backbones.seed_x.model import SeedX
from cnext.backbones.seed_x.prompt_resampler import PromptResampler, PromptSizes
from cnext.backbones.seed_x.sizes import PUBLISHED_LLM, VisionSizes
from cnext.backbones.seed_x.tokenizer import ADDED, END, Tokenizer
from cnext.tasks import suites
from cnext.tasks.base import Recipe, Sample, Turn
from cnext.training.precision import autocast
from cnext.training.trainer import TaskTrainer

TASKS = ("VQAv2", "HQEdit")
BASE_UNET = {
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
EULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Size:
    """Sizes of the model's parts. unet, vae: options of diffusers' classes that depend on the size."""

    llm: dict[str, Any]
    vision: VisionSizes
    prompts: PromptSizes
    unet: dict[str, Any]
    vae: dict[str, Any]


FULL = Size(
    PUBLISHED_LLM,
    VisionSizes(),
    PromptSizes(),
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "sample_size": 1024,
    },
)
SMALL = Size(
    PUBLISHED_LLM
    | {"vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    VisionSizes(width=32, layers=2, mlp=48, patch=56, positions=16, queries=256, output=64),
    PromptSizes(width=32, layers=2, inner=32, hidden=128, source=64, first=12, second=20),
    {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (8, 8, 16),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 2, 4),
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 44,
    },
    {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "sample_size": 16,
    },
)


@contextmanager
def unfilled(dtype: torch.dtype) -> Iterator[None]:
    """A context in which modules are made on the meta device, in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomly(module: nn.Module, device: torch.device) -> Any:
    """Moves a module from the meta device, with random weights: norms 1, biases 0, all else normal with std 0.02."""
    module.to_empty(device=device).requires_grad_(False)
    # Tables of positions are buffers, and memory that nobody has filled may hold anything.
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.dim() > 1:
            tensor.normal_(0, 0.02)
        else:
            tensor.fill_(float(name.endswith("weight")))
    return module.eval()


class RandomDrawing(Drawing):
    """A de-tokenizer with random weights in place of the released files."""

    size: Size

    def missing(self) -> str:
        return ""

    def _read(self, kind: str, part: str, **options: Any) -> Any:
        import diffusers

        return getattr(diffusers, kind)(**EULER)

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        with unfilled(torch.float32):
            vae = AutoencoderKL(**self.size.vae, scaling_factor=0.13025)
        return randomly(vae, self.device)

    @cached_property
    def first(self) -> Stage:
        from diffusers import UNet2DConditionModel

        with unfilled(self.dtype):
            unet, resampler = UNet2DConditionModel(**BASE_UNET, **self.size.unet), PromptResampler(self.size.prompts)
        return Stage(*(randomly(part, self.device) for part in (unet, resampler)))


def tokenizer(pieces: int) -> tuple[Tokenizer, list[str]]:
    """A tokenizer with that many pieces and the added tokens, and the words that are one piece."""
    import sentencepiece

    letters = string.ascii_lowercase
    words = ["".join(word) for word in itertools.islice(itertools.product(letters, repeat=4), pieces - 3)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        model_type="word",
        vocab_size=pieces,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return Tokenizer(read, {name: pieces + number for number, name in enumerate(ADDED)}), words


def backbone(size: Size, device: torch.device, dtype: torch.dtype, steps: int, folder: Path) -> tuple[SeedX, list[str]]:
    """The model, and words of its tokenizer. steps: of denoising."""
    read, words = tokenizer(size.llm["vocab_size"] - len(ADDED))
    drawing = RandomDrawing(folder, "first", None, steps, device, dtype)
    object.__setattr__(drawing, "size", size)  # of a frozen dataclass
    config = llama_config(size.llm)
    with unfilled(dtype):
        model = SeedX(config, size.vision, read, drawing)
    model = randomly(model, device)
    model.llm.model.rotary_emb = type(model.llm.model.rotary_emb)(config).to(device)
    checkpoint_activations(model.llm)
    return model, words


def samples(words: list[str], number: int, folder: Path) -> dict[str, list[Sample]]:
    """Samples of both tasks, with images of 640 by 480 pixels: with tiling, two tiles and the whole image."""
    from PIL import Image

    random = numpy.random.default_rng(0)
    images = []
    for place in range(2):
        images.append(folder / f"{place}.png")
        Image.fromarray(random.integers(0, 255, (480, 640, 3), dtype=numpy.uint8)).save(images[-1])

    def text(count: int) -> str:
        return " ".join(random.choice(words, count))

    asked = [Sample(f"v{n}", (Turn(text(20), text(2)),), images[0]) for n in range(number)]
    edits = [Sample(f"h{n}", (Turn(text(20)),), images[0], images[1], tiled=False) for n in range(number)]
    return dict(zip(TASKS, (asked, edits), strict=True))


@contextmanager
def forced_length(model: SeedX, *, picture: bool) -> Iterator[None]:
    """A context in which no answer ends early, and image answers start with an image."""
    begin = model.tokenizer["<img>"]

    def steered(_: nn.Module, __: Any, logits: Tensor) -> Tensor:
        logits[..., END] = -torch.inf
        logits[..., begin] = torch.inf if picture else -torch.inf
        return logits

    hook = model.llm.lm_head.register_forward_hook(steered)
    try:
        yield
    finally:
        hook.remove()


def measured(device: torch.device, work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Result, seconds and peak device memory of ``work``; None for the memory on a CPU."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    given = work()
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return given, {"seconds": seconds, "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if gpu else None}


def learn(model: SeedX, method: Any, name: str, data: list[Sample], recipe: Recipe) -> dict[str, Any]:
    """Trains on a task, each step timed, and averages."""
    parameters = method.trainable(suites.load("continual-next").task(name))
    steps = recipe.steps[name]
    trainer = TaskTrainer(model, method, parameters, data, recipe, steps, (0, name))
    method.before_task(parameters, steps, {})
    model.train()
    rows = [measured(model.device, trainer.train_step) for _ in range(steps)]
    model.eval()
    _, averaging = measured(model.device, method.after_task)
    # The first step has what is done once: kernels chosen and compiled, memory taken.
    typical = statistics.median(cost["seconds"] for _, cost in rows[1:])
    positions = sum(len(model.prepare(sample).ids) for sample in data)
    peaks = [cost["peak_device_memory_bytes"] for _, cost in rows]
    return {
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "steps": steps,
        "losses": [row.loss for row, _ in rows],
        "first_step_seconds": rows[0][1]["seconds"],
        "median_step_seconds": typical,
        "samples_per_second": len(data) / typical,
        "positions_per_second": positions / typical,
        "supervised_tokens_per_second": rows[0][0].tokens / typical,
        "peak_device_memory_bytes": None if None in peaks else max(peaks),
        "averaging": averaging,
    }


def answers(model: SeedX, method: Any, data: dict[str, list[Sample]], tokens: int) -> dict[str, Any]:
    """Generates text for a batch of questions, and one edited image."""
    asked, edit = data["VQAv2"], data["HQEdit"][:1]

    def answer(questions: list[Sample], picture: bool, new: int) -> Any:
        precision = autocast("bfloat16" if model.llm.dtype == torch.bfloat16 else "float32", model.device)
        with precision, forced_length(model, picture=picture), method.for_eval():
            return method.answer(questions, new, None)

    answer(asked, False, 2)
    _, text = measured(model.device, lambda: answer(asked, False, tokens))
    text |= {"answers": len(asked), "new_tokens": tokens, "tokens_per_second": len(asked) * tokens / text["seconds"]}
    picture = len(model.tokenizer.picture(1))
    (drawn,), image = measured(model.device, lambda: answer(edit, True, picture))
    assert drawn.image is not None, "the image was begun, and is drawn"
    (again,), warm = measured(model.device, lambda: answer(edit, True, picture))
    assert (drawn.image == again.image).all(), "the same noise gives the same image"
    image = warm | {"first_seconds": image["seconds"], "shape": list(drawn.image.shape), "steps": model.drawing.steps}
    return {"text": text, "image": image}


def bench(size: Size, device: torch.device, *, steps: int, batch: int, micro: int, tokens: int, denoising: int) -> Any:
    """All measurements, as written to the file."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    with tempfile.TemporaryDirectory() as made:
        (model, words), loading = measured(device, lambda: backbone(size, device, dtype, denoising, Path(made)))
        data = samples(words, batch, Path(made))
        recipe = Recipe(
            dict.fromkeys(TASKS, steps),
            batch_size=batch,
            micro_batch_size=micro,
            precision=precision,
            checkpointing=True,
            warmup_steps=1,
        )
        method = methods.load("mage")()
        suite = suites.load("continual-next")
        method.setup(model, [suite.task(name) for name in TASKS], torch.Generator().manual_seed(0))
        trained = {name: learn(model, method, name, data[name], recipe) for name in TASKS}
        return {
            "what": "SEED-X, random weights",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "precision": precision,
            "batch_size": batch,
            "micro_batch_size": micro,
            "parameters": {
                "language_model": sum(
                    p.numel() for n, p in model.llm.named_parameters() if not n.endswith((".A", ".B"))
                ),
                "visual_encoder": sum(p.numel() for p in model.vit.parameters()),
                "connections": sum(p.numel() for p in model.connections().values()),
                "branches": sum(p.numel() for p in adapters.branch_parameters(model.language_model).values()),
                "unet": sum(p.numel() for p in model.drawing.first.unet.parameters()),
                "vae": sum(p.numel() for p in model.drawing.vae.parameters()),
            },
            "building": loading,
            "training": trained,
            "answering": answers(model, method, data, tokens),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="use a small model, on a CPU if there is no GPU")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps per task (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step (default: %(default)s)")
    parser.add_argument("--micro", type=int, default=8, help="samples per micro-batch (default: %(default)s)")
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not (gpu or given.small):
        sys.exit("error: torch sees no CUDA device here; --small runs the same program on a small model")
    if given.steps < 2 or min(given.batch, given.micro) < 1:
        parser.error(
            f"expected --steps from 2, --batch and --micro from 1, got {given.steps}, {given.batch}, {given.micro}"
        )
    device = torch.device("cuda" if gpu else "cpu")
    tokens, denoising = (8, 2) if given.small else (64, 50)
    size = SMALL if given.small else FULL
    found = bench(
        size, device, steps=given.steps, batch=given.batch, micro=given.micro, tokens=tokens, denoising=denoising
    )
    text = json.dumps(found, indent=2)
    print(text)
    if not given.small:
        result = Path(f"{file('seed-x')}.json")
        result.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {result}")


if __name__ == "__main__":
    main()
