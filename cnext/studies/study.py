"""``cnext-run``: one run, or a study of several methods, orders and seeds, side by side where there is room.

cnext-run --method mage
cnext-run --method mage lora --order paper reverse --seeds 0 1 2
cnext-run --method mage --budget smoke
"""

from __future__ import annotations

import sys
from typing import Any

from cnext import backbones
from cnext.config.run_config import Plan, plan
from cnext.distributed import collectives, processes
from cnext.errors import UserError, unknown
from cnext.runs import fingerprint
from cnext.studies.flags import configs
from cnext.studies.local import Failure
from cnext.tables import aggregate, formats
from cnext.tasks import suites


def _check(flags: Any, plans: list[Plan]) -> None:
    """Raises UserError where the runs would not make one table, or a flag has no use."""
    from cnext.studies import launchers

    for flag in ("method", "order", "seeds"):
        given = getattr(flags, flag) or []
        repeated = [str(value) for value in dict.fromkeys(given) if given.count(value) > 1]
        if repeated:
            raise UserError(f"--{flag} has {', '.join(repeated)} more than once; every run is done once")
    orders: dict[tuple[str, ...], str | None] = {}
    for planned in plans:
        spec = planned.config.order
        other = orders.setdefault(planned.order, spec)
        if other != spec:
            raise UserError(f"--order has the same order of tasks twice, as {other} and as {spec}; leave one out")
    aggregate.check_comparable({f"order {planned.config.order}": planned.as_dict() for planned in plans})
    if flags.jobs != "auto" and not (flags.jobs.isdecimal() and int(flags.jobs)):
        raise UserError(f"--jobs must be auto or a number of at least 1, got {flags.jobs}")
    if flags.launcher != "local":
        launchers.require(flags.launcher)
        launchers.options(flags.launcher_option)
    elif flags.launcher_option:
        raise UserError("--launcher-option is for --launcher ray or slurm")
    if flags.gpus is not None and not flags.dry_run:
        raise UserError("--gpus forecasts a run and goes with --dry-run; a run takes the GPUs that torchrun gives it")
    if flags.tflops is not None and flags.gpus is None:
        raise UserError("--tflops is what --gpus N forecasts with; give both, or leave it away")
    if flags.baseline is not None and flags.baseline not in flags.method:
        raise unknown("baseline", flags.baseline, flags.method)


def _say_what_is_left_out(plans: list[Plan]) -> None:
    """A line for every order that lacks tasks of its suite: averages are then over fewer tasks."""
    for planned in {planned.order: planned for planned in plans}.values():
        lacking = [name for name in suites.order(planned.suite, "alphabet") if name not in planned.order]
        if lacking:
            print(
                f"note: order {planned.config.order} leaves out {', '.join(lacking)}, neither learnt nor tested; "
                f"with all tasks: {', '.join([*planned.suite.orders, *suites.ORDERS])}",
                file=sys.stderr,
            )


def _finished(planned: Plan) -> bool:
    """Whether a run's folder holds all its results already. Raises UserError for one of another configuration."""
    from cnext.runs.run_folder import RunFolder

    folder = planned.config.folder
    RunFolder(folder, planned.as_dict()).close()
    return (folder / "report.html").is_file() and aggregate.read(folder) is not None


def _check_done(flags: Any, plans: list[Plan]) -> None:
    """Raises UserError where the runs that are finished are of different environments, unless these may be mixed."""
    if done := aggregate.finished(planned.config.folder for planned in plans):
        fingerprint.check_alike({str(run.folder): run.fingerprint for run in done}, flags.mix_environments)


def _write_tables(flags: Any, plans: list[Plan]) -> None:
    """Prints the table of what is finished, and writes it in all formats into the study's folder."""
    from cnext.report import write_study

    folders = [planned.config.folder for planned in plans]
    runs = aggregate.finished(folders)
    finished = {run.method for run in runs}
    if not finished or (flags.baseline and flags.baseline not in finished):
        print(f"no run of {flags.baseline or 'the study'} is finished: there is no table yet", file=sys.stderr)
        return
    study = aggregate.of_folders(folders, flags.baseline, flags.mix_environments)
    if note := fingerprint.older([run.fingerprint for run in runs]):
        print(note, file=sys.stderr)
    write_study(folders, flags.out, flags.baseline, flags.mix_environments)
    print(formats.markdown(study))
    print(f"tables: {flags.out / 'study.md'}, and the same as .csv, .tex and .json")
    print(f"report: {flags.out / 'study.html'}")


def _do(flags: Any, to_do: list[Plan]) -> list[Failure]:
    """Does runs here or where the launcher does them. Returns those that failed."""
    from cnext.studies import launchers, local, resources
    from cnext.training.setup import check_clip, data_folder, read_suite

    here = flags.launcher == "local"
    if here:
        at_a_time, why = resources.decide(to_do, flags.jobs)
    else:
        at_a_time = len(to_do) if flags.jobs == "auto" else min(int(flags.jobs), len(to_do))
        why = f"{len(to_do)} runs to do, by {flags.launcher}, {at_a_time} at a time"
    print(why, file=sys.stderr)
    if here and at_a_time == 1:
        return local.one_after_another(to_do)
    # The runs share these: drawn once, and what is wrong with them is one message before anything starts.
    backbones.load(to_do[0].config.backbone).check(to_do[0].config.weights)
    check_clip(to_do[0], to_do[0].device if here else "cpu")
    read_suite(to_do[0], data_folder(to_do[0]))
    if here:
        return local.side_by_side(to_do, at_a_time)
    return launchers.launch(flags.launcher, to_do, launchers.options(flags.launcher_option), at_a_time)


def _study(flags: Any, plans: list[Plan]) -> int:
    """Does the runs that are not finished, then writes the tables. Returns the exit status."""
    from cnext.studies import local

    to_do = [planned for planned in plans if not _finished(planned)]
    _check_done(flags, plans)
    if len(to_do) < len(plans):
        print(f"{len(plans) - len(to_do)} of {len(plans)} runs are finished already", file=sys.stderr)
    failures = _do(flags, to_do) if to_do else []
    _write_tables(flags, plans)
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    if not failures:
        return 0
    print(f"\n{len(failures)} of {len(plans)} runs failed; the same command does only what is missing", file=sys.stderr)
    return max(failures, key=lambda failure: failure.status == local.OTHER).status


def _together(flags: Any, plans: list[Plan]) -> None:
    """Does the runs one after another, each in all the processes that torchrun or accelerate has started."""
    from cnext.training.runner import run

    if flags.launcher != "local":
        raise UserError(f"--launcher {flags.launcher} starts runs itself; leave it or torchrun away")
    with processes.joined(plans[0].device):
        for planned in plans:
            processes.check(planned.recipes)
        for planned in plans:
            if not collectives.broadcast_object(collectives.rank() == 0 and _finished(planned)):
                run(planned.config)
        if collectives.rank() == 0 and len(plans) > 1:
            _write_tables(flags, plans)


def _dry_run(flags: Any, plans: list[Plan]) -> None:
    """Prints what the runs will take. Raises UserError for what they would be refused for."""
    from cnext.runs.run_folder import check_free
    from cnext.studies import dry_run, forecast, resources

    if flags.gpus is not None:
        teraflops = forecast.TERAFLOPS if flags.tflops is None else flags.tflops
        print("\n\n".join(forecast.text(planned, flags.gpus, teraflops) for planned in plans))
        return
    if processes.launched() > 1:
        raise UserError("--dry-run times steps in one process; leave torchrun away, or give --gpus N for a forecast")
    for planned in plans:
        check_free(planned.config.folder, planned.as_dict())
    _check_done(flags, plans)
    if len(plans) == 1:
        print(dry_run.estimate(plans[0]).text)
    else:
        at_a_time, why = resources.decide(plans, flags.jobs)
        print(f"{dry_run.estimate_study(plans, at_a_time)}\n{why}")


def main(flags: Any) -> int:
    """Runs what flags as of `flags.parse` ask for. What can be checked is checked before the first run starts."""
    for flag in ("method", "order", "seeds"):
        if getattr(flags, flag) == []:
            raise UserError(f"--{flag} needs at least one value")
    forecasting = flags.gpus is not None
    elsewhere = forecasting or (flags.launcher != "local" and not flags.dry_run)
    plans = [plan(config, elsewhere, forecasting) for config in configs(flags)]
    _check(flags, plans)
    _say_what_is_left_out(plans)
    if flags.dry_run:
        _dry_run(flags, plans)
        return 0
    if processes.launched() > 1:
        _together(flags, plans)
        return 0
    if len(plans) > 1 or flags.launcher != "local":
        return _study(flags, plans)
    from cnext.training.runner import run

    run(plans[0].config)
    return 0
