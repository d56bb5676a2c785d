"""Trains two tasks with every averaging rule, whole and killed twice; a program, started by test_killed.

python killed.py KIND FOLDER: of each rule, whole.safetensors and resumed.safetensors in FOLDER/RULE have the parameters
and the average's state, and FOLDER/statuses.json how the processes ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from integrations.trainers import TASKS, arguments, attached, llama, rows, train, values
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from cnext.averaging import RULES
from cnext.integrations.transformers import AveragingCallback

KINDS = {"trainer": list(RULES), "sft": ["pema", "pema-step"], "peft": ["pema", "pema-kron"]}
"""Trainer and TRL's SFTTrainer on `attach_mage`, and SFTTrainer on LoRA of peft: the rules that are tried with each.

SFTTrainer has the loop of Trainer and saves as it does, so a rule that merges after a task and one that acts after each
step stand for all."""
KILLED = ((0, 3), (1, 5))
"""Tasks and their steps at which a process ends; a checkpoint is written every two steps."""


class Killer(TrainerCallback):
    """Kills its own process."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, **{f"w{k}": k for k in range(1, 64)}}
    made = Tokenizer(WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="w2", unk_token="w1")


def script(kind: str, folder: Path, rule: str, kill: tuple[int, int] | None) -> None:
    """What a user runs, and runs again: every task is resumed from its last checkpoint."""
    if kind == "peft":
        model = get_peft_model(llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"))
    else:
        handle = attached(dropout=0.1)
        model = handle.model
    callback = AveragingCallback(rule)
    for task, (reads, writes) in enumerate(TASKS):
        if kind != "peft":
            handle.train_on(reads, writes)
        out = folder / f"task-{task}"
        last = get_last_checkpoint(str(out)) if out.is_dir() else None
        callbacks = [callback, Killer(kill[1] if kill and kill[0] == task else None)]
        saves = {"save_strategy": "steps", "save_steps": 2}
        if kind == "trainer":
            train(model, arguments(out, **saves), task, *callbacks, resume=last)
        else:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(task)])
            args = arguments(out, SFTConfig, bf16=False, **saves)
            options = {"processing_class": tokenizer(), "callbacks": callbacks}
            SFTTrainer(model, args, train_dataset=data, **options).train(resume_from_checkpoint=last)
    state = {f"average.{name}": tensor for name, tensor in callback.average.state_dict().items()}
    save_file(values(model) | state, folder.with_suffix(".safetensors"))


def forked(*given: Any) -> int | None:
    """The status of a process that runs `script`: it has the imports, which take long, already."""
    process = multiprocessing.get_context("fork").Process(target=script, args=given)
    process.start()
    process.join()
    return process.exitcode


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    statuses = {}
    for rule in KINDS[kind]:
        whole, resumed = folder / rule / "whole", folder / rule / "resumed"
        whole.mkdir(parents=True)
        resumed.mkdir()
        work = [(whole, None), *((resumed, kill) for kill in (*KILLED, None))]
        statuses[rule] = [forked(kind, run, rule, kill) for run, kill in work]
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    warnings.filterwarnings("ignore", "pema-literal")
    main(sys.argv[1], Path(sys.argv[2]))
