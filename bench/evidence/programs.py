"""Programs run on the GPU: the ops' tests, compute-sanitizer, the main job, every method, SEED-X."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from cnext import methods
from evidence.recorder import Recorder

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
SANITIZER = BENCH / "sanitize_main.cu"
ARCHITECTURE = "arch=compute_90,code=sm_90"
COST = (
    "task",
    "train_seconds",
    "evaluate_seconds",
    "seconds_per_step",
    "tokens_per_second",
    "peak_device_memory_bytes",
)


def ran(command: list[object]) -> subprocess.CompletedProcess[str]:
    """Runs a command from bench/, where the installed cnext is imported; its output goes into the log."""
    done = subprocess.run(
        list(map(str, command)), cwd=BENCH, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, flush=True)
    return done


def tests(recorder: Recorder) -> None:
    """The ops' tests on the device, without those that interpret or only compile kernels."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "tests.xml"
        # Deprecations of other versions are not errors here.
        options = ["-q", "-n", "4" if recorder.gpu else "0", "--maxfail=60", "--tb=short", "-W", "default"]
        chosen = "not interpreted and not compiles" if recorder.gpu else "prepared"
        done = ran([sys.executable, "-m", "pytest", *options, f"--junitxml={found}", ROOT / "tests/ops", "-k", chosen])
        failed = []
        for case in ElementTree.parse(found).iter("testcase") if found.is_file() else ():
            if (fault := next((c for c in case if c.tag in ("failure", "error")), None)) is not None:
                failed.append({"test": case.get("name"), "said": (fault.get("message") or "")[:300]})
    said = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    recorder.put(name="tests/ops", ok=done.returncode == 0, said=said[-1:], failed=failed)


def sanitize(recorder: Recorder) -> None:
    """Every CUDA kernel under compute-sanitizer, on buffers of exactly the size needed."""
    if not recorder.gpu:
        recorder.put(name="sanitize", ok=SANITIZER.is_file(), said="skipped without a GPU")
        return
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "sanitize_main"
        built = ran(compiling(program))
        if built.returncode:
            recorder.put(name="sanitize", ok=False, said=built.stdout[-600:])
            return
        for tool in ("memcheck", "racecheck", "initcheck"):
            done = ran(["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", program])
            recorder.put(name=tool, ok=done.returncode == 0, said=done.stdout[-400:])


def compiling(program: Path) -> list[object]:
    """The command that compiles the sanitizer's program: no torch, no Python."""
    flags = ["-std=c++17", "-O2", "-fmad=false", "-lineinfo", "-gencode", ARCHITECTURE, "-cudart", "static"]
    sources = [SANITIZER, *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    return ["nvcc", *flags, "-I", ROOT / "csrc/cuda", *sources, "-o", program]


def run(recorder: Recorder) -> None:
    """The main job, in both precisions on a GPU."""
    for flags in ([], ["--precision", "bfloat16"])[: 2 if recorder.gpu else 1]:
        with recorder.attempt(f"main job {' '.join(flags)}"), tempfile.TemporaryDirectory() as out:
            options = ["--preset", "smoke", "--device", recorder.device, "--out", out, *flags]
            done = ran([sys.executable, "-m", "cnext", "run", "--method", "mage", *options])
            folder = Path(out) / "mage/paper/seed-0"
            stages = json.loads((folder / "cost.json").read_text())["stages"]
            metrics = json.loads((folder / "results.json").read_text())["metrics"]
            costs = [{key: row.get(key) for key in COST} for row in stages]
            name = f"main job, {flags[-1] if flags else 'float32'}"
            recorder.put(name=name, ok=done.returncode == 0, metrics=metrics, stages=costs)


def every_method(recorder: Recorder) -> None:
    """Cost of every method's stages. Scores of so few steps are meaningless, and left out."""
    names = sorted(methods.modules())[: None if recorder.gpu else 2]
    with tempfile.TemporaryDirectory() as out:
        options = ["--preset", "smoke", "--device", recorder.device, "--out", out]
        precision = ["--precision", "bfloat16"] if recorder.gpu else []
        for name in names:
            with recorder.attempt(name):
                done = ran([sys.executable, "-m", "cnext", "run", "--method", name, *options, *precision])
                stages = json.loads((Path(out) / name / "paper/seed-0/cost.json").read_text())["stages"]
                costs = [{key: row.get(key) for key in COST} for row in stages]
                recorder.put(name=name, ok=done.returncode == 0, stages=costs)


def seed_x(recorder: Recorder) -> None:
    """SEED-X at its published size, random weights; needs 80 GB."""
    small = [] if recorder.gpu else ["--small"]
    done = ran([sys.executable, BENCH / "seed_x.py", *small, "--steps", "4"])
    recorder.put(name="seed_x", ok=done.returncode == 0, said=done.stdout[-6000:])
