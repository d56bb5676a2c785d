"""``cnext evaluate``: score an adapter from elsewhere, or a run's checkpoint, on a suite, without training."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cnext.adapters import exchange_files
from cnext.adapters.exchange_authors import LANGUAGE_MODEL
from cnext.config import init_source
from cnext.config.init_source import InitSource
from cnext.config.plan import as_words
from cnext.config.run_config import RunConfig
from cnext.errors import UserError
from cnext.exchange.importing import hyperparameters_of, kind_of
from cnext.results import RunResult
from cnext.runs import checkpoint
from cnext.runs.checkpoint import EXTRAS
from cnext.tasks import suites
from cnext.tasks.base import Suite
from cnext.training.runner import run

OUT = Path("evaluations")


def evaluate(
    path: Path, method: str | None = None, tasks: str | None = None, out: Path | None = None, **options: Any
) -> RunResult:
    """Scores an adapter or a run's checkpoint as a run does that has learnt all tasks, in a run folder of its own.

    Args:
        path: the authors' released file, PEFT adapters, a merged model, a run folder (its last checkpoint) or one of
            its checkpoints.
        method: of an adapter: as of `import_adapter`. None: as there, or the run's.
        tasks: "a,b,c". None: those that the run has learnt, if the suite has them, else all of the suite.
        out: folder of the run folder. None: one in ``evaluations`` with the first digits of the content's SHA-256.
        options: fields of `RunConfig`. Of a run, its own backbone, weights, suite and preset are the defaults.

    Returns:
        The result: the scores are the last row of ``score_matrix``.

    Raises:
        UserError: as `cnext.run`.
    """
    return run(configuration(path, method, tasks, out, **options))


def configuration(
    path: Path, method: str | None = None, tasks: str | None = None, out: Path | None = None, **options: Any
) -> RunConfig:
    """The run that `evaluate` executes."""
    source = init_source.find(path)
    given = {name: value for name, value in options.items() if value is not None}
    load = _of_merged if source.kind == "merged" else _of_adapter if source.run is None else _of_run
    values = load(source, method) | given
    suite = suites.load(values.get("suite", RunConfig.suite))
    spec = tasks or _learnt(source, suite) or suites.default_order(suite)
    order = suites.order(suite, spec)
    out = OUT / f"{source.path.name}-{source.sha256[:8]}" if out is None else out
    return RunConfig(**values, init_from=path, init_tasks=order, order=spec, out=out)


def _learnt(source: InitSource, suite: Suite) -> str:
    """The tasks that a run has learnt; "" where there are none or the suite lacks one."""
    known = {task.name for task in suite.tasks}
    return ",".join(source.learnt) if known.issuperset(source.learnt) else ""


def _of_run(source: InitSource, method: str | None) -> dict[str, Any]:
    """The options that load a run's checkpoint."""
    there = source.run
    assert there is not None
    if method not in (None, there.method):
        raise UserError(f"{source.path} is of {there.method}, got --method {method}; leave it out")
    values: dict[str, Any] = {"method": there.method, "hyperparameters": there.hyperparameters}
    values |= {"backbone": there.backbone, "backbone_options": as_words(there.backbone_options)}
    values |= {"suite": there.suite, "preset": there.budget, "seed": there.seed}
    values |= {"weights": there.weights and Path(there.weights), "trainable": there.recipe.trainable}
    if not there.tasks:
        extras = checkpoint.load(source.path)[0].get(EXTRAS, {})
        values["trainable"] = trainable_for({name.partition(".")[0] for name in extras})
    return {name: value for name, value in values.items() if value is not None}


def _of_merged(source: InitSource, method: str | None) -> dict[str, Any]:
    """The options that evaluate a merged model: the method without branches."""
    if method is not None:
        raise UserError(f"{source.path} is a merged model, which has no branches; leave --method {method} out")
    return {"method": "zero-shot"}


def _of_adapter(source: InitSource, method: str | None) -> dict[str, Any]:
    """The options that load an adapter: its method, rank and scale, and what was trained beside it."""
    found, kind = exchange_files.read(source.path, kind_of(method))
    values = {"method": method or kind, "hyperparameters": hyperparameters_of(found.branches, kind)}
    return values | {"trainable": trainable_for(found.extras)}


def trainable_for(kinds: Collection[str]) -> str:
    """The least value of a recipe's ``trainable`` that has these kinds of `exchange_authors.Released.extras`."""
    if not kinds:
        return "branches"
    return "released" if set(kinds) & set(LANGUAGE_MODEL) else "connections"
