"""The command line: ``cnext-run`` runs the benchmark, ``cnext`` has the other verbs.

Nothing heavy is imported before a verb needs it: help and lists answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from platform import python_version
from typing import Any

import cnext
from cnext.errors import UserError
from cnext.monitoring.signals import Stop, Stopped
from cnext.monitoring.streams import outliving_readers


def _guarded(verb: Callable[[], int | None]) -> int:
    """Runs a verb; the user's errors become one message and an exit status of 2, without a traceback."""
    with outliving_readers():
        try:
            try:
                return verb() or 0
            finally:
                # At the interpreter's exit it would be too late to say what is wrong with it.
                if sys.stdout is not None:
                    sys.stdout.flush()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            print(f"error: {error.strerror or error}{where}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except KeyboardInterrupt:
            print("interrupted; the same command goes on after the last saved block", file=sys.stderr)
            return 130


def _version() -> str:
    return f"cnext {cnext.__version__} from {Path(cnext.__file__).parent} (Python {python_version()})"


def run_main(arguments: list[str] | None = None) -> int:
    """``cnext-run``: see ``cnext-run --help``."""
    given = sys.argv[1:] if arguments is None else arguments

    def verb() -> int | None:
        from cnext.studies import flags

        parsed = flags.parse(given)
        if parsed.version:
            print(_version())
            return 0
        from cnext.studies import study

        with Stop():
            return study.main(parsed)

    return _guarded(verb)


def _list(arguments: argparse.Namespace) -> None:
    from cnext import backbones, methods
    from cnext.tasks import suites

    if arguments.suite is not None:
        print(suites.details(suites.load(arguments.suite)))
        return
    print("methods")
    for name in sorted(methods.modules()):
        also = ", ".join(alias for alias, of in methods.ALIASES.items() if of == name)
        print(f"  {name:<14} {methods.summary(name)}{f' (also: {also})' if also else ''}")
    print("backbones")
    for name in sorted(backbones.modules()):
        print(f"  {name:<14} {backbones.SUMMARIES.get(name, '')}")
    print("suites (cnext list SUITE tells more of one)")
    for name in suites.names():
        print(suites.summary(suites.load(name)))


def _card(arguments: argparse.Namespace) -> None:
    from cnext import methods
    from cnext.studies.forecast import extra_bytes

    print("\n\n".join(methods.describe(name, extra_bytes(name)) for name in arguments.method))


def _report(arguments: argparse.Namespace) -> None:
    from cnext.report import write_reports

    for path in write_reports(arguments.run, arguments.out, _baseline(arguments), arguments.mix_environments):
        print(path)


def _baseline(arguments: argparse.Namespace) -> str | None:
    from cnext import methods

    return arguments.baseline and methods.canonical(arguments.baseline)


def _analyze(arguments: argparse.Namespace) -> None:
    from cnext.analysis import analyze, formats
    from cnext.analysis.groups import RunGroups
    from cnext.tables import aggregate

    study = RunGroups.read(aggregate.find(arguments.run), mix=arguments.mix_environments)
    found = analyze(study, arguments.what)
    print(formats.FORMATS[arguments.format](found), end="")
    if arguments.format in ("csv", "latex"):
        for name, why in found.left_out.items():
            print(f"left out: {name}: {why}", file=sys.stderr)


def _table(arguments: argparse.Namespace) -> None:
    from cnext.runs import fingerprint
    from cnext.tables import aggregate, formats

    folders = aggregate.find(arguments.run)
    study = aggregate.of_folders(folders, _baseline(arguments), arguments.mix_environments)
    print(formats.FORMATS[arguments.format](study), end="")
    if note := fingerprint.older([run.fingerprint for run in aggregate.finished(folders)]):
        print(note, file=sys.stderr)


def _status(arguments: argparse.Namespace) -> None:
    import json

    from cnext.monitoring import status

    found = status.of_folders(arguments.dir or [Path("runs")])
    print(json.dumps(found, indent=2) if arguments.json else status.text(found))


def _metrics(arguments: argparse.Namespace) -> None:
    import json

    from cnext.scoring.matrix_file import read
    from cnext.scoring.metrics_text import metrics_text

    given = read(arguments.matrix)
    print(json.dumps(given.metrics(), indent=2) if arguments.json else metrics_text(given))


def _compare(arguments: argparse.Namespace) -> None:
    import json

    from cnext.tables import compare

    if arguments.to is not None:
        here = compare.of_run(arguments.run)
        there = compare.of_run(arguments.to, here.conditions["profile"])
    else:
        here = compare.of_run(arguments.run, "paper")
        there = compare.of_paper(arguments.paper or here.method)
    comparison = compare.compare(here, there, arguments.anyway)
    print(compare.as_json(comparison) if arguments.json else compare.text(comparison))


def _judge(arguments: argparse.Namespace) -> None:
    import dataclasses

    from cnext.judging import run, validation

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(run.JudgeConfig)}
    config = run.JudgeConfig(**{name: value for name, value in given.items() if value is not None})
    validates = arguments.run == ["validate"]
    # What would change nothing is refused: who gives --limit expects a model to be asked.
    foreign = {"every_stage": "run folders"} if validates else {"out": "`cnext judge validate`"}
    if config.kind != "openai":
        foreign |= dict.fromkeys(("model", "concurrency", "timeout", "tries"), "--judge openai:URL")
    if config.kind == "rules":
        foreign["limit"] = "--judge openai:URL or replay:FILE, for rules judge every error"
    for name, of in foreign.items():
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to {of}; leave it out")
    if validates:
        validation.validate(config, arguments.out or Path("judge"))
    else:
        run.judge_runs([Path(run) for run in arguments.run], config)


def _data_check(arguments: argparse.Namespace) -> int:
    from cnext.tasks import doctor, doctor_text, suites

    suite = suites.load(arguments.suite)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that is there, got {arguments.json}")
    with doctor_text.Bars() as bars:
        report = doctor.check(suite, arguments.dir, bars, arguments.images)
    if arguments.json is not None:
        doctor_text.write_json(report, arguments.json)
    print(doctor_text.text(report))
    return 1 if report.problems else 0


def _data_subset(arguments: argparse.Namespace) -> None:
    from cnext.tasks import subset, suites

    suite = suites.load(arguments.suite)
    out = arguments.out or Path(f"{suite.name}-n{arguments.n}-seed{arguments.seed}")
    name = subset.write_subset(suite, arguments.dir, arguments.n, arguments.seed, out, arguments.absolute)
    print(f"{name}: cnext-run --suite {out} --data {out}")


def _export(arguments: argparse.Namespace) -> None:
    from cnext.exchange.export import export

    given = (arguments.run, arguments.to, arguments.format, arguments.checkpoint, arguments.branches_only)
    for path in export(*given):
        print(path)


def _import(arguments: argparse.Namespace) -> None:
    from cnext.exchange.importing import import_adapter

    given = (arguments.path, arguments.to, arguments.backbone, arguments.method, arguments.weights)
    print(import_adapter(*given))


def _doctor(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from cnext.doctor import checks
    from cnext.runs import environment

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(checks.Wanted)}
    findings = checks.examine(checks.Wanted(**given))
    ready = not checks.problems(findings)
    if arguments.json:
        told = {"ready": ready, "findings": [dataclasses.asdict(finding) for finding in findings]}
        print(json.dumps(told | {"versions": environment.versions()}, indent=2))
    else:
        print(checks.report(findings))
    return 0 if ready else 1


def _pretrain_tiny(arguments: argparse.Namespace) -> None:
    from cnext.pretrain_tiny import pretrain

    pretrain(arguments.out, arguments.seed, arguments.scale, arguments.threads)


def _parser() -> argparse.ArgumentParser:
    told = "Continual learning of dual-to-dual multimodal models."
    # Raw, so that no path is broken in two.
    parser = argparse.ArgumentParser("cnext", description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "show the version and where it is installed, and stop"
    parser.add_argument("--version", action="version", version=_version(), help=told)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    def add(
        name: str, action: Callable[[argparse.Namespace], int | None], text: str, to: Any = verbs
    ) -> argparse.ArgumentParser:
        verb = to.add_parser(name, help=text, description=text)
        verb.set_defaults(action=action)
        return verb

    add("run", lambda arguments: None, "run the benchmark; the same as cnext-run")
    listed = add("list", _list, "list the methods, backbones, suites, tasks, orders and budgets")
    listed.add_argument("suite", nargs="?", help="tell more of one suite: its tasks, files, counts and license")
    card = add("card", _card, "show methods' cards: what they do, need and keep, and what their hyperparameters mean")
    card.add_argument("method", nargs="+", help="a method's name, as `cnext list` shows it")
    report = add("report", _report, "write the report of a run again, or of a study, from run folders alone")
    told = "one run folder, for report.html and report.md; several, or folders that hold some, for study.html"
    report.add_argument("run", type=Path, nargs="+", help=told)
    report.add_argument("--out", type=Path, metavar="DIR", help="of a study: its folder (default: what holds all runs)")
    analyze = add("analyze", _analyze, "why and where it forgets, from run folders alone; every figure is defined")
    analyze.add_argument("run", type=Path, nargs="+", help="run folders, or folders that hold some, for example runs")
    what = ("types", "transfer", "orders", "ablations", "seeds", "stages", "drift", "samples", "breaks")
    told = "one or several of these (default: all that the folders allow)"
    analyze.add_argument("--what", choices=what, nargs="+", default=[], help=told)
    formats = ("markdown", "csv", "latex", "json")
    analyze.add_argument("--format", choices=formats, default="markdown", help="default: markdown")
    table = add("table", _table, "means over seeds and orders and paired differences, from run folders alone")
    table.add_argument("run", type=Path, nargs="+", help="run folders, or folders that hold some, for example runs")
    told = "average runs of different environments (processor, versions, threads), which decide bits, and say so"
    for verb in (report, analyze, table):
        verb.add_argument("--mix-environments", action="store_true", help=told)
    told = "method that a study's tables compare with (default: lora, else the first)"
    for verb in (report, table):
        verb.add_argument("--baseline", metavar="METHOD", help=told)
    formats = ("markdown", "csv", "latex", "json")
    table.add_argument("--format", choices=formats, default="markdown", help="default: markdown")
    status = add("status", _status, "how the runs in a folder stand: state, step, pace, time left; from any terminal")
    status.add_argument("dir", type=Path, nargs="*", help="run folders, or folders that hold some (default: runs)")
    status.add_argument("--json", action="store_true", help="print all that is known as JSON")
    metrics = add("metrics", _metrics, "every metric of a score matrix from anywhere, in CSV or JSON; needs no torch")
    metrics.add_argument("matrix", type=Path, help="rows: after each task; columns: tasks in training order; percent")
    metrics.add_argument("--json", action="store_true", help="print the metrics as in results.json")
    compare = add("compare", _compare, "compare a run's scores with the paper's or another run's, cell by cell")
    compare.add_argument("run", type=Path, help="a run folder, or its results.json")
    other = compare.add_mutually_exclusive_group(required=True)
    other.add_argument("--paper", nargs="?", const="", metavar="METHOD", help="the paper's method (default: the run's)")
    other.add_argument("--to", type=Path, metavar="RUN", help="another run")
    compare.add_argument("--anyway", action="store_true", help="compare what is not comparable, and say why it is not")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    judge = add("judge", _judge, "book each error of runs to hallucination, instruction unfollowing or other")
    told = "run folders, or folders that hold some; or `validate`: agreement with 200 errors whose type is known"
    judge.add_argument("run", nargs="+", help=told)
    judges = (
        "rules (default; free, offline), openai:URL (a server, for example http://localhost:8000/v1) or replay:FILE"
    )
    judge.add_argument("--judge", default="rules", help=judges)
    judge.add_argument("--model", help="the model behind the URL (default: Qwen/Qwen3-VL-30B-A3B-Instruct)")
    told = "ask about N errors of a run, spread over stages and tasks, and estimate the averages with intervals"
    judge.add_argument("--limit", type=int, metavar="N", help=told)
    every = "judge every stage (default for a model: those that Avg.HAL, Avg.IUF and Avg.OTH are made of)"
    judge.add_argument("--every-stage", action="store_true", help=every)
    judge.add_argument("--dry-run", action="store_true", help="say how many requests and tokens it takes, and stop")
    judge.add_argument("--name", help="name of the files in RUN/judge (default: rules, replay or the model's name)")
    judge.add_argument("--concurrency", type=int, metavar="N", help="requests at a time (default: 8)")
    judge.add_argument("--timeout", type=float, metavar="S", help="seconds that a server may be silent (default: 120)")
    judge.add_argument("--tries", type=int, metavar="N", help="tries of one request (default: 5)")
    judge.add_argument("--out", type=Path, help="of validate: its folder (default: ./judge)")
    about = "check the files of a suite, or draw a named reduced protocol from them"
    data = verbs.add_parser("data", help=about, description=about)
    parts = data.add_subparsers(dest="part", required=True, metavar="part")
    text = "count, read and look at every file of a suite; exit status 0: clean, 1: problems found, 2: wrong usage"
    check = add("check", _data_check, text, parts)
    check.add_argument("--json", type=Path, metavar="FILE", help="write all that was found, every line and path")
    looks = ("none", "verify", "decode")
    told = "how to look at images: not at all, header and checksums, or every pixel (default: verify)"
    check.add_argument("--images", choices=looks, default="verify", help=told)
    subset = add("subset", _data_subset, "write a few rows of every split as a suite of its own, drawn by seed", parts)
    subset.add_argument("--n", type=int, default=500, help="rows of every split (default: 500)")
    subset.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    subset.add_argument("--out", type=Path, help="folder to write (default: ./<suite>-n<n>-seed<seed>)")
    subset.add_argument("--absolute", action="store_true", help="refer to the images by absolute paths")
    for part in (check, subset):
        part.add_argument("dir", type=Path, help="folder with the suite's files")
        part.add_argument("--suite", default="continual-next", help="suite (default: continual-next)")
    export = add("export", _export, "write a run's adapters for other tools, with a model card and a checksum")
    export.add_argument("run", type=Path, help="a run folder, for example runs/mage/paper/seed-0")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, not there yet")
    told = "PEFT, an adapter a branch or one for all; the authors' layout; the model with the branches in its weights"
    formats = ("peft", "peft-merged-rank", "authors", "merged")
    export.add_argument("--format", choices=formats, required=True, help=told)
    export.add_argument("--checkpoint", metavar="NAME", help="one of the run's checkpoints (default: the last)")
    told = "leave out what was trained beside the branches"
    export.add_argument("--branches-only", action="store_true", help=told)
    text = "read a PEFT adapter or the authors' released file, and write it as a run that `cnext export` takes"
    imported = add("import", _import, text)
    told = "folder of a PEFT adapter or of several, or pytorch_model.bin or a safetensors file as released"
    imported.add_argument("path", type=Path, help=told)
    imported.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, not there yet")
    imported.add_argument("--backbone", default="tiny", help="the model that it is for (default: tiny)")
    told = "what the branches are (default: by their names)"
    imported.add_argument("--method", choices=("mage", "moelora", "lora"), help=told)
    imported.add_argument("--weights", type=Path, metavar="DIR", help="folder of the backbone's released weights")
    text = "say whether a run can start here: packages, devices, kernels, weights, data, CLIP, room; exit status 1: no"
    doctor = add("doctor", _doctor, text)
    doctor.add_argument("--backbone", default="tiny", help="the run's backbone (default: tiny)")
    doctor.add_argument("--weights", type=Path, metavar="DIR", help="folder of the backbone's released weights")
    doctor.add_argument("--suite", default="next-tiny", help="the run's suite (default: next-tiny)")
    doctor.add_argument("--data", type=Path, metavar="DIR", help="folder with the suite's files")
    doctor.add_argument("--clip", help="CLIP that is to score pictures, as cnext-run takes it")
    doctor.add_argument("--out", type=Path, default=Path("runs"), help="the run's folder (default: runs)")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    tiny = add(
        "pretrain-tiny", _pretrain_tiny, "pretrain the tiny backbone and its CLIP from nothing (about 20 minutes)"
    )
    tiny.add_argument("--out", type=Path, required=True, help="folder for the weights and the model card")
    tiny.add_argument("--seed", type=int, default=0, help="seed of data and initialization (default: 0)")
    tiny.add_argument("--scale", type=float, default=1.0, help="factor on every stage's steps (default: 1)")
    tiny.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """``cnext``: see ``cnext --help``."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["run"]:
        return run_main(given[1:])

    def verb() -> int | None:
        parsed = _parser().parse_args(given)
        return parsed.action(parsed)

    return _guarded(verb)


if __name__ == "__main__":
    sys.exit(main())
