"""Mutation testing: how many small faults, put into a module one at a time, its tests notice.

    pip install cosmic-ray && python bench/mutation.py --sample 40 --out mutants.jsonl [MODULE ...]

The mutants are cosmic-ray's; docs/mutation.md has the results. Torch and pytest are imported once: each mutant has a
process forked from there, which imports it in place of the module and runs the module's tests until one fails.
The package is the editable one, and its files stay as they are. Linux only.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RULES = "averaging/test_rules averaging/test_ranges averaging/test_task_parameters averaging/test_copies"
TESTS = {
    "metrics": {"scoring.matrix": "scoring/test_score_matrix"},
    "scoring": {
        "scoring.answers": "scoring/test_text_scorers scoring/test_other_suites scoring/test_published",
        "scoring.text": "scoring/test_text_scorers scoring/test_other_suites",
        "scoring.boxes": "scoring/test_box_scorer",
        "scoring.vqa_accuracy": "scoring/test_text_scorers scoring/test_published scoring/test_other_suites",
        "scoring.cider": "scoring/test_cider",
        "scoring.coin": "scoring/test_other_suites",
        "scoring.mllm_cl": "scoring/test_other_suites",
        "scoring.errors": "scoring/test_error_types scoring/test_text_scorers",
        "scoring.text_rules": "scoring/test_error_types scoring/test_spelling",
    },
    "checkpoint and run folder": {
        "durable": "test_durable",
        "runs.seals": "runs/test_run_files",
        "runs.logs": "runs/test_run_files",
        "runs.checkpoint": "runs/test_run_files",
        "runs.run_folder": "runs/test_run_files",
    },
    "averaging": {
        "averaging.base": RULES,
        "averaging.pema": RULES,
        "averaging.fisher": f"averaging/test_fisher_units {RULES}",
        "averaging.released": RULES,
        "averaging.per_step": RULES,
        "ops.averaging_reference": f"ops/test_averaging_ops {RULES}",
    },
}
"""By group and module: the files in tests/ that are run, those that fail sooner first."""
SECONDS, ASLEEP = 20, 60
"""Of a processor, that a mutant may take beyond five times what the module itself takes; and that it may wait."""
NOTHING_COLLECTED = 5
"""Status of pytest where all tests were left to children."""
SURVIVED, KILLED, SLOW = "survived", "killed", "timeout"


def source_file(module: str) -> Path:
    return ROOT / "cnext" / (module.replace(".", "/") + ".py")


def meaning(source: str) -> str:
    """A module without annotations, which nothing reads when it runs, and without the ends of lines."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
    return ast.dump(tree)


def mutants(source: str, generator: random.Random) -> Iterator[tuple[str, str]]:
    """(operator, changed source) of every mutant that is Python, in random order; none of annotations alone."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import MutationVisitor
    from cosmic_ray.operators.provider import OperatorProvider

    provider, tree, found = OperatorProvider(), get_ast(source), []
    nodes = list(ast_nodes(tree))
    for name in provider:
        if not provider[name].arguments():
            count = sum(1 for node in nodes for _ in provider[name]().mutation_positions(node))
            found += [(name, number) for number in range(count)]
    generator.shuffle(found)
    seen = {meaning(source)}
    for name, number in found:
        changed = MutationVisitor(number, provider[name]()).walk(copy.deepcopy(tree)).get_code()
        try:
            meant = meaning(changed)
        except SyntaxError:  # as of "if not a := b"
            continue
        if meant not in seen:
            seen.add(meant)
            yield name, changed


class Changed(SourceFileLoader):
    """Imports a module from another source, and finds it before others do."""

    def __init__(self, module: str, source: str) -> None:
        super().__init__(module, str(source_file(module.partition(".")[2])))
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


def forked(module: str, source: str, seconds: float, temporary: Path) -> tuple[str, float] | None:
    """What became of a mutant, and the processor's seconds of its tests; None in the child, which runs them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (24 << 30, 24 << 30))
        output = os.open(temporary / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.meta_path.insert(0, Changed(f"cnext.{module}", source))  # pyright: ignore[reportArgumentType]
        return None
    status, awake = None, time.monotonic()
    while status is None:
        ended, found = os.waitpid(child, os.WNOHANG)
        if ended:
            status = found
            break
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "R":  # or it waits for a processor
            awake = time.monotonic()
        if time.monotonic() - awake > ASLEEP:  # it waits for a lock, or the end of another
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return SLOW, took
    return SURVIVED if status == 0 else KILLED, took


class Fork:
    """A plugin of pytest that forks once pytest is set up: collecting and running the tests is left to the children."""

    def __init__(self, module: str, options: argparse.Namespace, temporary: Path) -> None:
        self.module, self.options, self.temporary = module, options, temporary

    def pytest_collection(self) -> bool | None:
        """None in a child, which goes on to the tests; True once all mutants are done."""
        source = source_file(self.module).read_text(encoding="utf-8")
        if (found := forked(self.module, source, 1800, self.temporary)) is None:
            return None
        if found[0] != SURVIVED:
            print((self.temporary / "output.txt").read_text(encoding="utf-8"))
            raise RuntimeError(f"the tests of {self.module} fail without a mutant")
        seconds = SECONDS + 5 * found[1]
        generator = random.Random(f"{self.options.seed} {self.module}")
        for operator, changed in itertools.islice(mutants(source, generator), self.options.sample):
            if (found := forked(self.module, changed, seconds, self.temporary)) is None:
                return None
            line, code = line_changed(source, changed)
            row = {"module": self.module, "operator": operator, "line": line, "code": code, "result": found[0]}
            with self.options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if found[0] == SURVIVED:
                print(f"survived: cnext.{self.module}:{line}: {code}", flush=True)
        return True


def run_tests(module: str, options: argparse.Namespace, temporary: Path) -> None:
    """Runs the tests of a module on each of its mutants."""
    files = next(tests[module] for tests in TESTS.values() if module in tests).split()
    paths = [str(ROOT / "tests" / f"{file}.py") for file in files]
    given = ["-sxq", "--tb=line", "--noconftest", f"--basetemp={temporary / 'pytest'}", f"--rootdir={ROOT}", *paths]
    parent, status = os.getpid(), 1
    try:
        status = sys.modules["pytest"].main(given, plugins=[Fork(module, options, temporary)])
    finally:
        if os.getpid() != parent:
            os._exit(status)
    if status != NOTHING_COLLECTED:
        sys.exit(1)


def line_changed(source: str, changed: str) -> tuple[int, str]:
    """Number of the first line that a mutant changes, and the lines as they are in it."""
    lines, others = source.splitlines(), changed.splitlines()
    parts = [part for part in difflib.SequenceMatcher(None, lines, others, False).get_opcodes() if part[0] != "equal"]
    _, first, _, start, end = parts[0]
    return first + 1, " / ".join(each.strip() for each in others[start : max(end, start + 1)])


def interval(killed: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share, after Wilson, in percent."""
    z, share = 1.96, killed / count
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return tuple(100 * (middle + sign * width) / (1 + z * z / count) for sign in (-1, 1))  # pyright: ignore


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, from the lines of the file that `--out` names."""
    lines = ["| group | module | mutants | killed | survived | share | 95% interval |", "|---|---|---|---|---|---|---|"]
    for group, modules in TESTS.items():
        found = [(name, [row for row in rows if row["module"] == name]) for name in modules]
        found = [(f"`cnext/{name.replace('.', '/')}.py`", some) for name, some in found if some]
        together = [row for _, some in found for row in some]
        for name, some in [*found, ("together", together)] if together else ():
            counts = Counter(row["result"] for row in some)
            killed, survived = len(some) - counts[SURVIVED], counts[SURVIVED]
            low, high = interval(killed, len(some))
            lines.append(
                f"| {group} | {name} | {len(some)} | {killed} | {survived} | {100 * killed / len(some):.0f}% | "
                f"{low:.0f} to {high:.0f}% |"
            )
    return "\n".join(lines)


def preload(torch: bool) -> None:
    """Imports what tests import besides cnext, so that it is not imported for every mutant."""
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "bench")]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in ("numpy", "pytest", *(("PIL.Image", "hypothesis", "msgspec", "safetensors.torch") if torch else ())):
        importlib.import_module(name)
    if torch:
        sys.modules["torch"].set_num_threads(1)


def main() -> None:
    """Prints a line for every mutant that survives, and the table."""
    known = [name for modules in TESTS.values() for name in modules]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--sample", type=int, help="mutants of each module, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for every mutant; those there stay")
    parser.add_argument("--table", action="store_true", help="only print the table of what --out has")
    options = parser.parse_args()
    if unknown := sorted({*options.modules} - {*known}):
        parser.error(f"expected modules of {', '.join(known)}, got {', '.join(unknown)}")
    if not options.table:
        preload(torch=not all(name.startswith("scoring.") for name in options.modules or known))
        with tempfile.TemporaryDirectory() as temporary:
            for module in options.modules or known:
                run_tests(module, options, Path(temporary))
    print(table([json.loads(line) for line in options.out.read_text(encoding="utf-8").splitlines()]))


if __name__ == "__main__":
    main()
