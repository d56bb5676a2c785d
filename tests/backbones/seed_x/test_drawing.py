"""The de-tokenizer: first stage against diffusers' pipeline, second against an explicit loop."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from cnext.backbones.seed_x.drawing import Drawing
from cnext.backbones.seed_x.prompt_resampler import Perceiver, Pool
from cnext.errors import UserError

# diffusers turns a tensor into an array in a way that numpy 2 announces to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def drawing(folder: Path, **options: object) -> Drawing:
    values = {"edit_stage": "second", "resolution": None, "steps": 3} | options
    return Drawing(folder, device=torch.device("cpu"), dtype=torch.float32, **values)


def features(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 64, 64, generator=generator), torch.randn(64, 64, generator=generator)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("source") / "a.png"
    Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=numpy.uint8)).save(path)
    return path


@torch.no_grad()
def test_the_first_stage_equals_the_pipeline_of_diffusers(folder: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    own, (wanted, nothing) = drawing(folder), features(2)
    unet, resampler = own.first.unet, own.first.resampler
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "stable-diffusion-xl-base-1.0" / "scheduler")
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline(vae=own.vae, unet=unet, scheduler=scheduler, add_watermarker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    prompts, pooled = resampler(wanted)
    without, without_pooled = resampler(nothing[None])
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(42))
    for number, image in enumerate(own.draw(wanted, nothing, [None, None])):
        expected = pipeline(
            prompt_embeds=prompts[number : number + 1],
            pooled_prompt_embeds=pooled[number : number + 1],
            negative_prompt_embeds=without,
            negative_pooled_prompt_embeds=without_pooled,
            latents=noise[None],
            num_inference_steps=3,
            guidance_scale=7.5,
            output_type="np",
        ).images[0]
        assert image.shape == (16, 16, 3)
        assert image.dtype == numpy.uint8
        assert numpy.abs(image - expected * 255).max() < 0.51
    assert own.draw(wanted, nothing, [None, None])[0].std() > 1, "not a flat image"


@torch.no_grad()
def test_the_second_stage_equals_a_loop_over_steps(folder: Path, source: Path) -> None:
    from diffusers import EulerDiscreteScheduler
    from PIL import Image

    own, (wanted, nothing) = drawing(folder), features(1)
    stage, vae = own.second, own.vae
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "stable-diffusion-xl-base-1.0" / "scheduler")
    scheduler.set_timesteps(3)
    pixels = torch.from_numpy(numpy.array(Image.open(source).resize((16, 16)))).permute(2, 0, 1)[None] / 127.5 - 1
    seen = vae.encode(pixels).latent_dist.mode()
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(42))[None] * scheduler.init_noise_sigma
    times = torch.tensor([[16.0, 16, 0, 0, 16, 16]])

    def noise(of: Tensor, condition: Tensor, time: Tensor) -> Tensor:
        prompts, pooled = stage.resampler(of)
        inputs = torch.cat([scheduler.scale_model_input(x, time), condition], 1)
        added = {"text_embeds": pooled, "time_ids": times}
        return stage.unet(inputs, time, encoder_hidden_states=prompts, added_cond_kwargs=added).sample

    for step, time in enumerate(scheduler.timesteps):
        # Guidance of denoised images, as the released pipeline has it, and back: the weights' sum is one.
        sigma = scheduler.sigmas[step]
        both, image, neither = (
            x - sigma * noise(*of, time)
            for of in ((wanted, seen), (nothing[None], seen), (nothing[None], torch.zeros_like(seen)))
        )
        guided = neither + 7.5 * (both - image) + 1.5 * (image - neither)
        x = scheduler.step((guided - x) / -sigma, time, x).prev_sample
    expected = vae.decode(x / 0.13025).sample[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
    drawn = own.draw(wanted, nothing, [source])[0]
    assert numpy.abs(drawn - expected.clip(0, 255)).max() < 1
    first = drawing(folder, edit_stage="first").draw(wanted, nothing, [source])[0]
    assert (first == own.draw(wanted, nothing, [None])[0]).all(), "the first stage does not see the source"
    assert (first != drawn).any()


def test_an_image_does_not_depend_on_its_batch(folder: Path, source: Path) -> None:
    own, (wanted, nothing) = drawing(folder, resolution=8, steps=1), features(6)
    sources = [None, source, None, None, source, None]
    together = own.draw(wanted, nothing, sources)
    assert together[0].shape == (8, 8, 3)
    for number in (0, 4, 5):
        alone = own.draw(wanted[number : number + 1], nothing, sources[number : number + 1])[0]
        assert numpy.abs(alone.astype(int) - together[number]).max() <= 1


@pytest.mark.parametrize("noise", ["cpu", "device"])
def test_where_the_noise_is_drawn(folder: Path, noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device than the CPU its generator is asked for, and none is made on the CPU."""
    asked: list[torch.device] = []

    class Recorded(torch.Generator):
        def __new__(cls, *device: torch.device) -> torch.Generator:
            asked.extend(device)
            return super().__new__(cls, *device)

    own = drawing(folder, resolution=8, steps=1, noise=noise)
    object.__setattr__(own, "device", torch.device("cpu", 0))
    monkeypatch.setattr(torch, "Generator", Recorded)
    own.draw(*features(1), [None])
    assert asked == [torch.device("cpu") if noise == "cpu" else torch.device("cpu", 0)]


def test_stage_weights_replace_those_of_sdxl(folder: Path) -> None:
    own = drawing(folder)
    file = folder / "seed_detokenizer" / "second_stage" / "pytorch_model.bin"
    tuned = torch.load(file, weights_only=True)
    for name, tensor in own.second.unet.state_dict().items():
        if f"unet.{name}" in tuned:
            assert torch.equal(tensor, tuned[f"unet.{name}"])
    assert own.second.unet.conv_in.weight.shape == (8, 8, 3, 3)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    assert torch.equal(own.first.unet.state_dict()[name], tuned[f"unet.{name}"])


def test_parts_saved_only_in_half_precision_are_found(folder: Path, tmp_path: Path) -> None:
    sdxl = tmp_path / "stable-diffusion-xl-base-1.0"
    (tmp_path / "seed_detokenizer").symlink_to(folder / "seed_detokenizer")
    shutil.copytree(folder / sdxl.name, sdxl)
    for part in ("unet", "vae"):
        file = sdxl / part / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    own, (wanted, nothing) = drawing(tmp_path, steps=1), features(1)
    assert own.missing() == ""
    assert (own.draw(wanted, nothing, [None])[0] == drawing(folder, steps=1).draw(wanted, nothing, [None])[0]).all()


def test_a_detokenizer_for_another_unet_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "seed_detokenizer" / "first_stage" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    (tmp_path / "stable-diffusion-xl-base-1.0").symlink_to(folder / "stable-diffusion-xl-base-1.0")
    stage = tmp_path / "seed_detokenizer" / "first_stage"
    stage.mkdir(parents=True)

    def message(change: dict[str, Tensor], without: str = " ") -> str:
        torch.save({k: v for k, v in (state | change).items() if not k.startswith(without)}, stage / file.name)
        with pytest.raises(UserError) as caught:
            drawing(tmp_path, edit_stage="first").draw(*features(1), [None])
        return str(caught.value)

    assert "of another shape: conv_in.bias (9,), expected (8,)" in message({"unet.conv_in.bias": torch.ones(9)})
    assert "1 not of this model: strange" in message({"unet.strange": torch.ones(9)})
    assert "1 missing: norm_out.bias" in message({}, "resampler.norm_out.bias")
    assert "expected resampler.latents, resampler.proj_in" in message({}, "resampler.")
    narrow = {"resampler.unet_proj_1.weight": torch.ones(11, 32), "resampler.unet_proj_1.bias": torch.ones(11)}
    assert "expected prompts of width 32 and 20" in message(narrow)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_parts_of_sdxl_that_cannot_be_read_are_named(folder: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(folder / "stable-diffusion-xl-base-1.0", tmp_path / "stable-diffusion-xl-base-1.0")
    (tmp_path / "seed_detokenizer").symlink_to(folder / "seed_detokenizer")
    next((tmp_path / "stable-diffusion-xl-base-1.0" / part).glob("*config.json")).write_text("{")
    with pytest.raises(UserError, match=rf"{part}: expected {part} of SDXL"):
        drawing(tmp_path).draw(*features(1), [None])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("stable-diffusion-xl-base-1.0/unet/diffusion_pytorch_model.safetensors", b"cut", "expected unet of SDXL"),
        ("stable-diffusion-xl-base-1.0/vae/config.json", b"{", "expected a JSON file of SDXL"),
        ("seed_detokenizer/first_stage/pytorch_model.bin", b"cut", "expected a file of tensors"),
        ("seed_detokenizer/second_stage/pytorch_model.bin", b"", "it ends too early"),
    ],
    ids=["unet", "config", "first stage", "second stage"],
)
def test_check_files_finds_broken_parts(folder: Path, tmp_path: Path, file: str, content: bytes, message: str) -> None:
    for part in ("stable-diffusion-xl-base-1.0", "seed_detokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    drawing(tmp_path, edit_stage="second").check_files()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        drawing(tmp_path, edit_stage="second").check_files()
    assert str(tmp_path / file) in str(caught.value)
    if "second" in file:
        drawing(tmp_path, edit_stage="first").check_files()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sixteen heads of one sample."""
    size = q.shape[1] // 16
    cuts = [slice(head * size, (head + 1) * size) for head in range(16)]
    return torch.cat([(q[:, c] @ k[:, c].T / math.sqrt(size)).softmax(-1) @ v[:, c] for c in cuts], 1)


@torch.no_grad()
def test_prompt_resampler_head_by_head() -> None:
    torch.manual_seed(0)
    layer, x, latents = Perceiver(32, 64), torch.randn(1, 7, 32), torch.randn(1, 3, 32)
    seen, own = layer.norm1(x)[0], layer.norm2(latents)[0]
    kv = layer.to_kv(torch.cat([seen, own]))
    expected = attended(layer.to_q(own), kv[:, :64], kv[:, 64:]) @ layer.to_out.weight.T
    torch.testing.assert_close(layer(x, latents)[0], expected)
    pool = Pool(7, 32, 20)
    torch.nn.init.normal_(pool.positional_embedding)
    tokens = torch.cat([x[0].mean(0, keepdim=True), x[0]]) + pool.positional_embedding
    expected = pool.c_proj(attended(pool.q_proj(tokens[:1]), pool.k_proj(tokens), pool.v_proj(tokens)))
    torch.testing.assert_close(pool(x), expected)
