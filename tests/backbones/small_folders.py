"""Writes small random models of Janus and Emu3 into folders in the released layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

BASE = ["<pad>", "<s>", "</s>"]
JANUS = ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>"]
EMU3 = ["<image>", "<|image start|>", "<|image end|>", "<|image token|>", "<|extra_200|>", "<|extra_201|>"]
CODES = 32
VISUAL = [f"<|visual token {code:06d}|>" for code in range(CODES)]
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPREAD = 0.3
"""Standard deviation of the weights, so large that the likeliest tokens are clear of the others."""


def tokenizer(special: list[str], begins: bool, **names: str) -> PreTrainedTokenizerFast:
    """Bytes and special tokens. begins: whether the tokenizer itself puts <s> in front."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*BASE, *special, *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if begins:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=names
    )
    made.add_tokens(special, special_tokens=True)
    return made


def write_janus(folder: Path) -> Path:
    """16 pixels a side, 4 x 4 positions read, 4 x 4 codes written."""
    torch.manual_seed(0)
    words = tokenizer(
        JANUS, True, image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>"
    )
    config = JanusConfig(
        text_config=LlamaConfig(vocab_size=len(words), initializer_range=SPREAD, **LANGUAGE),
        vision_config=JanusVisionConfig(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
            num_image_tokens=16,
            mlp_ratio=2.0,
            initializer_range=SPREAD,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=4,
            num_embeddings=CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
            initializer_range=SPREAD,
        ),
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    JanusForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    janus_pixels().save_pretrained(folder)
    return folder


def janus_pixels() -> object:
    """The image processor on PIL, whose name has changed."""
    import transformers

    made = getattr(transformers, "JanusImageProcessorPil", None) or transformers.JanusImageProcessor
    return made(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=4)


def write_emu3(folder: Path) -> Path:
    """32 pixels a side, 4 x 4 codes of a picture written."""
    torch.manual_seed(0)
    words = tokenizer(
        [*EMU3, *VISUAL],
        False,
        image_token="<image>",
        boi_token="<|image start|>",
        eoi_token="<|image end|>",
        image_wrapper_token="<|image token|>",
        eof_token="<|extra_201|>",
    )
    config = Emu3Config(
        text_config=Emu3TextConfig(vocab_size=len(words), attention_dropout=0.0, initializer_range=SPREAD, **LANGUAGE),
        vq_config=Emu3VQVAEConfig(
            codebook_size=CODES,
            embed_dim=4,
            latent_channels=4,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1,
            attn_resolutions=[3],
            hidden_size=32,
            temporal_downsample_factor=1,
        ),
        vocabulary_map=words.get_vocab(),
    )
    Emu3ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64, spatial_factor=8).save_pretrained(folder)
    return folder


WRITERS = {"janus": write_janus, "emu3": write_emu3}
