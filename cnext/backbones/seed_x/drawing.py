"""The de-tokenizer of SEED-X: SDXL decodes features to images, with features in place of a text prompt.

The released evaluation uses the first stage for all images, edits included: an edit keeps of its source what the
features say. The second stage is conditioned on the source image as well.

Reference: SEED-X, arXiv 2404.14396; InstructPix2Pix, arXiv 2211.09800, for the guidance by two conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from cnext.backbones.seed_x.folder import NAMES, check, fill
from cnext.backbones.seed_x.prompt_resampler import PromptResampler, PromptSizes
from cnext.errors import UserError, parse_json, unknown
from cnext.image_files import open_image
from cnext.regular_files import read_bytes, require_regular
from cnext.tensor_files import read_tensors

SDXL = "stable-diffusion-xl-base-1.0"
STAGES = ("first", "second")
NOISES = ("cpu", "device")
GUIDANCE, IMAGE_GUIDANCE = 7.5, 1.5
SEED = 42
IMAGES = 4
"""Images per denoising loop."""


@dataclass(frozen=True)
class Drawing:
    """Location and options of the de-tokenizer. It is loaded when the first image is decoded.

    root: the released folder.  edit_stage: "first" or "second", the stage for images that have a source.
    resolution: side of an image in pixels; None: SDXL's own, 1024.  steps: of denoising.
    noise: where it is drawn: "cpu", the same on every device, or "device", as in the authors' evaluation.

    Raises:
        UserError: an option out of range.
    """

    root: Path
    edit_stage: str
    resolution: int | None
    steps: int
    device: torch.device
    dtype: torch.dtype
    noise: str = "cpu"

    def __post_init__(self) -> None:
        if self.edit_stage not in STAGES:
            raise unknown("edit_stage", self.edit_stage, STAGES)
        if self.noise not in NOISES:
            raise unknown("noise", self.noise, NOISES)
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise UserError(f"resolution must be a multiple of 8, got {self.resolution}")
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")

    def stage_file(self, stage: str) -> Path:
        """The released weights of a stage."""
        folder = self.root / "seed_detokenizer" / f"{stage}_stage"
        return next((folder / name for name in NAMES if (folder / name).is_file()), folder / NAMES[0])

    def missing(self) -> str:
        """Which files are missing and where they are expected, as an error message; "" if none are."""
        sdxl = self.root / SDXL
        stages = dict.fromkeys(("first", self.edit_stage))
        needed = [self.stage_file(stage) for stage in stages]
        needed += [sdxl / part / "config.json" for part in ("unet", "vae")]
        needed.append(sdxl / "scheduler" / "scheduler_config.json")
        missing = [str(path.relative_to(self.root)) for path in needed if not path.is_file()]
        for part in ("unet", "vae"):
            if not any((sdxl / part).glob("diffusion_pytorch_model*.safetensors*")):
                missing.append(f"{SDXL}/{part}/diffusion_pytorch_model.safetensors")
        if not missing:
            return ""
        return (
            f"to write images SEED-X needs its de-tokenizer; expected in {self.root}, and not there: "
            f"{', '.join(missing)}. seed_detokenizer is at AILab-CVC/SEED-X-17B on Hugging Face, and the other at "
            f"stabilityai/{SDXL}"
        )

    def check_files(self) -> None:
        """Raises UserError where a file cannot be read, before a run and not at its first image."""
        from safetensors import SafetensorError, safe_open

        for stage in dict.fromkeys(("first", self.edit_stage)):
            read_tensors(self.stage_file(stage))
        sdxl = self.root / SDXL
        for path in (sdxl / "unet/config.json", sdxl / "vae/config.json", sdxl / "scheduler/scheduler_config.json"):
            try:
                parse_json(read_bytes(path))
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: expected a JSON file of SDXL as diffusers saves it: {error}") from error
        for part in ("unet", "vae"):
            for path in sorted((sdxl / part).glob("diffusion_pytorch_model*.safetensors")):
                try:
                    require_regular(path)
                    with safe_open(path, "pt"):
                        pass
                except (OSError, SafetensorError) as error:
                    raise UserError(
                        f"{path}: expected {part} of SDXL; cannot read it: {error}; copy it again"
                    ) from error

    @cached_property
    def vae(self) -> Any:
        """The VAE, in float32: SDXL's overflows in half precision."""
        return self._part("AutoencoderKL", "vae", torch.float32)

    @cached_property
    def first(self) -> Stage:
        """The stage that is conditioned on features alone."""
        return self._stage("first")

    @cached_property
    def second(self) -> Stage:
        """The stage that is conditioned on features and the source image."""
        return self._stage("second")

    def _read(self, kind: str, part: str, **options: Any) -> Any:
        """A part of SDXL as an object of a diffusers class. Raises UserError where it cannot be loaded."""
        import diffusers

        folder = self.root / SDXL / part
        try:
            return getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{folder}: expected {part} of SDXL as diffusers saves it; cannot load it: {reason}"
            ) from error

    def _part(self, kind: str, part: str, dtype: torch.dtype) -> Any:
        plain = any((self.root / SDXL / part).glob("diffusion_pytorch_model.safetensors*"))
        model = self._read(kind, part, torch_dtype=dtype, use_safetensors=True, variant=None if plain else "fp16")
        return model.requires_grad_(False).eval().to(self.device)

    def _stage(self, name: str) -> Stage:
        file = self.stage_file(name)
        unet = self._part("UNet2DConditionModel", "unet", self.dtype)
        state = read_tensors(file)
        if name == "second":
            unet.conv_in = _with_double_inputs(unet.conv_in)
        tuned = {key.removeprefix("unet."): tensor for key, tensor in state.items() if key.startswith("unet.")}
        own = unet.state_dict()
        check(f"{file}, unet", own, tuned, optional=".*")
        for key, tensor in tuned.items():
            own[key].copy_(tensor)
        prompts = {key.removeprefix("resampler."): t for key, t in state.items() if key.startswith("resampler.")}
        sizes = PromptSizes.of(prompts, str(file))
        width, pooled = unet.config.cross_attention_dim, unet.add_embedding.linear_1.in_features
        pooled -= 6 * unet.config.addition_time_embed_dim
        if (sizes.first + sizes.second, sizes.second) != (width, pooled):
            raise UserError(
                f"{file}: expected prompts of width {width} and {pooled} as the UNet of {SDXL} takes them, found "
                f"{sizes.first + sizes.second} and {sizes.second}"
            )
        with torch.device("meta"):
            resampler = PromptResampler(sizes).requires_grad_(False).eval()
        fill(resampler, [file], self.dtype, lambda _: self.device, prefix="resampler.")
        return Stage(unet, resampler)

    @torch.no_grad()
    def draw(self, features: Tensor, blank: Tensor, sources: Sequence[Path | None]) -> list[numpy.ndarray]:
        """Images, (H, W, 3) uint8 each, of features (N, 64, width).

        Args:
            blank: (64, width) features of an empty image, for classifier-free guidance.
            sources: for each the image that is edited, or None.
        """
        edits = [self.edit_stage == "second" and source is not None for source in sources]
        images: dict[int, numpy.ndarray] = {}
        for edit in (False, True):
            indices = [index for index, one in enumerate(edits) if one == edit]
            for start in range(0, len(indices), IMAGES):
                chunk = indices[start : start + IMAGES]
                edited = [source for index in chunk if (source := sources[index])] if edit else None
                with torch.autocast(self.device.type, enabled=False):
                    latents = self._denoise(features[chunk], blank, edited)
                    images |= {index: self._pixels(latent[None]) for index, latent in zip(chunk, latents, strict=True)}
        return [images[index] for index in range(len(sources))]

    def _denoise(self, features: Tensor, blank: Tensor, sources: list[Path] | None) -> Tensor:
        """Latents by Euler's method with classifier-free guidance.

        e_u + 7.5 (e_c - e_u), or with sources e_u + 7.5 (e_c - e_i) + 1.5 (e_i - e_u), where the noise e is predicted
        with both conditions (c), with the source alone (i), or with neither (u).
        """
        stage = self.first if sources is None else self.second
        scheduler = self._read("EulerDiscreteScheduler", "scheduler")
        scheduler.set_timesteps(self.steps, device=self.device)
        count, side = len(features), self.side(stage.unet)
        given = [features, *[blank.expand_as(features)] * (1 if sources is None else 2)]
        prompts, pooled = stage.resampler(torch.cat(given).to(self.device, self.dtype))
        times = torch.tensor([side, side, 0, 0, side, side], device=self.device, dtype=self.dtype)
        added = {"text_embeds": pooled, "time_ids": times.expand(len(pooled), -1)}
        conditions = None
        if sources is not None:
            encoded = self._encode(sources, side)
            conditions = torch.cat([encoded, encoded, torch.zeros_like(encoded)]).to(self.dtype)
        # The same noise for every image: an image does not depend on the others of its batch.
        drawn_on = torch.device("cpu") if self.noise == "cpu" else self.device
        generator = torch.Generator(drawn_on).manual_seed(SEED)
        shape = (self.vae.config.latent_channels, *[side // self.shrink] * 2)
        latents = torch.randn(shape, generator=generator, device=drawn_on).to(self.device).repeat(count, 1, 1, 1)
        latents = latents * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, time).to(self.dtype).repeat(len(given), 1, 1, 1)
            inputs = scaled if conditions is None else torch.cat([scaled, conditions], 1)
            noise = stage.unet(inputs, time, encoder_hidden_states=prompts, added_cond_kwargs=added).sample.float()
            both, *without = noise.chunk(len(given))
            guided = without[-1] + GUIDANCE * (both - without[0])
            if conditions is not None:
                guided = guided + IMAGE_GUIDANCE * (without[0] - without[1])
            latents = scheduler.step(guided, time, latents).prev_sample
        return latents

    @property
    def shrink(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def side(self, unet: Any) -> int:
        """Side of an image in pixels."""
        return self.resolution or unet.config.sample_size * self.shrink

    def _encode(self, sources: Sequence[Path], side: int) -> Tensor:
        """Latents of images: the posterior's mode, without SDXL's scaling factor, as the second stage was trained."""
        resized = [numpy.asarray(open_image(source).resize((side, side))) for source in sources]
        pixels = torch.from_numpy(numpy.stack(resized)).permute(0, 3, 1, 2).to(self.device)
        return torch.cat([self.vae.encode(one / 127.5 - 1).latent_dist.mode() for one in pixels.float().split(1)])

    def _pixels(self, latents: Tensor) -> numpy.ndarray:
        image = self.vae.decode(latents / self.vae.config.scaling_factor).sample[0]
        return (image * 127.5 + 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy()


@dataclass(frozen=True)
class Stage:
    """A UNet of diffusers, and the resampler that computes its prompts."""

    unet: Any
    resampler: PromptResampler


def _with_double_inputs(layer: torch.nn.Conv2d) -> torch.nn.Conv2d:
    """The layer with twice the input channels, the new ones with zero weights."""
    sizes: Any = (layer.kernel_size, layer.stride, layer.padding)
    wide = torch.nn.Conv2d(2 * layer.in_channels, layer.out_channels, *sizes)
    wide = wide.to(layer.weight).requires_grad_(False)
    wide.weight.zero_()
    wide.weight[:, : layer.in_channels] = layer.weight
    if wide.bias is not None and layer.bias is not None:
        wide.bias.copy_(layer.bias)
    return wide
