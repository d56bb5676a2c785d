"""Writes small random models of eight families that read images and of three that do not, with their processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "type": "default", "rope_theta": 10000.0}
CORPUS = [
    "what color is the ring",
    "a red star on green",
    "user assistant",
    "how many blue rings are there in the picture",
]
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
IDEFICS = (
    "<s>{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for part in m['content'] %}"
    "{{ '<start_of_image>' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tokenizer(special: list[str], begins: bool = False, kind: Any = PreTrainedTokenizerFast, **names: str) -> Any:
    """Bytes, a few merges and special tokens. begins: whether the tokenizer itself puts <s> in front."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", *special]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(letters) + 24,
        special_tokens=special,
        initial_alphabet=letters,
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = kind(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=names
    )
    made.add_tokens(special, special_tokens=True)
    return made


def image_processor(name: str, **options: Any) -> Any:
    """An image processor, by the name that it has in this version."""
    made = getattr(transformers, name, None) or getattr(transformers, f"{name}Fast")
    return made(**PIXELS, **options)


def video_processor(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**PIXELS, **options)


def _save(folder: Path, config: Any, processor: Any, stops: list[int] | None = None) -> Path:
    torch.manual_seed(0)
    auto = (
        transformers.AutoModelForImageTextToText
        if hasattr(processor, "tokenizer")
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # So large that the likeliest tokens are clear of the others, and so that no parameter is left at zero.
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = stops or 2
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    words = tokenizer(["<image>"], begins=True)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=len(words), **LANGUAGE),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    pixels = image_processor("CLIPImageProcessor", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return _save(
        folder,
        config,
        transformers.LlavaProcessor(
            pixels, words, 4, "default", VICUNA, image_token="<image>", num_additional_image_tokens=1
        ),
    )


def write_llava_onevision(folder: Path) -> Path:
    words = tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"])
    pins = [[16, 16], [16, 32], [32, 16]]
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**{**VISION, "vision_use_head": False}),
        text_config=transformers.Qwen2Config(vocab_size=len(words), **LANGUAGE),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
    )
    pixels = image_processor(
        "LlavaOnevisionImageProcessor", size={"height": 16, "width": 16}, image_grid_pinpoints=pins
    )
    videos = video_processor("LlavaOnevisionVideoProcessor", size={"height": 16, "width": 16})
    processor = transformers.LlavaOnevisionProcessor(
        pixels,
        words,
        videos,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "'<image>\n'"),
        vision_aspect_ratio="anyres_max_9",
    )
    return _save(folder, config, processor)


QWEN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def _write_qwen(folder: Path, name: str, vision: dict[str, Any], processor: str) -> Path:
    # The processors of transformers 4 take no other class of tokenizers; that of 5 would build its own vocabulary.
    old = transformers.__version__.startswith("4.")
    words = tokenizer(QWEN, kind=transformers.Qwen2TokenizerFast if old else PreTrainedTokenizerFast)
    ids = words.convert_tokens_to_ids
    config = getattr(transformers, f"{name}Config")(
        text_config={**LANGUAGE, "vocab_size": len(words), "rope_parameters": ROPE, "rope_scaling": ROPE},
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    pixels = image_processor("Qwen2VLImageProcessor", **sizes, **limits)
    videos = video_processor(f"{'Qwen3' if name.startswith('Qwen3') else 'Qwen2'}VLVideoProcessor", **sizes, **limits)
    template = CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    made = getattr(transformers, processor)(pixels, words, videos, chat_template=template)
    return _save(folder, config, made, [2, ids("<|im_end|>")])


def write_qwen2_vl(folder: Path) -> Path:
    vision = {"depth": 2, "embed_dim": 24, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    return _write_qwen(folder, "Qwen2VL", vision, "Qwen2VLProcessor")


def write_qwen2_5_vl(folder: Path) -> Path:
    vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    return _write_qwen(folder, "Qwen2_5_VL", vision, "Qwen2_5_VLProcessor")


def write_qwen3_vl(folder: Path) -> Path:
    vision = {"depth": 2, "hidden_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
    vision |= {"intermediate_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    return _write_qwen(folder, "Qwen3VL", vision, "Qwen3VLProcessor")


def write_internvl(folder: Path) -> Path:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer([*names.values(), "<|im_start|>", "<|im_end|>"], **names)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**{**VISION, "image_size": [16, 16], "patch_size": [4, 4]}),
        text_config=transformers.Qwen2Config(vocab_size=len(words), **LANGUAGE),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    pixels = image_processor(
        "GotOcr2ImageProcessor", size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    videos = video_processor("InternVLVideoProcessor", size={"height": 16, "width": 16})
    template = CHATML.replace("IMAGE", "'<IMG_CONTEXT>\n'")
    made = transformers.InternVLProcessor(pixels, words, videos, image_seq_length=4, chat_template=template)
    return _save(folder, config, made, [2, words.convert_tokens_to_ids("<|im_end|>")])


def write_idefics3(folder: Path) -> Path:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    fixed = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *grid]
    words = tokenizer(fixed, begins=True)
    config = transformers.Idefics3Config(
        vision_config=transformers.models.idefics3.Idefics3VisionConfig(**VISION),
        text_config=transformers.LlamaConfig(vocab_size=len(words), **LANGUAGE),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    pixels = image_processor("Idefics3ImageProcessor", size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    made = transformers.Idefics3Processor(pixels, words, image_seq_len=4, chat_template=IDEFICS)
    return _save(folder, config, made, [2])


def write_gemma3(folder: Path) -> Path:
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer([*names.values(), "<start_of_turn>", "<end_of_turn>"], begins=True, **names)
    ids = words.convert_tokens_to_ids
    text = {**LANGUAGE, "sliding_window": 24, "query_pre_attn_scalar": 8, "layer_types": None}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**{**VISION, "vision_use_head": False}),
        text_config=transformers.Gemma3TextConfig(
            vocab_size=len(words), **{**text, "layer_types": ["sliding_attention", "full_attention"]}
        ),
        image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"),
        eoi_token_index=ids("<end_of_image>"),
        mm_tokens_per_image=4,
    )
    pixels = image_processor("Gemma3ImageProcessor", size={"height": 16, "width": 16})
    made = transformers.Gemma3Processor(pixels, words, image_seq_length=4, chat_template=GEMMA)
    return _save(folder, config, made, [2, ids("<end_of_turn>")])


def write_llama(folder: Path) -> Path:
    """Without a chat template, as base models are."""
    words = tokenizer([], begins=True)
    return _save(folder, transformers.LlamaConfig(vocab_size=len(words), **LANGUAGE), words)


def write_qwen3(folder: Path) -> Path:
    words = tokenizer(["<|im_start|>", "<|im_end|>"])
    words.chat_template = THINKING
    return _save(folder, transformers.Qwen3Config(vocab_size=len(words), **LANGUAGE), words)


def write_gpt2(folder: Path) -> Path:
    """Without a chat template, and with Conv1D in place of linear layers."""
    words = tokenizer([], begins=True)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return _save(folder, transformers.GPT2Config(vocab_size=len(words), **sizes), words)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llava": write_llava,
    "llava_onevision": write_llava_onevision,
    "qwen2_vl": write_qwen2_vl,
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "internvl": write_internvl,
    "idefics3": write_idefics3,
    "gemma3": write_gemma3,
}
"""Families that read images."""
TEXT_WRITERS: dict[str, Callable[[Path], Path]] = {"llama": write_llama, "qwen3": write_qwen3, "gpt2": write_gpt2}
