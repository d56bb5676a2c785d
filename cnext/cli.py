"""The command line: ``cnext-run`` runs the benchmark, ``cnext`` has the other verbs.

Nothing heavy is imported before a verb needs it: help and lists answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cnext.errors import UserError


def _guarded(verb: Callable[[], int | None]) -> int:
    """Runs a verb; the user's errors become one message and an exit status of 2, without a traceback."""
    try:
        return verb() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last saved block", file=sys.stderr)
        return 130


def run_main(arguments: list[str] | None = None) -> int:
    """``cnext-run``: see ``cnext-run --help``."""
    given = sys.argv[1:] if arguments is None else arguments

    def verb() -> int | None:
        from cnext.running import study

        return study.main(given)

    return _guarded(verb)


def _list(_: argparse.Namespace) -> None:
    from cnext import backbones, methods
    from cnext.tasks import suites

    print("methods")
    for name in sorted(methods.modules()):
        print(f"  {name:<14} {methods.summary(name)}")
    print("backbones")
    for name in sorted(backbones.modules()):
        print(f"  {name:<14} {backbones.SUMMARIES.get(name, '')}")
    print("suites")
    for name in suites.names():
        suite = suites.load(name)
        print(f"  {name:<14} {suite.description}")
        for task in suite.tasks:
            print(f"    {task.name:<12} {'+'.join(task.reads)} -> {'+'.join(task.writes)}: {task.description}")
        print(f"    orders       {', '.join([*suite.orders, 'reverse', 'alphabet', 'random:K'])}, or a list: a,b,c")
        print(f"    budgets      {', '.join(suite.budgets)}")


def _report(arguments: argparse.Namespace) -> None:
    from cnext.running.report import write_report

    for path in write_report(arguments.run):
        print(path)


def _doctor(_: argparse.Namespace) -> None:
    import json

    from cnext.running import environment

    print(json.dumps(environment.describe(), indent=2))


def _pretrain_tiny(arguments: argparse.Namespace) -> None:
    from cnext.running.pretrain_tiny import pretrain

    pretrain(arguments.out, arguments.seed, arguments.scale, arguments.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cnext", description="Continual learning of dual-to-dual multimodal models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    def add(name: str, action: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(action=action)
        return verb

    add("run", lambda arguments: None, "run the benchmark; the same as cnext-run")
    add("list", _list, "list the methods, backbones, suites, tasks, orders and budgets")
    report = add("report", _report, "write report.html and report.md of a run folder again")
    report.add_argument("run", type=Path, help="a run folder, for example runs/mage/paper/seed-0")
    add("doctor", _doctor, "show versions, devices, and which parts of the compiled core are there")
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
    parsed = _parser().parse_args(given)
    return _guarded(lambda: parsed.action(parsed))


if __name__ == "__main__":
    sys.exit(main())
