"""On a machine with a GPU: ``python bench/gpu.py`` tests and benchmarks what runs there, and keeps the results.

    python bench/gpu.py                     all of these, one after the other:
    python bench/gpu.py tests               the kernels' tests
    python bench/gpu.py kernels             every benchmark of the compiled core
    python bench/gpu.py methods             memory and speed of every method, in bfloat16, on the embedded default
    python bench/gpu.py seed_x              SEED-X at full size, random weights; needs 80 GB
    python bench/gpu.py branches_qkv        anything else: the benchmarks that pytest -k finds by this

The results are bench/results/<gpu>_<date>[_<what>].json, those of benchmarks as pytest-benchmark writes them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from cnext import methods

HERE = Path(__file__).parent
ROOT = HERE.parent
COST = ("peak_device_memory_bytes", "seconds_per_step", "tokens_per_second", "energy_joules")


def called(command: list[object]) -> None:
    """Runs a command with the tests' tensors on the GPU; ends this program where it fails."""
    environment = os.environ | {"CNEXT_TEST_DEVICE": "cuda"}
    subprocess.run(list(map(str, command)), cwd=HERE, env=environment, check=True)


def file(what: str) -> Path:
    """Where results of this GPU and day go."""
    words = [torch.cuda.get_device_name(), date.today().isoformat(), what]
    name = "_".join(re.sub(r"[^a-z0-9.-]+", "_", word.lower()) for word in words if word)
    (HERE / "results").mkdir(exist_ok=True)
    return HERE / "results" / f"{name}.json"


def tests() -> None:
    # Kernels that run need not be interpreted, nor compiled for GPUs that are not there.
    called([sys.executable, "-m", "pytest", "-q", ROOT / "tests/ops", "-k", "not interpreted and not compiles"])


def kernels(chosen: str = "", what: str = "averaging or branches") -> None:
    result = file(chosen)
    options = ["--benchmark-only", "-k", what, f"--benchmark-json={result}"]
    called([sys.executable, "-m", "pytest", "-q", HERE, *options])
    print(f"wrote {result.relative_to(ROOT)}")


def every_method() -> None:
    """Costs of every method's stages, as measured by its run. Scores of so few steps mean nothing, and are left out."""
    names, rows = sorted(methods.modules()), {}
    with tempfile.TemporaryDirectory() as out:
        options = ["--budget", "smoke", "--device", "cuda", "--precision", "bfloat16", "--out", out]
        called([sys.executable, "-m", "cnext.cli", "run", "--method", *names, *options])
        for name in names:
            cost = json.loads((Path(out) / name / "paper/seed-0/cost.json").read_text())
            rows[name] = {row["task"]: {key: row[key] for key in COST} for row in cost["stages"]}
    versions = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    result = file("methods")
    result.write_text(json.dumps({**versions, "precision": "bfloat16", "methods": rows}, indent=2) + "\n")
    print(f"wrote {result.relative_to(ROOT)}")


def seed_x() -> None:
    called([sys.executable, HERE / "seed_x.py"])


PARTS = {"tests": tests, "kernels": kernels, "methods": every_method, "seed_x": seed_x}


def main(what: str = "") -> None:
    """Everything, one part, or the benchmarks that an expression chooses."""
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; the CPU benchmarks are: pytest bench/ --benchmark-only")
    if what and what not in PARTS:
        kernels(what, what)
    for part in PARTS if not what else [what] if what in PARTS else []:
        PARTS[part]()


if __name__ == "__main__":
    main(*sys.argv[1:])
