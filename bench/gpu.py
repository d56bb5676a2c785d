"""Checks and benchmarks on a GPU, the most important ones first and correctness before speed.

    python bench/gpu.py                                        all parts but the long ones, in under 8 minutes
    python bench/gpu.py --parts compiled,methods,seed_x        the long ones, in under 10
    python bench/gpu.py --rehearse --out /tmp/rehearsal        the same program on small sizes on a CPU
    python bench/gpu.py --wheels wheels                        collect wheels for a machine without a network

Each part runs in its own process group with a time limit; where one fails, the next one starts. The output folder gets
rows.jsonl (appended to as results come), log.txt, and summary.txt, which is printed at the end. The exit status is 0
where all parts ended in time and every check passed; no speed makes it fail.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = {
    "ceilings": ("times.ceilings", 40),
    "check": ("check.check", 80),
    "tests": ("programs.tests", 110),
    "sanitize": ("programs.sanitize", 60),
    "averaging": ("times.averaging", 60),
    "kron": ("times.kron", 50),
    "branches": ("times.branches", 130),
    "layer": ("times.layer", 60),
    "run": ("programs.run", 70),
    "profile": ("times.profile", 40),
    "compiled": ("times.compiled", 150),
    "methods": ("programs.every_method", 300),
    "seed_x": ("programs.seed_x", 240),
}
"""A part's function in bench/evidence, and its time limit in seconds."""
LONG = ("compiled", "methods", "seed_x")
SLOWER = 20
"""Factor of the time limits with --rehearse: a CPU, and other load on it."""
LEAST = 15
"""With fewer seconds left than this, no part is started."""


def file(what: str) -> Path:
    """Path of the results of this GPU and day: bench/results/<gpu>_<date>_<what>."""
    import torch

    words = [torch.cuda.get_device_name(), date.today().isoformat(), what]
    (HERE / "results").mkdir(exist_ok=True)
    return HERE / "results" / "_".join(re.sub(r"[^a-z0-9.-]+", "_", word.lower()) for word in words if word)


def isolated(command: Sequence[str], log: Path, limit: float) -> tuple[int | str, float]:
    """Runs a command in its own process group, which is killed after ``limit`` seconds.

    Returns:
        Its exit status or "time limit", and its seconds.
    """
    start = time.monotonic()
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = "time limit"
        finally:
            # Its remaining child processes end with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, time.monotonic() - start


def written(rows: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last one that is incomplete."""
    found = []
    for line in rows.read_text().splitlines() if rows.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def machine(revision: str | None) -> dict[str, object]:
    """Versions, and the revision of the source: as given, or from git."""
    from importlib.metadata import version

    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = ("cnext", "torch", "triton", "transformers", "peft")
    versions = {name: version(name) for name in names}
    return {
        "part": "machine",
        "python": sys.version.split()[0],
        **versions,
        "revision": revision or asked.stdout.strip() or None,
    }


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Failed checks, rows with an error, and parts that did not exit with status 0."""
    found = []
    for row in rows:
        if row.get("ok") is False or isinstance(row.get("error"), str):
            fields = {key: row[key] for key in row if key not in ("part", "ok")}
            found.append(f"{row['part']}: {json.dumps(fields)[:300]}")
        elif row.get("code", 0) != 0:
            found.append(f"{row['part']}: ended with {row['code']} after {row['seconds']:.0f} s")
    return found


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line per result."""
    first = {key: value for row in rows for key, value in row.items() if row["part"] in ("machine", "ceilings")}
    shown = ("gpu", "python", "torch", "cuda", "triton", "cnext", "revision")
    yield ", ".join(f"{key} {first[key]}" for key in shown if first.get(key))
    copy = max(
        (row["tb_per_s"] for row in rows if row.get("name", "").startswith("copy") and "tb_per_s" in row), default=0
    )
    for row in rows:
        name, part = row.get("name", ""), row["part"]
        if "tb_per_s" in row:
            yield f"{name:38} {row['tb_per_s']:.2f} TB/s"
        elif "gb_per_s" in row:
            share = f", {row['gb_per_s'] / 1e3 / copy:.2f} of the copy" if copy else ""
            yield f"{name:38} {row['ms']:.3f} ms, {row['gb_per_s']:.0f} GB/s{share}"
        elif "host_ms" in row:
            yield f"{name:38} {row['wall_ms']:.2f} ms, host {row['host_ms']:.3f} ms"
        elif "tflops" in row:
            yield f"{name:38} {row['shape']} {row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s"
        elif part in ("branches", "layer", "compiled") and "ratio" in row:
            where = f"{row['shape']}, {row['rows']} rows" if "shape" in row else f"checkpointed {row['checkpointed']}"
            yield f"{name:16} dropout {row['dropout']:<5} {where:32} {row['ratio']:.3f} x frozen"
        elif "launches" in row:
            yield f"{name:48} {row['launches']:.0f}"
        elif part in ("tests", "run", "sanitize", "methods", "seed_x") and "ok" in row:
            yield f"{part} {name:32} {'ok' if row['ok'] else 'FAILED'} {str(row.get('said', ''))[:80]}"
    checked = [row for row in rows if row["part"] == "check" and "ok" in row]
    yield f"checks: {sum(row['ok'] for row in checked)} of {len(checked)} passed"
    yield from (f"FAILED {line}" for line in faults(rows))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="python bench/gpu.py [options]"
    )
    parser.add_argument("--out", type=Path, help="output folder, appended to (default: bench/results/<gpu>_<date>)")
    normal = [name for name in PARTS if name not in LONG]
    parser.add_argument(
        "--parts",
        default=",".join(normal),
        help=f"comma-separated: {', '.join(PARTS)} (default: all but the last {len(LONG)})",
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="time limit of all parts (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run on small sizes on a CPU")
    parser.add_argument("--revision", help="revision of the source to record (default: from git)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="build and download wheels into DIR, then exit")
    parser.add_argument("--python", default=sys.executable, help="with --wheels: their interpreter (default: this one)")
    parser.add_argument("--have", type=Path, help="with --wheels: file with `pip freeze` of the other machine")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a part, in its own process
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.parts.split(",") if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; valid: {', '.join(PARTS)}")
    if given.have and not given.have.is_file():
        parser.error(f"--have {given.have}: no such file; expected the output of `pip freeze` on the other machine")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; returns the exit status."""
    given = parsed(arguments)
    if given.wheels:
        from evidence.wheels import collect

        collect(given.wheels, given.python, given.have)
        return 0
    if not given.rehearse:
        import torch

        if not torch.cuda.is_available():
            cpu = "benchmarks of a CPU are: pytest bench/ --benchmark-only"
            print(f"error: torch sees no CUDA device here; --rehearse runs small on a CPU; {cpu}", file=sys.stderr)
            return 2
    out = given.out or file("")
    out.mkdir(parents=True, exist_ok=True)
    rows, log = out / "rows.jsonl", out / "log.txt"
    if given.one:
        from evidence.recorder import Recorder

        module, function = PARTS[given.one][0].split(".")
        sys.path.append(str(ROOT / "tests"))  # the benchmarks' own helpers
        getattr(importlib.import_module(f"evidence.{module}"), function)(Recorder(rows, given.one, not given.rehearse))
        return 0

    def put(**row: object) -> None:
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    put(**machine(given.revision), rehearsed=given.rehearse)
    begin = time.monotonic()
    os.environ |= {"CNEXT_TEST_DEVICE": "cpu" if given.rehearse else "cuda", "PYTHONUNBUFFERED": "1"}
    if given.rehearse:
        os.environ["CNEXT_BENCH_SMALL"] = "1"
    for part in given.parts.split(","):
        limit = PARTS[part][1] * (SLOWER if given.rehearse else 1)
        if not given.rehearse:
            limit = min(limit, given.seconds - (time.monotonic() - begin))
        if limit < LEAST:
            put(part=part, name=part, error=f"not started: {limit:.0f} s left, fewer than {LEAST}")
            continue
        options = ["--rehearse"] if given.rehearse else []
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(out.resolve()), "--one", part, *options]
        code, seconds = isolated(command, log, limit)
        put(part=part, code=code, seconds=round(seconds, 1))
        print(f"{part}: {code if code else 'done'} after {seconds:.0f} s", flush=True)
    found = written(rows)
    text = "\n".join(summary(found)) + "\n"
    (out / "summary.txt").write_text(text)
    print(f"\n{text}", end="")
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
