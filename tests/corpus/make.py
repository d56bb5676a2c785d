"""Writes the corpus of this release: run folders and exports as it writes them, which later versions have to read.

    python tests/corpus/make.py FOLDER

makes tests/corpus/<version>.tar.xz by way of FOLDER, whose path is in some of the files. Run it once for each release:
an archive that is there is never made again. cnext must be installed, as environment.json names a source tree.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import cnext
from cnext import RunConfig, cli
from cnext.monitoring.progress import Progress
from cnext.monitoring.signals import Stopped
from cnext.tasks import suites, synthetic

HERE = Path(__file__).parent
ORDER, STEPS = ("VQAv2", "HQEdit"), 3
LEFT_OUT = ("report_files", "report.html", "report.md", ".lock")


class StopsInTheSecondTask(Progress):
    """Asks the run to stop, as `kill` does, after a step of its second task."""

    def step(self, stage: int, task: str, step: int, steps: int, loss: float) -> None:
        super().step(stage, task, step, steps, loss)
        if (stage, step) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path) -> Path:
    archive = HERE / f"{cnext.__version__}.tar.xz"
    if archive.exists():
        raise SystemExit(f"{archive} is there: the corpus of a release is not made again")
    folder.mkdir(parents=True)
    shutil.copytree(suites.FOLDER / "next-tiny", folder / "suite")
    manifest = json.loads((folder / "suite" / "suite.json").read_text())
    recipe = manifest["budgets"]["default"] | {"train_samples": 8, "test_samples": 2, "warmup_steps": 1}
    manifest["budgets"] = {"default": recipe | {"steps": dict.fromkeys(manifest["tasks"], STEPS)}}
    (folder / "suite" / "suite.json").write_text(json.dumps(manifest))
    synthetic.write_next_tiny(folder / "data", 8, 2)
    given = {"suite": str(folder / "suite"), "data": folder / "data", "order": ",".join(ORDER), "device": "cpu"}
    given |= {"checkpoint_interval": 1, "threads": 1}
    finished = RunConfig(method="mage", hyperparameters={"rank": 1}, out=folder / "finished", **given)
    cnext.run(finished)
    stopped = RunConfig(method="lora", hyperparameters={"rank": 1}, out=folder / "stopped", **given)
    with suppress(Stopped):
        cnext.run(stopped, StopsInTheSecondTask())
    run = str(finished.folder)
    for kind in ("peft", "authors"):
        assert cli.main(["export", run, "--to", str(folder / f"export-{kind}"), "--format", kind]) == 0
    assert cli.main(["judge", run, "--judge", "rules"]) == 0
    for made in (finished, stopped):
        for name in LEFT_OUT:
            path = made.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        made.folder.rename(folder / f"{made.method}-run")
        shutil.rmtree(made.out)
    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name, filter=_nobody)
    return archive


def _nobody(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


if __name__ == "__main__":
    print(main(Path(sys.argv[1]).absolute()))
