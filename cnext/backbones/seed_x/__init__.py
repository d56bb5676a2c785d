"""SEED-X 17B: LLaMA-2 13B between the visual encoder of Qwen-VL and the image decoder of SDXL."""
