"""``cnext-run``: one run, or a study of several methods, task orders and seeds, several runs in parallel.

cnext-run --method mage
cnext-run --method mage lora --order paper reverse --seeds 0 1 2
cnext-run --method mage --preset smoke
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from cnext import backbones, packages
from cnext.config.plan import Plan, plan
from cnext.distributed import collectives, processes
from cnext.errors import UserError, unknown
from cnext.monitoring.notebook import note
from cnext.runs import command_line, data_alike, fingerprint, seals
from cnext.studies.flags import Flags, configs
from cnext.studies.local import USER_ERROR, Failure
from cnext.tables import aggregate, formats
from cnext.tasks import suites

OF_A_STUDY = ("jobs", "launcher", "launcher_option", "baseline", "mix_environments", "mix_data")
"""Flags of a study alone that study.yaml repeats."""


def check(flags: Flags, plans: list[Plan]) -> None:
    """Raises UserError if the runs cannot be compared in one table, a flag has no effect, or a model cannot do a task.

    Prints a note for every order that leaves out tasks.
    """
    from cnext.studies import launchers

    for flag in ("method", "order", "seeds"):
        given = getattr(flags, flag) or []
        repeated = [str(value) for value in dict.fromkeys(given) if given.count(value) > 1]
        if repeated:
            raise UserError(f"--{flag} has {', '.join(repeated)} more than once; give each value once")
    orders: dict[tuple[str, ...], str | None] = {}
    for planned in plans:
        spec = planned.config.order
        other = orders.setdefault(planned.order, spec)
        if other != spec:
            raise UserError(f"--order has the same order of tasks twice, as {other} and as {spec}; remove one")
    aggregate.check_comparable({f"order {planned.config.order}": planned.as_dict() for planned in plans})
    if flags.jobs != "auto" and not (flags.jobs.isdecimal() and int(flags.jobs)):
        raise UserError(f"--jobs must be auto or a number of at least 1, got {flags.jobs}")
    if flags.launcher != "local":
        launchers.require(flags.launcher)
        launchers.options(flags.launcher_option)
    elif flags.launcher_option:
        raise UserError("--launcher-option needs --launcher ray or slurm")
    if flags.gpus is not None and not flags.dry_run:
        raise UserError("--gpus needs --dry-run; to run on several GPUs, start cnext-run with torchrun")
    if flags.tflops is not None and flags.gpus is None:
        raise UserError("--tflops needs --gpus N")
    if flags.baseline is not None and flags.baseline not in flags.method:
        raise unknown("baseline", flags.baseline, flags.method)
    for planned in plans:
        config = planned.config
        backbones.check_tasks(config.backbone, config.weights, map(planned.suite.task, planned.order))
    _note_missing_tasks(plans)


def _note_missing_tasks(plans: list[Plan]) -> None:
    """Prints a note for every order without some tasks of its suite: averages are then over fewer tasks."""
    for planned in {planned.order: planned for planned in plans}.values():
        missing = [name for name in suites.order(planned.suite, "alphabet") if name not in planned.order]
        if missing:
            note(
                f"note: order {planned.config.order} leaves out {', '.join(missing)}, which are neither trained nor "
                f"tested; orders of all tasks: {', '.join([*planned.suite.orders, *suites.ORDERS])}"
            )


def _note_missing_figures() -> None:
    """Prints a note where reports will have no figures."""
    if packages.version("matplotlib") is None:
        note("note: the report has no figures without matplotlib: pip install 'cnext[report]'")


def _as_written(folder: Path) -> aggregate.FinishedRun | None:
    """The finished run of a folder; None where a file of it was changed, which running it again mends or refuses."""
    from cnext.analysis.run import Run

    try:
        found = aggregate.read(folder)
        return found and Run.read(folder) and found
    except seals.Changed:
        return None


def is_finished(planned: Plan) -> bool:
    """Whether a run's folder holds its results and its report. Creates nothing and takes no lock.

    Raises:
        UserError: the folder holds a run of another configuration (each difference is named), or something else.
    """
    from cnext.runs.run_folder import check_free

    folder = planned.config.folder
    check_free(folder, planned.as_dict())
    return (folder / "report.html").is_file() and _as_written(folder) is not None


def _check_environments(flags: Flags, plans: list[Plan]) -> None:
    """Raises UserError if finished runs were made in different environments or on different data, unless
    --mix-environments or --mix-data is given."""
    if done := [run for planned in plans if (run := _as_written(planned.config.folder))]:
        data_alike.check_alike({str(run.folder): run.results.data for run in done}, flags.mix_data)
        fingerprint.check_alike({str(run.folder): run.fingerprint for run in done}, flags.mix_environments)


def _write_yaml(flags: Flags, plans: list[Plan]) -> None:
    """Writes the study's settings into its folder, for --config."""
    more = {item.name: (getattr(flags, item.name), item.default) for item in dataclasses.fields(Flags)}
    given = {name: more[name][0] for name in OF_A_STUDY if more[name][0] and more[name][0] != more[name][1]}
    # As given: a launcher's machines may have other devices than this one.
    command_line.write_yaml(plans, flags.out / command_line.STUDY_YAML, device=flags.device, **given)


def _write_tables(flags: Flags, plans: list[Plan]) -> None:
    """Prints the table of the finished runs, and writes it in all formats into the study's folder."""
    from cnext.report import write_study

    folders = [planned.config.folder for planned in plans]
    runs = aggregate.finished(folders)
    finished = {run.method for run in runs}
    if not finished or (flags.baseline and flags.baseline not in finished):
        print(f"no table: no run of {flags.baseline or 'the study'} is finished", file=sys.stderr)
        return
    mix = (flags.mix_environments, flags.mix_data)
    study = aggregate.of_folders(folders, flags.baseline, *mix)
    aggregate.note_older(runs)
    write_study(folders, flags.out, flags.baseline, *mix)
    print(formats.markdown(study))
    print(f"tables: {flags.out / 'study.md'}, also as .csv, .tex and .json")
    print(f"report: {flags.out / 'study.html'}")


def _execute(flags: Flags, to_do: list[Plan]) -> list[Failure]:
    """Executes runs on this machine or by a launcher. Returns the failed ones."""
    from cnext.studies import launchers, local, resources
    from cnext.training.setup import check_clip, check_model, data_folder, read_suite

    here = flags.launcher == "local"
    if here:
        jobs, summary = resources.parallel_runs(to_do, flags.jobs)
    else:
        jobs = len(to_do) if flags.jobs == "auto" else min(int(flags.jobs), len(to_do))
        summary = f"{len(to_do)} runs to do, {jobs} in parallel ({flags.launcher})"
    note(summary)
    if here and jobs == 1:
        return local.run_in_sequence(to_do)
    # Shared by all runs: generated once, and an error in them is reported once, before any run starts.
    first = to_do[0]
    check_model(first)
    check_clip(first, first.device if here else "cpu")
    read_suite(first, data_folder(first))
    if here:
        return local.run_in_parallel(to_do, jobs)
    return launchers.launch(flags.launcher, to_do, launchers.options(flags.launcher_option), jobs)


def execute(flags: Flags, plans: list[Plan]) -> list[Failure]:
    """Executes the runs that are not finished. Returns those that failed."""
    from cnext.runs.run_folder import InUse, RunFolder

    to_do, in_use = [planned for planned in plans if not is_finished(planned)], []
    _check_environments(flags, plans)
    if len(to_do) < len(plans):
        note(f"{len(plans) - len(to_do)} of {len(plans)} runs are already finished")
    for planned in [*to_do]:
        # Before the first run starts: a folder that cannot be created is an error. One in use is left to its process.
        try:
            RunFolder(planned.config.folder, planned.as_dict()).close()
        except InUse as error:
            to_do.remove(planned)
            in_use.append(Failure(planned.config, USER_ERROR, "in use", [f"error: {error}"]))
            note(f"left out: {error}")
    _write_yaml(flags, plans)
    return in_use + (_execute(flags, to_do) if to_do else [])


def _study(flags: Flags, plans: list[Plan]) -> int:
    """Executes the runs that are not finished, then writes the tables. Returns the exit status."""
    from cnext.studies import local

    failures = execute(flags, plans)
    _write_tables(flags, plans)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    if not failures:
        return 0
    print(f"\n{len(failures)} of {len(plans)} runs failed; the same command runs only these again", file=sys.stderr)
    return max(failures, key=lambda failure: failure.status == local.CRASH).status


def _distributed(flags: Flags, plans: list[Plan]) -> None:
    """Executes the runs one after another, each in all processes that torchrun or accelerate started."""
    from cnext.training.runner import run

    if flags.launcher != "local":
        raise UserError(f"--launcher {flags.launcher} starts its own processes; use either it or torchrun")
    settings = {"runs": {str(number): planned.settings() for number, planned in enumerate(plans)}}
    with processes.process_group(plans[0].device, settings if len(plans) > 1 else plans[0].settings()):
        for planned in plans:
            processes.check(planned.recipes)
        if len(plans) > 1:
            processes.first_alone(lambda: _write_yaml(flags, plans))
        for planned in plans:
            finished = processes.first_alone(lambda planned=planned: is_finished(planned))
            if not collectives.broadcast_object(finished):
                run(planned.config)
        if len(plans) > 1:
            processes.first_alone(lambda: _write_tables(flags, plans))


def _dry_run(flags: Flags, plans: list[Plan]) -> None:
    """Prints the plan and estimates. Raises UserError for whatever would stop the runs from starting."""
    from cnext.runs.run_folder import check_free
    from cnext.studies import dry_run, forecast, resources

    if flags.gpus is not None:
        teraflops = forecast.TERAFLOPS if flags.tflops is None else flags.tflops
        print("\n\n".join(forecast.text(planned, flags.gpus, teraflops) for planned in plans))
        return
    if processes.launched() > 1:
        raise UserError("--dry-run times steps in one process; start it without torchrun, or estimate with --gpus N")
    for planned in plans:
        check_free(planned.config.folder, planned.as_dict())
    _check_environments(flags, plans)
    if len(plans) == 1:
        print(dry_run.estimate(plans[0]).text)
    else:
        jobs, summary = resources.parallel_runs(plans, flags.jobs)
        print(f"{dry_run.estimate_study(plans, jobs)}\n{summary}")


def main(flags: Flags) -> int:
    """Executes what the flags of `flags.parse` ask for, after all checks. Returns the exit status."""
    forecasting = flags.gpus is not None
    elsewhere = forecasting or (flags.launcher != "local" and not flags.dry_run)
    with processes.refusals():
        for flag in ("method", "order", "seeds"):
            if getattr(flags, flag) == []:
                raise UserError(f"--{flag} needs at least one value")
        plans = [plan(config, elsewhere, forecasting) for config in configs(flags)]
        check(flags, plans)
    if flags.dry_run:
        _dry_run(flags, plans)
        return 0
    _note_missing_figures()
    if processes.launched() > 1:
        _distributed(flags, plans)
        return 0
    if len(plans) > 1 or flags.launcher != "local":
        return _study(flags, plans)
    from cnext.training.runner import run

    run(plans[0].config)
    return 0
