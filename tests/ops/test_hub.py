"""The layout of the kernels hub: assembled, read by the hub's library, loaded beside cnext, and its ops compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels._rust import Backend, Build

ROOT = Path(__file__).parents[2]
COMPARED = """
import sys
import torch
from pathlib import Path
from kernels import get_local_kernel
from cnext import ops

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert Path(sys.argv[1]) in Path(hub.__file__).parents and set(hub.__all__) == set(ops.__all__)
random = torch.Generator().manual_seed(0)
new = lambda *shape: torch.randn(*shape, generator=random)
lists = [[new(8, 129), new(5)] for _ in range(2)]
step = [[one.clone() for one in lists[0]] for _ in range(2)]
rows = hub.ema_step_(step[0], lists[1], beta=0.9, impl="triton")
assert hub.last_path("ema_step_") == "triton" and ops.last_path("ema_step_") is None
ops.ema_step_(step[1], lists[1], beta=0.9, impl="reference")
assert all(torch.equal(one, other) for one, other in zip(*step))
x, weight = new(6, 128), new(16, 128)
a, b = [new(4, 128), new(4, 128)], [new(16, 4), new(16, 4)]
found = hub.lora_branches(x, weight, None, a, b, scale=0.5, impl="triton")
torch.testing.assert_close(found, ops.lora_branches(x, weight, None, a, b, scale=0.5, impl="reference"))
try:
    hub.ema_step_(*lists, beta=0.9, impl="cpp")
except ValueError as error:
    assert "the package of the kernels hub has Triton and plain torch alone" in str(error)

from kernels.cli.benchmark import discover_benchmark_classes
classes = discover_benchmark_classes(Path(sys.argv[1], "benchmarks/benchmark.py"), Path(sys.argv[1]))
verified = []
for kind in classes:
    one = kind()
    one.kernel, one.device = hub, "cpu"
    torch.manual_seed(one.seed)
    one.setup()
    for name in (name.removeprefix("benchmark_") for name in dir(one) if name.startswith("benchmark_")):
        getattr(one, f"benchmark_{name}")()
        assert torch.allclose(one.out, getattr(one, f"verify_{name}")(), atol=1e-2), name
        verified.append(name)
print(*sorted(verified))
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "out"
    subprocess.run([sys.executable, ROOT / "kernels/hub/assemble.py", out], check=True, capture_output=True)
    return out


def test_the_hub_reads_the_configuration_and_the_files_are_where_it_wants_them(layout: Path) -> None:
    assert Build.open(layout).general.backends == [Backend.CPU, Backend.CUDA]
    source = layout / "torch-ext/cnext_kernels"
    for built in (layout / "build").iterdir():
        more = {"_ops.py", "metadata.json"}
        assert {one.name for one in built.iterdir()} == {one.name for one in source.iterdir()} | more
    texts = {path: path.read_text() for path in source.rglob("*.py")}
    assert not [path for path, text in texts.items() if "import cnext" in text or "from cnext" in text.split(">>>")[0]]
    assert not [path for path, text in texts.items() if "torch.ops.cnext" in text]


def test_it_is_loaded_beside_cnext_and_gives_the_reference(layout: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", COMPARED, layout]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ema_step", "fisher_accumulate", "lora_branches"]


def test_a_folder_that_exists_is_left_alone(layout: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "kernels/hub/assemble.py", layout], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"{layout} exists; give a folder that does not"
