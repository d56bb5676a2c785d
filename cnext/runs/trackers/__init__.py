"""Trackers: other places that a run is logged to, besides its own train.jsonl and scores.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cnext.config.run_config import RunConfig
from cnext.runs.trackers.base import Tracker
from cnext.runs.trackers.tensorboard import EventLog
from cnext.runs.trackers.wandb import WandbLog


def begin(
    config: RunConfig, values: Mapping[str, Any], ends: Mapping[int, int], say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers that ``log`` names.

    Args:
        values: the content of config.json.
        ends: optimizer steps done by the end of each stage, 0 included.
        say: shows a line.
    """
    folder, found = config.folder, []
    for name in config.trackers:
        if name == "tensorboard":
            found.append(EventLog(folder / "tensorboard", ends, values))
        else:
            # Two parts, as most studies are in a folder called runs.
            study = "/".join(config.out.resolve().parts[-2:])
            found.append(WandbLog(folder, ends, values, str(folder.relative_to(config.out)), study, say))
    return found
