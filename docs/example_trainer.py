"""Two tasks, one after another, by transformers' Trainer with MAGE's average: `python example_trainer.py FOLDER`.

Run it again after an interruption: it resumes. Replace `model`, `tasks` and the arguments by your own.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import cnext
from cnext.integrations.transformers import AveragingCallback

folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
tasks = {name: [{"input_ids": row, "labels": row} for row in torch.randint(100, (32, 12))] for name in ("A", "B")}

branches = cnext.attach_mage(model)
callback = AveragingCallback("pema-kron", pull=0.02)  # or any other rule, or a cnext.averaging.MovingAverage
for name, dataset in tasks.items():
    branches.train_all()  # or, as in the paper, train_on(reads=["text"], writes=["text"])
    output = folder / name
    args = TrainingArguments(str(output), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, save_steps=2)
    trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)) if output.is_dir() else None)
    # The parameters, and the last checkpoint, are now the average.
branches.merge()
