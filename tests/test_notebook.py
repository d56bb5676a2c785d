"""docs/notebooks/own_data.ipynb in a kernel: what it shows, its progress, an interruption, and the same cell again."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "own_data.ipynb"


class Watched(NotebookClient):
    """Keeps what is displayed in place of something else, and interrupts the kernel the first time it is a step."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.updates: list[str] = []
        self.interrupted: asyncio.Future[None] | None = None

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            self.updates.append(msg["content"]["data"]["text/plain"])
            if not self.interrupted and re.search(r"step \d", self.updates[-1]):
                self.interrupted = asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    for name in ("CNEXT_CACHE", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Sockets in a folder, not ports, which another program may take.
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    there = {"metadata": {"path": str(tmp_path)}}
    return Watched(nbformat.read(NOTEBOOK, 4), km=manager, timeout=600, allow_errors=True, resources=there)


def text(outputs: list[Any]) -> str:
    """What a cell has printed."""
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_notebook_of_own_data(client: Watched, tmp_path: Path) -> None:
    code = [(index, cell) for index, cell in enumerate(client.nb.cells) if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for _, cell in code), "clear the outputs before you commit"
    shown: list[list[Any]] = []
    with client.setup_kernel(cleanup_kc=True):
        for index, cell in code:
            client.execute_cell(cell, index)
            if cell.outputs and cell.outputs[-1].output_type == "error":
                error = cell.outputs[-1]
                assert error.ename == "Stopped", error.evalue
                [line] = error.traceback
                assert re.search(r"stopped by SIGINT: saved after step \d+ of 60 of Colors; run the same", line)
                client.execute_cell(cell, index)
            shown.append(cell.outputs)
    assert client.interrupted
    *_, trained, one, table, compared, matrix = shown

    assert any(re.match(r"lora/Colors-Shapes/seed-0 +\d+%  stage 1 Colors: step", line) for line in client.updates)
    assert any("answering Shapes" in line and " left" in line for line in client.updates)
    assert any(re.search(r"^all runs +\d+%  1 of 2 done", line, re.MULTILINE) for line in client.updates)
    assert len([output for output in trained if output.output_type == "display_data"]) == 2, "one bar a run, in place"
    assert "resuming from" in text(trained)
    assert re.findall(r"^after (\d \S+):", text(trained), re.MULTILINE)[-3:] == ["0 zero-shot", "1 Colors", "2 Shapes"]
    assert not [o for o in trained if o.output_type == "stream" and o.name == "stderr" and "after" in o.text]

    html = trained[-1].data["text/html"]
    assert re.findall(r">(lora|mage)</td>", html) == ["lora", "mage"]
    assert "Avg.ACC" in html
    assert re.findall(r">(\d [\w-]+)</td>", one[-1].data["text/html"]) == ["0 zero-shot", "1 Colors", "2 Shapes"]
    assert "lora on shapes, order Colors,Shapes, seed 0: Avg.ACC" in one[-1].data["text/plain"]
    assert table[-1].data["text/plain"].split()[:2] == ["task", "Colors"]
    for plotted in (compared, matrix):
        assert len(plotted[-1].data["image/png"]) > 5000
    assert (tmp_path / "own_data" / "mage.pdf").stat().st_size > 5000


def test_its_links_lead_somewhere() -> None:
    linked = re.findall(r"\]\((?!https?:)([\w./-]+)", NOTEBOOK.read_text(encoding="utf-8"))
    assert linked
    assert all((NOTEBOOK.parent / path).is_file() for path in linked)
