"""SEED-X 17B: LLaMA-2 13B between the visual encoder of Qwen-VL and the image decoder of SDXL.

Here are its architecture, its tokenizer, and the loading of its released files; not the interface of backbones, which
is ``cnext.backbones.base``, nor text decoding, which all backbones share.
"""
