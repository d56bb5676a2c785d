"""``cnext judge``: checks which options go together, then judges runs or validates the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnext.errors import UserError
from cnext.judging import validation
from cnext.judging.run import JudgeConfig, judge_runs, left_out


def judge(run: list[str], out: Path | None = None, **options: Any) -> int:
    """Judges runs, or with ``["validate"]`` the judge itself.

    Args:
        out: folder for the results of ``validate`` (default: judge).
        options: fields of `JudgeConfig`; None or False for one that is not given.

    Returns:
        The exit status: 1 where errors that were to be judged were not.

    Raises:
        UserError: an option has no effect in this combination.
    """
    config = JudgeConfig(**{name: value for name, value in options.items() if value is not None})
    validate = run == ["validate"]
    # An option without effect is an error: whoever gives --limit expects a model to be asked.
    unused = {"every_stage": "run folders"} if validate else {"out": "`cnext judge validate`"}
    if config.kind != "openai":
        unused |= dict.fromkeys(("model", "concurrency", "timeout", "tries", "max_tokens"), "--judge openai:URL")
    if config.kind == "rules":
        unused["limit"] = "--judge openai:URL or replay:FILE, as rules judge every error"
    for name, needed in unused.items():
        if (options | {"out": out}).get(name):
            raise UserError(f"--{name.replace('_', '-')} needs {needed}; leave it out")
    if validate:
        return int(left_out(validation.validate(config, out or Path("judge"))) > 0)
    return int(not judge_runs([Path(folder) for folder in run], config))
