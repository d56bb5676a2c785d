"""Trains a vision-language model on two tasks, one after another, by TRL's SFTTrainer with MAGE's branches and average.

    python train.py MODEL FOLDER

MODEL is an image-text-to-text model of transformers: a folder, or a name on the Hugging Face Hub. FOLDER gets
`branches`, an adapter for PEFT; `merged`, a plain model; and `logits.safetensors`, which load.py compares what it loads
with.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

import cnext
from cnext.integrations.transformers import AveragingCallback

name, folder = sys.argv[1], Path(sys.argv[2])
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name)


def row(question: str, answer: str, color: str) -> dict:
    """A sample as SFTTrainer takes it; the loss is that of the completion."""
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "images": [Image.new("RGB", (48, 48), color)],
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }


colors = ("red", "green", "blue", "white")
tasks = {
    "Colors": [row("what color is the ring", color, color) for color in colors] * 4,
    "Counts": [row("how many rings are there", str(count), color) for count, color in enumerate(colors)] * 4,
}
branches = cnext.attach_mage(model)
callback = AveragingCallback("pema")
for task, rows in tasks.items():
    branches.train_on(reads=["image", "text"], writes=["text"])
    # max_length: no sequence is cut, since an image must keep all of its tokens.
    arguments = SFTConfig(
        str(folder / task),
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=None,
        bf16=torch.cuda.is_available(),
    )
    data = Dataset.from_list(rows)
    SFTTrainer(model, arguments, train_dataset=data, processing_class=processor, callbacks=[callback]).train()

branches.save_pretrained(folder / "branches")
branches.merged().save_pretrained(folder / "merged")
processor.save_pretrained(folder / "merged")

asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what color is the ring"}]}]
prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (48, 48), "blue")], text=prompt, return_tensors="pt").to(model.device)
with torch.no_grad():
    logits = model.eval()(**inputs).logits
save_file({**inputs, "logits": logits}, folder / "logits.safetensors")
