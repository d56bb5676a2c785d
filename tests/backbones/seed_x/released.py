"""SEED-X in the released layout and with the released names, small and random; and the shapes of any size by name.

The tables of names and shapes are written out from the published files, and not taken from the model under test.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
TOKENIZER = "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
ADDED = [
    *(f"<img_{i:05d}>" for i in range(100)),
    *(f"<loc-{i}>" for i in range(224)),
    *("<img> </img> <patch> </patch> <box_start> <box_end>".split()),
]
PIECES = 360
HIDDEN, VISUAL, WIDTH, FIRST, SECOND = 64, 32, 32, 12, 20
SENTENCES = [
    "What color is the ring? Answer the question using a single word or phrase.",
    "Please provide the bounding box coordinate of the region this sentence describes: the red ring on the left.",
    "[INST] Generate an image: a dog runs over the green grass [/INST]",
    "[0.38,0.41,0.51,0.67] yes no red blue two three make the sky dark",
]


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resampler_shapes(name: str, queries: int, width: int, source: int) -> Shapes:
    return {
        f"{name}.query": (queries, width),
        f"{name}.pos_embed": (queries, width),
        f"{name}.kv_proj.weight": (width, source),
        f"{name}.attn.in_proj_weight": (3 * width, width),
        f"{name}.attn.in_proj_bias": (3 * width,),
        **linear(f"{name}.attn.out_proj", width, width),
        **norm(f"{name}.ln_q", width),
        **norm(f"{name}.ln_kv", width),
    }


def vision_shapes(width: int, layers: int, mlp: int, patch: int, positions: int, queries: int, output: int) -> Shapes:
    shapes: Shapes = {"conv1.weight": (width, 3, patch, patch), "positional_embedding": (positions, width)}
    shapes |= norm("ln_pre", width) | norm("ln_post", output) | {"proj": (output, output)}
    for number in range(layers):
        block = f"transformer.resblocks.{number}"
        shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        shapes |= linear(f"{block}.attn.in_proj", 3 * width, width) | linear(f"{block}.attn.out_proj", width, width)
        shapes |= linear(f"{block}.mlp.c_fc", mlp, width) | linear(f"{block}.mlp.c_proj", width, mlp)
    return shapes | resampler_shapes("attn_pool", queries, output, width)


def agent_shapes(hidden: int, visual: int) -> Shapes:
    ends = (
        resampler_shapes("input_resampler", 64, hidden, visual),
        resampler_shapes("output_resampler", 64, visual, hidden),
    )
    return ends[0] | ends[1] | {"patch_pos_embed": (4, hidden)}


def llm_shapes(vocabulary: int, hidden: int, mlp: int, layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes |= {f"{layer}.mlp.{name}.weight": (mlp, hidden) for name in ("gate_proj", "up_proj")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"{layer}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    return shapes | {"model.norm.weight": (hidden,)}


def prompt_shapes(width: int, inner: int, layers: int, source: int, first: int, second: int) -> Shapes:
    shapes: Shapes = {"latents": (1, 64, width), **linear("proj_in", width, source), **norm("norm_out", width)}
    for number in range(layers):
        attention, feed_forward = f"layers.{number}.0", f"layers.{number}.1"
        shapes |= (
            norm(f"{attention}.norm1", width) | norm(f"{attention}.norm2", width) | norm(f"{feed_forward}.0", width)
        )
        shapes |= {
            f"{attention}.to_q.weight": (inner, width),
            f"{attention}.to_kv.weight": (2 * inner, width),
            f"{attention}.to_out.weight": (width, inner),
            f"{feed_forward}.1.weight": (4 * width, width),
            f"{feed_forward}.3.weight": (width, 4 * width),
        }
    shapes |= linear("unet_proj_1", first, width) | linear("unet_proj_2", second, width)
    shapes |= {"unet_attnpool.positional_embedding": (65, width), **linear("unet_attnpool.c_proj", second, width)}
    for name in "qkv":
        shapes |= linear(f"unet_attnpool.{name}_proj", width, width)
    return shapes


def drawn(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors: norms near one, biases near zero, matrices that keep the scale of what goes through them."""
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 0.1 * noise + (name.endswith(".weight") and 1.0)
        else:
            tensors[name] = noise * shape[-1] ** -0.5 if len(shape) == 2 else noise * 0.1
    return tensors


def write_tokenizer(folder: Path) -> None:
    import sentencepiece

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({name: PIECES + i for i, name in enumerate(ADDED)}))


def write_sdxl(folder: Path) -> dict[str, Tensor]:
    """UNet, VAE and scheduler as diffusers saves them. Returns the UNet's state."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        cross_attention_dim=FIRST + SECOND,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=SECOND + 6 * 4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        scaling_factor=0.13025,
        sample_size=16,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    for part, name in ((unet, "unet"), (vae, "vae"), (scheduler, "scheduler")):
        part.save_pretrained(folder / name)
    return unet.state_dict()


def write_llm(folder: Path, generator: torch.Generator, shards: int = 2) -> None:
    """config.json as published, its sizes aside, and the weights in several files, rotary frequencies among them."""
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": PIECES + len(ADDED)}
    config |= {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "pretraining_tp": 2}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32", "use_cache": True}
    config |= {"initializer_range": 0.02, "rope_scaling": None, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    state = drawn(llm_shapes(PIECES + len(ADDED), HIDDEN, 96, 2), generator)
    state["lm_head.weight"] *= 3
    state |= {f"model.layers.{number}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for number in range(2)}
    names = list(state)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[number::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[number::shards], file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_released(root: Path, drawing: bool = True) -> Path:
    """The whole folder. drawing: with the de-tokenizer."""
    generator = torch.Generator().manual_seed(0)
    write_llm(root / "seed_x_i" / "llm", generator)
    write_tokenizer(root / "seed_x_i" / TOKENIZER)
    (root / "QwenViT").mkdir()
    vision = drawn(vision_shapes(VISUAL, 2, 48, 56, 16, 256, 2 * VISUAL), generator)
    torch.save(vision, root / "QwenViT" / "qwen_vit_G.pt")
    (root / "seed_x_i" / "agent").mkdir()
    torch.save(drawn(agent_shapes(HIDDEN, 2 * VISUAL), generator), root / "seed_x_i" / "agent" / "pytorch_model.bin")
    if drawing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet = write_sdxl(root / "stable-diffusion-xl-base-1.0")
        prompts = drawn(prompt_shapes(WIDTH, WIDTH, 2, 2 * VISUAL, FIRST, SECOND), generator)
        for stage in ("first", "second"):
            (root / "seed_detokenizer" / f"{stage}_stage").mkdir(parents=True)
            tuned = {f"unet.{name}": tensor + 0.01 for name, tensor in unet.items() if "attn2" in name}
            if stage == "second":
                wide = torch.randn(8, 8, 3, 3, generator=generator) * 0.1
                tuned["unet.conv_in.weight"] = wide
            state = tuned | {f"resampler.{name}": tensor for name, tensor in prompts.items()}
            torch.save(state, root / "seed_detokenizer" / f"{stage}_stage" / "pytorch_model.bin")
    return root
