"""A study from Python: what ``cnext-run`` does with several methods, orders or seeds."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Literal

from cnext.config.plan import plan
from cnext.config.run_config import Options, RunConfig
from cnext.distributed import processes
from cnext.errors import UserError, unknown
from cnext.monitoring.signals import Stop
from cnext.results import StudyResult
from cnext.results.study import of_folders
from cnext.studies import study as studies
from cnext.studies.flags import Flags
from cnext.studies.local import USER_ERROR, Failure


def study(
    config: RunConfig | None = None,
    methods: str | Iterable[str] | None = None,
    orders: str | Iterable[str] | None = None,
    seeds: int | Iterable[int] | None = None,
    *,
    hyperparameters: Mapping[str, Mapping[str, Any]] | None = None,
    jobs: int | Literal["auto"] = 1,
    baseline: str | None = None,
    mix_environments: bool = False,
    mix_data: bool = False,
) -> StudyResult:
    """Runs every method on every order with every seed, or resumes; what is finished is not run again.

    Run folders are ``<out>/<method>/<order>/seed-<seed>``, as of `cnext-run`, and ``out`` gets study.html and the
    tables. An error of one run does not stop the others.

    Args:
        config: what the runs share. None: all defaults.
        methods, orders, seeds: one or several, each in place of the configuration's own. None: that one.
        hyperparameters: by method, ``{"mage": {"c": 2.0}}``; of the configuration's method they may be in it.
        jobs: how many runs at a time. 1: one after another in this process. More, or "auto" (by cores and memory):
            each in a process of its own; a script must then call this under ``if __name__ == "__main__":``.
        baseline: the method that the tables compare with; None: lora if it is there, else the first.
        mix_environments: average over runs made on different processors, versions or thread counts.
        mix_data: average over runs on different data.

    Raises:
        UserError: as `cnext.run`; runs that cannot be compared; a value given twice; or a run failed by an error of
            its input. Those that are finished can be opened with `cnext.open_study`.
        RuntimeError: a run failed by another error.
        Stopped: as `cnext.run`.

    Example::

        from cnext import RunConfig, study

        result = study(RunConfig(preset="smoke"), ["lora", "mage"], seeds=[0, 1])
        print(result)
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "expected study(jobs=...) under `if __name__ == '__main__':`, got a script that calls it when it is "
            "imported, as the runs' own processes do; indent the call under that line"
        )
    config = RunConfig() if config is None else config
    if not isinstance(config, RunConfig):
        raise UserError(f"study() expects a RunConfig first, got {config!r:.80}; give methods as study(methods=[...])")
    flags = Flags(
        method=_several("methods", methods, str, [config.method]),
        order=_several("orders", orders, str, []) or ([] if config.order is None else [config.order]) or None,
        seeds=_several("seeds", seeds, Integral, [config.seed]),
        jobs=str(jobs),
        baseline=baseline,
        mix_environments=mix_environments,
        mix_data=mix_data,
        **{item.name: getattr(config, item.name) for item in dataclasses.fields(Options)},
    )
    if processes.launched() > 1:
        raise UserError("study() runs in one process, got several of a launcher; start cnext-run with it instead")
    with Stop():
        plans = [plan(one) for one in _configs(flags, config, hyperparameters or {})]
        studies.check(flags, plans)
        failures = studies.execute(flags, plans)
        if failures:
            raise _error(failures, len(plans), config)
        from cnext.report import write_study

        folders = [planned.config.folder for planned in plans]
        write_study(folders, config.out, baseline, mix_environments, mix_data)
    return of_folders(folders, config.out, baseline, mix_environments, mix_data)


def _error(failures: list[Failure], total: int, config: RunConfig) -> Exception:
    """The error of a study of which runs failed."""
    head = (
        f"{len(failures)} of {total} runs failed; the same call runs only these again, and "
        f"cnext.open_study({str(config.out)!r}) shows those that are finished"
    )
    kind = UserError if all(failure.status == USER_ERROR for failure in failures) else RuntimeError
    return kind("\n".join([head, *map(str, failures)]))


def _several(name: str, given: Any, kind: type, default: list[Any]) -> list[Any]:
    """One value or several as a list. Raises UserError where one is of another type, or there is none."""
    if given is None:
        return default
    values = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    words = "strings" if kind is str else "whole numbers"
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name} must be {words}, got {value!r:.80} ({type(value).__name__})")
    if not values:
        raise UserError(f"{name} needs at least one value, got none; leave it out for the configuration's own")
    return [int(value) for value in values] if kind is Integral else values


def _configs(flags: Flags, config: RunConfig, given: Mapping[str, Mapping[str, Any]]) -> list[RunConfig]:
    """One configuration per method, order and seed, in the order of execution."""
    for method in given:
        if method not in flags.method:
            raise unknown("method in hyperparameters", str(method), flags.method)
    if config.hyperparameters and config.method not in flags.method:
        raise UserError(
            f"the configuration has hyperparameters of {config.method}, which is not one of {', '.join(flags.method)}; "
            "give those of these as hyperparameters={METHOD: {...}}"
        )
    found = []
    for method, order, seed in itertools.product(flags.method, flags.order or [None], flags.seeds):
        own = config.hyperparameters if method == config.method else {}
        values = {"hyperparameters": {**own, **given.get(method, {})}}
        found.append(dataclasses.replace(config, method=method, order=order, seed=seed, **values))
    if isinstance(config.data, Mapping):  # datasets, which are written once
        data = plan(found[0]).config.data
        found = [dataclasses.replace(one, data=data) for one in found]
    return found
