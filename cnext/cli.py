"""Command line: ``cnext-run`` runs the benchmark, ``cnext`` has the other verbs.

A verb parses its arguments, calls one function and prints what that returns. Modules are imported when a verb needs
them, so that ``cnext --help`` and ``cnext list`` answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from platform import python_version
from typing import Any

import cnext
from cnext.errors import UserError, printable
from cnext.monitoring.signals import Stop, Stopped, terminable
from cnext.monitoring.streams import escape_unencodable, tolerate_closed_pipes

LONGEST_LINE = 4000
"""Characters of a line of a message."""


def _exit_status(given: list[str], verb: Callable[[], int | None]) -> int:
    """Calls a verb. Errors of the user become one message and exit status 2, without a traceback."""
    escape_unencodable()
    with tolerate_closed_pipes():
        try:
            try:
                _check_text(given)
                return verb() or 0
            finally:
                # Here, as errors of a flush at the interpreter's exit cannot be handled.
                if sys.stdout is not None:
                    sys.stdout.flush()
        except UserError as error:
            print("\n".join(map(_cut, f"error: {error}".split("\n"))), file=sys.stderr)
            return 2
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            print(f"error: {error.strerror or error}{where}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return stopped.status
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or "interrupted; the same command continues from what was saved", file=sys.stderr)
            return 130


def _cut(line: str) -> str:
    """A line of a message, which may repeat what was given: of a long one the beginning."""
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}... ({len(line):,} characters)"


def _check_text(given: list[str]) -> None:
    """Raises UserError for bytes that are no text, as in the name of a file: what is written could not name it."""
    for word in given:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            advice = "rename the file or folder" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise UserError(f"expected text in {encoding}, got {printable(word):.200}; {advice}") from error


def _version() -> str:
    return f"cnext {cnext.__version__} from {Path(cnext.__file__).parent} (Python {python_version()})"


def run_main(arguments: list[str] | None = None) -> int:
    """``cnext-run``: see ``cnext-run --help``. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments

    def verb() -> int | None:
        if {"-h", "--help"} & {*given}:
            from cnext.studies import short_help

            print(short_help.text())
            return 0
        from cnext.studies import flags

        try:
            parsed = flags.parse(given)
        except UserError:
            if os.environ.get("WORLD_SIZE", "1") != "1":
                from cnext.distributed import processes

                with processes.refusals():
                    raise
            raise
        if parsed.version:
            print(_version())
            return 0
        from cnext.studies import study

        with Stop():
            return study.main(parsed)

    return _exit_status(given, verb)


def _list(arguments: argparse.Namespace) -> None:
    from cnext.studies import catalog

    print(catalog.listing(arguments.suite))


def _card(arguments: argparse.Namespace) -> None:
    from cnext.studies import catalog

    print(catalog.cards(arguments.method))


def _new_method(arguments: argparse.Namespace) -> None:
    from cnext import example_method

    for path in example_method.write(arguments.name, arguments.out):
        print(path)
    folder = arguments.out or arguments.name
    print(f"pip install -e {folder} && pytest {folder} && cnext card {arguments.name}")


def _mix(arguments: argparse.Namespace) -> tuple[bool, bool]:
    """Whether runs of different environments, and runs on different data, may be averaged."""
    return arguments.mix_environments, arguments.mix_data


def _report(arguments: argparse.Namespace) -> None:
    from cnext.report import write_reports

    for path in write_reports(arguments.run, arguments.out, arguments.baseline, *_mix(arguments)):
        print(path)


def _plot(arguments: argparse.Namespace) -> None:
    from cnext.report.figures import write_figures

    if not 1 <= arguments.width <= 20:
        raise UserError(f"--width: expected a width from 1 to 20 inches, got {arguments.width:g}")
    given = (arguments.run, arguments.to, arguments.format, arguments.figures, arguments.width)
    for path in write_figures(*given, *_mix(arguments)):
        print(path)


def _analyze(arguments: argparse.Namespace) -> None:
    from cnext.analysis import analyze, formats
    from cnext.analysis.groups import RunGroups
    from cnext.tables import aggregate

    study = RunGroups.read(aggregate.find(arguments.run), None, *_mix(arguments))
    found = analyze(study, arguments.what)
    print(formats.FORMATS[arguments.format](found), end="")
    if arguments.format in ("csv", "latex"):
        for name, why in found.left_out.items():
            print(f"left out: {name}: {why}", file=sys.stderr)


def _table(arguments: argparse.Namespace) -> None:
    from cnext.tables import aggregate, columns, columns_formats, formats

    kind = formats.kind_of(arguments.out, arguments.format)
    if arguments.columns is None and arguments.decimals is not None:
        raise UserError("--decimals is for --columns; name these too")
    found = {folder: aggregate.read(folder) for folder in aggregate.find(arguments.run)}
    runs, missing = [run for run in found.values() if run], [str(folder) for folder, run in found.items() if not run]
    if arguments.columns is None:
        text = formats.WRITERS[kind](aggregate.tabulate(runs, arguments.baseline, missing, *_mix(arguments)))
    else:
        chosen = columns.choose(aggregate.group(runs, arguments.baseline, *_mix(arguments)), arguments.columns, missing)
        text = columns_formats.written(chosen, kind, 1 if arguments.decimals is None else arguments.decimals)
    if arguments.out:
        formats.write(arguments.out, text)
        print(arguments.out)
    else:
        print(text, end="")
    aggregate.note_older(runs)


def _status(arguments: argparse.Namespace) -> None:
    from cnext.monitoring import status

    found = status.of_folders(arguments.dir or [Path("runs")])
    print(json.dumps(dataclasses.asdict(found), indent=2) if arguments.json else status.text(found))


def _metrics(arguments: argparse.Namespace) -> None:
    from cnext.runs.results_file import verified
    from cnext.scoring.matrix_file import read, read_json
    from cnext.scoring.metrics_text import metrics_text

    file = arguments.matrix / "results.json" if arguments.matrix.is_dir() else arguments.matrix
    if file.name == "results.json" and file.is_file():
        verified(read_json(file), file)
    matrix = read(arguments.matrix, arguments.scale)
    print(json.dumps(matrix.metrics(), indent=2) if arguments.json else metrics_text(matrix))


def _compare(arguments: argparse.Namespace) -> None:
    from cnext.tables import compare

    here = compare.of(arguments.run, None if arguments.to else "paper", arguments.scale)
    if arguments.to is not None:
        there = compare.of(arguments.to, here.conditions.get("profile"), arguments.scale)
    elif not (arguments.paper or here.method):
        raise UserError(
            f"{arguments.run} does not say its method: name the paper's with --paper METHOD, as MAGE or LoRA"
        )
    else:
        there = compare.of_paper(arguments.paper or here.method, printed=bool(arguments.paper))
    if arguments.scale and not (here.matrix or there.matrix):
        raise UserError("--scale is for a score matrix in a file; the scores of runs are in percent")
    comparison = compare.compare(here, there, arguments.anyway)
    print(compare.as_json(comparison) if arguments.json else compare.text(comparison))


def _judge(arguments: argparse.Namespace) -> int:
    from cnext.judging import command

    given = {name: value for name, value in vars(arguments).items() if name not in ("verb", "action")}
    with terminable():
        return command.judge(**given)


def _data_check(arguments: argparse.Namespace) -> int:
    from cnext import backbones
    from cnext.tasks import data_check_text, suites

    if arguments.backbone:
        backbones.check_tasks(arguments.backbone, arguments.weights, suites.load(arguments.suite).tasks)
    elif arguments.weights is not None:
        raise UserError("--weights are those of a --backbone; name it too")
    need = backbones.unmet_need(*filter(None, [arguments.backbone]), weights=arguments.weights)
    return data_check_text.main(arguments.suite, arguments.dir, arguments.images, arguments.json, need)


def _data_subset(arguments: argparse.Namespace) -> None:
    from cnext.tasks import subset, suites

    suite = suites.load(arguments.suite)
    out = arguments.out or Path(f"{suite.name}-n{arguments.n}-seed{arguments.seed}")
    name = subset.write_subset(suite, arguments.dir, arguments.n, arguments.seed, out, arguments.absolute)
    print(f"{name}: cnext-run --suite {out} --data {out}")


def _data_generate(arguments: argparse.Namespace) -> None:
    from cnext.tasks import generated, suites

    suite = suites.load(arguments.suite)
    print(generated.write_folder(suite, arguments.preset, arguments.out or Path(suite.name)))


def _export(arguments: argparse.Namespace) -> None:
    from cnext.exchange.export import export

    given = (arguments.run, arguments.to, arguments.format, arguments.checkpoint, arguments.branches_only)
    for path in export(*given, arguments.base_model, arguments.license):
        print(path)


def _evaluate(arguments: argparse.Namespace) -> None:
    from cnext.exchange.evaluation import evaluate

    given = {name: value for name, value in vars(arguments).items() if name not in ("verb", "action")}
    evaluate(**given)


def _import(arguments: argparse.Namespace) -> None:
    from cnext.exchange.importing import import_adapter

    given = (arguments.path, arguments.to, arguments.backbone, arguments.method, arguments.weights)
    print(import_adapter(*given))


def _doctor(arguments: argparse.Namespace) -> int:
    from cnext.config.run_config import Options
    from cnext.doctor import checks

    names = ("backbone", "suite", "weights", "data", "clip", "out")
    return checks.main(Options(**{name: getattr(arguments, name) for name in names}), arguments.json)


def _validate(arguments: argparse.Namespace) -> int:
    from cnext.doctor import validation

    return validation.main(arguments.file)


def _parser() -> argparse.ArgumentParser:
    # Raw, so that --version does not break the path in two lines.
    parser = argparse.ArgumentParser(
        "cnext",
        description="Continual learning of multimodal models that read and write text and images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version(), help="print the version and its location")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    tables = ("markdown", "csv", "latex", "json")

    def add(
        name: str, action: Callable[[argparse.Namespace], int | None], text: str, to: Any = verbs
    ) -> argparse.ArgumentParser:
        verb = to.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(action=action)
        return verb

    add("run", lambda arguments: None, "run the benchmark; the same as cnext-run")

    verb = add("list", _list, "list methods, backbones, and suites with their tasks, orders and presets")
    verb.add_argument("suite", nargs="?", help="show one suite in detail: its tasks, files, counts and license")

    verb = add("card", _card, "show a method's card: what it trains, needs and stores, and its hyperparameters")
    verb.add_argument("method", nargs="+", help="name of a method, as `cnext list` shows it")

    verb = add("new-method", _new_method, "write a package with a method of your own, to be changed, and its test")
    verb.add_argument("name", help="name of the method, for example my-method")
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder to write, which must not exist (default: ./NAME)")

    report = add("report", _report, "rewrite the report of a run, or of a study of several runs, from run folders")
    help = "one run folder for report.html and report.md; several, or folders that contain some, for study.html"
    report.add_argument("run", type=Path, nargs="+", help=help)
    report.add_argument("--out", type=Path, metavar="DIR", help="folder for study.html (default: the runs' parent)")

    plot = add("plot", _plot, "write the figures of a run, or of a study of several runs, as files for a document")
    help = "one run folder; several, or folders that contain some, for the figures of a study"
    plot.add_argument("run", type=Path, nargs="+", help=help)
    plot.add_argument("--to", type=Path, required=True, metavar="DIR", help="output folder")
    help = "formats of the files (default: pdf)"
    plot.add_argument("--format", choices=("pdf", "svg", "png"), nargs="+", default=["pdf"], help=help)
    help = "figures, such as score_matrix, stages or stages_1 (default: all of the report)"
    plot.add_argument("--figures", nargs="+", metavar="NAME", help=help)
    help = "width in inches that a figure has at most, where it can be so narrow (default: 3.3, a column of a paper)"
    plot.add_argument("--width", type=float, default=3.3, metavar="INCHES", help=help)

    analyze = add("analyze", _analyze, "analyze where and why methods forget, from run folders")
    analyze.add_argument("run", type=Path, nargs="+", help="run folders, or folders that contain some")
    names = ("types", "transfer", "orders", "ablations", "seeds", "stages", "drift", "samples", "breaks", "validity")
    help = "analyses to do (default: all that these folders allow)"
    analyze.add_argument("--what", choices=names, nargs="+", default=[], help=help)
    analyze.add_argument("--format", choices=tables, default="markdown", help="default: markdown")

    table = add("table", _table, "print means over seeds and orders, and paired differences, from run folders")
    table.add_argument("run", type=Path, nargs="+", help="run folders, or folders that contain some")
    help = (
        "one table of these columns, the best in bold: metrics as in results.json (avg_acc forgetting new_acc ...), "
        "scores of each task (final learnt drop zero_shot), n, and test against the baseline (default: means over "
        "seeds, over orders, and differences)"
    )
    table.add_argument("--columns", nargs="+", metavar="NAME", help=help)
    table.add_argument("--decimals", type=int, choices=range(5), metavar="N", help="of --columns, 0 to 4 (default: 1)")
    table.add_argument("--format", choices=(*tables, "html"), help="default: by --out, else markdown")
    table.add_argument("--out", type=Path, metavar="FILE", help="write a file: .md, .csv, .tex, .html or .json")

    help = "average runs made on different processors, versions or thread counts, and say so"
    for verb in (report, plot, analyze, table):
        verb.add_argument("--mix-environments", action="store_true", help=help)
        verb.add_argument("--mix-data", action="store_true", help="average runs on different data, and say so")
    help = "method that the others are compared with (default: lora if present, else the first)"
    for verb in (report, table):
        verb.add_argument("--baseline", metavar="METHOD", help=help)

    verb = add("status", _status, "show the state of runs: step, speed and time left; works from any terminal")
    verb.add_argument("dir", type=Path, nargs="*", help="run folders, or folders that contain some (default: runs)")
    verb.add_argument("--json", action="store_true", help="print all details as JSON")

    metrics = add("metrics", _metrics, "compute every metric of a score matrix in a CSV or JSON file")
    help = "scores in percent; one row per stage (after each task), one column per task, both in training order"
    metrics.add_argument("matrix", type=Path, help=help)
    metrics.add_argument("--json", action="store_true", help="print the metrics as in results.json")

    text = "compare scores of a run or a matrix with the paper's or with others, cell by cell"
    verb = compare = add("compare", _compare, text)
    help = "a run folder, its results.json, or a score matrix in a .csv or .json file, as for cnext metrics"
    verb.add_argument("run", type=Path, help=help)
    other = verb.add_mutually_exclusive_group(required=True)
    help = "the paper's method, by its name there or here: MAGE, mage-paper, LoRA ... (default: the run's)"
    other.add_argument("--paper", nargs="?", const="", metavar="METHOD", help=help)
    other.add_argument("--to", type=Path, metavar="RUN", help="another run, or matrix")
    help = (
        "of a matrix in a file: whether its scores go to 100 or to 1 (default: percent; refused if all are at most 1)"
    )
    for each in (metrics, compare):
        each.add_argument("--scale", choices=("percent", "fraction"), help=help)
    help = "compare runs under different conditions as well, and list the differences"
    verb.add_argument("--anyway", action="store_true", help=help)
    verb.add_argument("--json", action="store_true", help="print the comparison as JSON")

    verb = add("judge", _judge, "classify each error of a run as hallucination, instruction unfollowing or other")
    help = "run folders, or folders that contain some; or `validate`, to compare the judge with errors of known type"
    verb.add_argument("run", nargs="+", help=help)
    help = (
        "rules (default; no model), openai:URL (a server, e.g. http://localhost:8000/v1; its key, if it wants one, in "
        "the environment variable OPENAI_API_KEY) or replay:FILE"
    )
    verb.add_argument("--judge", default="rules", help=help)
    verb.add_argument("--model", help="model on that server (default: Qwen/Qwen3-VL-30B-A3B-Instruct)")
    help = "judge a sample of N errors per run, stratified by stage and task, and estimate averages with intervals"
    verb.add_argument("--limit", type=int, metavar="N", help=help)
    help = "judge all stages (default with a model: those that Avg.HAL, Avg.IUF and Avg.OTH need)"
    verb.add_argument("--every-stage", action="store_true", help=help)
    verb.add_argument("--dry-run", action="store_true", help="print the number of requests and tokens, and exit")
    verb.add_argument("--name", help="name of the files in RUN/judge (default: rules, replay or the model's name)")
    verb.add_argument("--concurrency", type=int, metavar="N", help="concurrent requests (default: 8)")
    verb.add_argument("--timeout", type=float, metavar="S", help="most seconds of a request in all (default: 120)")
    verb.add_argument("--tries", type=int, metavar="N", help="attempts per request (default: 5)")
    help = "most tokens of a reply (default: 64); a model that reasons before it answers needs 2048 or more"
    verb.add_argument("--max-tokens", type=int, metavar="N", help=help)
    verb.epilog = (
        "Exit status 0: all errors, or all of a sample, are judged; 1: some are not; 2: wrong usage, no server."
    )
    verb.add_argument("--out", type=Path, help="output folder of `validate` (default: ./judge)")

    text = "check the files of a suite, sample them as a suite of its own, or write those of a generated suite"
    data = verbs.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".")
    parts = data.add_subparsers(dest="part", required=True, metavar="part")
    text = "read and count every file of a suite; exit status 0: no problems, 1: problems found, 2: wrong usage"
    check = add("check", _data_check, text, parts)
    check.add_argument("--json", type=Path, metavar="FILE", help="write all problems, with lines and paths, to a file")
    help = "check of images: none, verify (complete files) or decode (every pixel) (default: decode)"
    check.add_argument("--images", choices=("none", "verify", "decode"), default="decode", help=help)
    help = "refuse tasks that it cannot do, and report images that it cannot read (default: any of cnext's)"
    check.add_argument("--backbone", metavar="NAME", help=help)
    check.add_argument(
        "--weights", type=Path, metavar="PATH", help="weights of that backbone, where it depends on them"
    )
    generate = add("generate", _data_generate, "write the files of a generated suite, with Croissant metadata", parts)
    generate.add_argument("--suite", default="next-real", help="next-real (default) or next-tiny")
    generate.add_argument("--preset", default="default", help="training settings, for the numbers of items")
    generate.add_argument("--out", type=Path, help="output folder, which must not exist (default: ./<suite>)")
    subset = add("subset", _data_subset, "write a random sample of every split as a suite of its own", parts)
    subset.add_argument("--n", type=int, default=500, help="rows per split (default: 500)")
    subset.add_argument("--seed", type=int, default=0, help="random seed of the sample (default: 0)")
    subset.add_argument("--out", type=Path, help="output folder (default: ./<suite>-n<n>-seed<seed>)")
    subset.add_argument("--absolute", action="store_true", help="refer to images by absolute paths")
    for verb in (check, subset):
        verb.add_argument("dir", type=Path, help="folder with the suite's files")
        verb.add_argument("--suite", default="continual-next", help="suite (default: continual-next)")

    verb = add("export", _export, "export a run's adapters for other tools, with a model card and checksums")
    verb.add_argument("run", type=Path, help="run folder, for example runs/mage/paper/seed-0")
    verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="output folder, which must not exist")
    help = (
        "peft: one adapter per branch; peft-merged-rank: all branches in one adapter; authors: the layout of the "
        "authors' code; merged: the model with the branches merged into its weights"
    )
    formats = ("peft", "peft-merged-rank", "authors", "merged")
    verb.add_argument("--format", choices=formats, required=True, help=help)
    verb.add_argument("--checkpoint", metavar="NAME", help="checkpoint of the run (default: the last)")
    verb.add_argument("--branches-only", action="store_true", help="omit what was trained besides the branches")
    help = "name of the model without branches, for others to find it (default: the folder of the run's weights)"
    verb.add_argument("--base-model", metavar="NAME", help=help)
    verb.add_argument("--license", metavar="ID", help="license in the model card, for example apache-2.0")

    verb = add("import", _import, "import a PEFT adapter or the authors' released weights as a run to export")
    help = "folder of one or several PEFT adapters, or the released pytorch_model.bin or safetensors file"
    verb.add_argument("path", type=Path, help=help)
    verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="output folder, which must not exist")
    verb.add_argument("--backbone", default="tiny", help="backbone of the adapter (default: tiny)")
    help = "method that trained it (default: by the names of the branches)"
    verb.add_argument("--method", choices=("mage", "mage-paper", "moelora", "lora"), help=help)
    verb.add_argument("--weights", type=Path, metavar="PATH", help="folder or file of the backbone's weights")

    help = "score an adapter, a merged model or a run's checkpoint on a suite, without training"
    verb = add("evaluate", _evaluate, help)
    help = "the authors' released file, a folder of PEFT adapters or of a merged model, a run folder, or a checkpoint"
    verb.add_argument("path", type=Path, help=help)
    verb.add_argument("--backbone", help="backbone of the adapter (default: the run's; tiny)")
    verb.add_argument("--weights", type=Path, metavar="PATH", help="folder or file of the backbone's weights")
    help = "options for loading the backbone, as for cnext-run"
    verb.add_argument("--backbone-options", nargs="+", metavar="NAME=VALUE", help=help)
    verb.add_argument("--device-map", help="placement of the model on several devices, as for cnext-run")
    verb.add_argument("--suite", help="suite of tasks (default: the run's; next-tiny)")
    verb.add_argument("--data", type=Path, metavar="DIR", help="folder with the suite's files")
    verb.add_argument("--tasks", metavar="A,B", help="tasks to score (default: those learnt; all of the suite)")
    verb.add_argument(
        "--split", choices=("test", "validation", "reworded"), help="split that is scored (default: test)"
    )
    verb.add_argument(
        "--method", help="method of an adapter: mage, mage-paper, moelora or lora (default: by its branches)"
    )
    help = "preset with the precision and number of test samples (default: the run's; default)"
    verb.add_argument("--preset", help=help)
    help = "precision of the model; the authors evaluate in float16 (default: the preset's)"
    verb.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help=help)
    verb.add_argument("--prompts", choices=("released", "consistent"), help="prompts of image tasks, as for cnext-run")
    verb.add_argument("--clip", help="CLIP that scores images, as for cnext-run")
    verb.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    verb.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: evaluations/NAME-SHA256)")
    verb.epilog = "Writes a run folder for cnext compare, judge and report. Zero-shot: cnext-run --method zero-shot."

    verb = add("validate", _validate, "check a file of settings without running it, and show its runs")
    verb.epilog = "Exit status 0: cnext-run --config FILE can start; 2: it cannot, and every problem is listed."
    verb.add_argument("file", type=Path, help="YAML file, for example run.yaml of a run folder")

    text = "check whether a run can start here: packages, devices, kernels, weights, data, CLIP, memory, disk"
    verb = add("doctor", _doctor, text)
    verb.epilog = "Exit status 0: a run can start; 1: it cannot."
    verb.add_argument("--backbone", default="auto", help="backbone of the run (default: the suite's)")
    verb.add_argument("--weights", type=Path, metavar="PATH", help="folder or file of the backbone's weights")
    verb.add_argument("--suite", default="next-tiny", help="suite of the run (default: next-tiny)")
    verb.add_argument("--data", type=Path, metavar="DIR", help="folder with the suite's files")
    verb.add_argument("--clip", help="CLIP that scores images, as for cnext-run")
    verb.add_argument("--out", type=Path, default=Path("runs"), help="output folder of the run (default: runs)")
    verb.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """``cnext``: see ``cnext --help``. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["run"]:
        return run_main(given[1:])

    def verb() -> int | None:
        parsed = _parser().parse_args(given)
        return parsed.action(parsed)

    return _exit_status(given, verb)


if __name__ == "__main__":
    sys.exit(main())
