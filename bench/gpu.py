"""On a machine with a GPU: ``python bench/gpu.py`` tests the kernels there, benchmarks them, and keeps the results.

The results are pytest-benchmark's own JSON, bench/results/<gpu>_<date>.json, with machine and versions.
"""

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; the CPU benchmarks are: pytest bench/ --benchmark-only")
    gpu = torch.cuda.get_device_name().lower().replace(" ", "_").replace("/", "_")
    result = ROOT / "bench/results" / f"{gpu}_{date.today().isoformat()}.json"
    result.parent.mkdir(exist_ok=True)
    environment = os.environ | {"CNEXT_TEST_DEVICE": "cuda"}
    pytest = [sys.executable, "-m", "pytest", "-q"]
    subprocess.run([*pytest, ROOT / "tests/ops"], cwd=HERE, env=environment, check=True)
    benchmarks = [HERE, "--benchmark-only", "-k", "averaging or branches", f"--benchmark-json={result}"]
    subprocess.run([*pytest, *benchmarks], cwd=HERE, env=environment, check=True)
    print(f"wrote {result.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
