"""A small model with branches, tasks and trainers, and the same training as a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from cnext import attach_mage
from cnext.adapters import AttachedMage
from cnext.averaging import MovingAverage, PemaKron

STEPS = 6
TASKS = ((["text"], ["text"]), (["text", "image"], ["text"]))
"""What each task reads and writes: the second trains a branch that the first does not."""
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

Batch = dict[str, Tensor]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **SIZES))


def attached(dropout: float = 0.0) -> AttachedMage:
    return attach_mage(llama(), rank=2, dropout=dropout)


def rows(task: int, count: int = 16) -> list[Batch]:
    """Of different numbers of labels, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(task + 1)
    made = [torch.randint(1, 64, (8,), generator=generator) for _ in range(count)]
    return [
        {"input_ids": ids, "labels": ids.where(torch.arange(8) >= k % 4, torch.tensor(-100))}
        for k, ids in enumerate(made)
    ]


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "eval_strategy": "no",
        "max_grad_norm": 0.05,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return kind(**(values | changes))


class Recorder(TrainerCallback):
    """Collates as Trainer does, and keeps the batches of every optimizer step that was taken."""

    def __init__(self) -> None:
        self.pending: list[Batch] = []
        self.steps: list[list[Batch]] = []

    def __call__(self, features: list[Batch]) -> Batch:
        batch = {key: torch.stack([row[key] for row in features]) for key in features[0]}
        self.pending.append({key: value.clone() for key, value in batch.items()})
        return batch

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **context: Any) -> None:
        size = args.gradient_accumulation_steps
        self.steps.append(self.pending[:size])
        del self.pending[:size]


def train(
    model: nn.Module,
    args: TrainingArguments,
    task: int,
    *callbacks: TrainerCallback,
    resume: str | None = None,
    **options: Any,
) -> Trainer:
    """Trains a task by Trainer."""
    trainer = Trainer(model, args, train_dataset=rows(task), callbacks=list(callbacks), **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def loop(
    model: nn.Module,
    args: TrainingArguments,
    steps: list[list[Batch]],
    average: MovingAverage,
    parameters: Mapping[str, nn.Parameter],
) -> None:
    """The training of `train` as a loop: gradients, the average, clipping, the optimizer."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trainer = Trainer(model, args)  # for which parameters it decays and which labels it counts
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in trained if n in decayed], "weight_decay": args.weight_decay},
        {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, fused=True)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, len(steps))
    by_batch = average.place == "micro-batch"
    with average.task(parameters, steps=sum(map(len, steps)) if by_batch else len(steps)):
        frozen = getattr(average, "frozen", {})
        for batches in steps:
            for parameter in frozen.values():
                parameter.requires_grad_(isinstance(average, PemaKron) and average.reads)
            _, items = trainer.get_batch_samples(iter(batches), len(batches), args.device)
            for number, batch in enumerate(batches):
                if by_batch and number:
                    average.update()
                model(**batch, num_items_in_batch=items).loss.backward()
            if not by_batch:
                average.update(rate=scheduler.get_last_lr()[0] / args.learning_rate)
            for parameter in frozen.values():
                parameter.requires_grad_(False)
                parameter.grad = None
            if args.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            if by_batch:
                average.update()
            scheduler.step()
            optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """To the bit, also where training has diverged."""
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name].numpy().tobytes() != other[name].numpy().tobytes()]
