"""A training stage that goes on where it was interrupted."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

INTERVAL = 200
"""Steps between two checkpoints."""
AVERAGED = 100
"""Steps over which the last values are averaged."""
Step = Callable[[Random], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a new batch, and what is logged."""


def train(
    name: str,
    module: nn.Module,
    step: Step,
    steps: int,
    learning_rate: float,
    seed: int,
    folder: Path,
    log: Callable[[str], None],
) -> dict[str, float]:
    """Trains a module by AdamW (weight decay 0.01) with a one-cycle schedule and gradients clipped to 1.

    Every 200 steps, the module, the optimizer and the random states are written to ``folder/<name>.pt``; run again with
    the same number of steps, the stage goes on from there, with the same result to the bit.

    Returns:
        "seconds", of all parts of the stage, and the means of what is logged over the last 100 steps.
    """
    file, rng = folder / f"{name}.pt", Random(f"{name}/{seed}")
    torch.manual_seed(seed)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warmup = 0.1 if steps >= 30 else 0.3  # a tenth of ten steps is one, of which the schedule takes no part
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=warmup)
    done, before, recent = 0, 0.0, deque[dict[str, float]](maxlen=AVERAGED)
    if file.is_file():
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        if saved["steps"] != steps:
            raise SystemExit(f"{file} is of a stage of {saved['steps']} steps, not {steps}; delete it to begin anew")
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        rng.setstate(saved["python"])
        torch.set_rng_state(saved["torch"])
        done, before = saved["done"], saved["seconds"]
        recent.extend(saved["recent"])
    started = time.perf_counter()
    while done < steps:
        loss, shown = step(rng)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append({key: value.item() for key, value in shown.items()})
        done += 1
        seconds = before + time.perf_counter() - started
        if done % 100 == 0 or done == steps:
            log(f"{name}: step {done}/{steps} {_text(_means(recent))} ({seconds:.0f} s)")
        if done % INTERVAL == 0 or done == steps:
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            state = {
                "steps": steps,
                "done": done,
                "seconds": seconds,
                "recent": list(recent),
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "python": rng.getstate(),
                "torch": torch.get_rng_state(),
            }
            torch.save(state, part)
            os.replace(part, file)
            before, started = seconds, time.perf_counter()
    return {"seconds": round(before, 1), **{key: round(value, 4) for key, value in _means(recent).items()}}


def _means(recent: deque[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in recent) / len(recent) for key in recent[-1]} if recent else {}


def _text(means: dict[str, float]) -> str:
    return " ".join(f"{key} {value:.4f}" for key, value in means.items())
