"""On a machine with a GPU: ``python bench/gpu.py`` tests the kernels there, benchmarks them, and keeps the results.

    python bench/gpu.py                     tests, then every benchmark of the compiled core
    python bench/gpu.py branches_qkv        only the benchmarks that pytest -k finds by this
    python bench/gpu.py tests               only the tests

The results are pytest-benchmark's own JSON, bench/results/<gpu>_<date>[_<what>].json, with machine and versions.
"""

import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


def main(what: str = "") -> None:
    """Everything, or the tests, or the benchmarks that an expression chooses."""
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; the CPU benchmarks are: pytest bench/ --benchmark-only")
    environment = os.environ | {"CNEXT_TEST_DEVICE": "cuda"}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if what in ("", "tests"):
        # Kernels that run need not be interpreted, nor compiled for GPUs that are not there.
        real = [ROOT / "tests/ops", "-k", "not interpreted and not compiles"]
        subprocess.run([*pytest, *real], cwd=HERE, env=environment, check=True)
    if what != "tests":
        words = [torch.cuda.get_device_name(), date.today().isoformat(), what]
        name = "_".join(re.sub(r"[^a-z0-9.-]+", "_", word.lower()) for word in words if word)
        result = ROOT / "bench/results" / f"{name}.json"
        result.parent.mkdir(exist_ok=True)
        chosen = ["--benchmark-only", "-k", what or "averaging or branches", f"--benchmark-json={result}"]
        subprocess.run([*pytest, HERE, *chosen], cwd=HERE, env=environment, check=True)
        print(f"wrote {result.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
