"""``cnext doctor``: check whether a run can start on this machine, and how to fix what prevents it.

Packages are imported, kernels and a CLIP given by its path are loaded, data folders are listed. Nothing is downloaded;
of a backbone's weights only names and sizes of files are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from cnext import packages
from cnext.config.run_config import Options, with_backbone
from cnext.errors import UserError, unknown
from cnext.packages import ERROR, NOTE, OK, Check
from cnext.tasks.base import DataError, Suite
from cnext.tasks.kept_images import cache

DISK = {"tiny": 3e7, "small": 8e7}
"""Bytes that a run writes, by backbone, where it has been measured."""
CPU_BUILD = (
    "if you need no GPU, a CPU build of torch takes 5 GB less: in a new environment install torch and torchvision "
    "from the index of CPU builds, then cnext, which keeps both"
)
VIT_B_32_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
"""SHA-256 of ViT-B-32.pt as published by OpenAI."""


def main(run: Options, as_json: bool) -> int:
    """Prints the checks as text or as JSON. Returns 0 if the run can start, else 1."""
    from cnext.runs import environment

    checks = check_run(run)
    ready = not failed(checks)
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"ready": ready, "checks": rows, "versions": environment.versions()}, indent=2))
    else:
        print(report(checks))
    return 0 if ready else 1


def check_run(run: Options) -> list[Check]:
    """All checks for a run on this machine. Raises UserError for an unknown backbone or suite."""
    from cnext import backbones as known
    from cnext.tasks import suites

    suite = suites.load(run.suite)
    run = with_backbone(run, suite)
    if run.backbone not in known.modules():
        raise unknown("backbone", run.backbone, sorted(known.modules()))
    checks = packages.check_packages(packages.needed(run.backbone), run.backbone)
    broken = {check.name for check in failed(checks)}
    if {"torch", "numpy"} & broken:
        return [*checks, *data(suite, run.data)]
    writes_images = any("image" in task.writes for task in suite.tasks)
    checks += [*devices(), *kernels(), *backbones(run, writes_images), *tasks(run, suite), *data(suite, run.data)]
    if "pillow" not in broken:
        checks += scorers(suite, run.clip, checks)
    return checks + memory_and_disk(run)


def devices() -> list[Check]:
    """CPU cores and CUDA devices."""
    import torch

    from cnext.studies.resources import available_cores

    found = [Check("devices", "cpu", OK, f"{available_cores():g} cores, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 1e9:.0f} GB"
        found.append(Check("devices", f"cuda:{index}", OK, text))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch is built without CUDA" if built is None else f"torch is built for CUDA {built} and sees no device"
        fix = "" if built is None else CPU_BUILD
        found.append(Check("devices", "cuda", NOTE, f"{why}; runs use the CPU", fix))
    return found


def kernels() -> list[Check]:
    """The implementation of the ops on each type of device, and why a faster one is missing."""
    import torch

    from cnext.ops import dispatch

    found = []
    for device, impls in dispatch.BEST.items():
        if device == "cuda" and not torch.cuda.is_available():
            reasons = [f"{impl}: {dispatch.missing(impl, device) or 'ready for a device'}" for impl in impls]
            found.append(Check("kernels", device, NOTE, "; ".join(reasons)))
            continue
        lacking = [f"no {impl}: {why}" for impl in impls if (why := dispatch.missing(impl, device))]
        best = next((impl for impl in impls if not dispatch.missing(impl, device)), "")
        if best:
            part = "dropout and the products fused with it" if best == "triton" else "dropout"
            text = f"{best} for averaging and the branches' {part}; torch for the rest"
            found.append(Check("kernels", device, OK, "; ".join([text, *lacking])))
        else:
            found.append(Check("kernels", device, NOTE, "; ".join([f"plain torch, {dispatch.SLOWER}", *lacking])))
    return found


def backbones(run: Options, writes_images: bool = False) -> list[Check]:
    """Whether the weights of the run's backbone are found, and which other backbones need none.

    Args:
        writes_images: whether tasks of the run write images, for which a backbone may need further weights.
    """
    from cnext import backbones as known

    found = []
    for name in sorted(known.modules()):
        selected = name == run.backbone
        try:
            files = known.load(name).check(run.weights if selected else None)
            size = sum(file.stat().st_size for file in files)
            found.append(Check("backbones", name, OK, f"{size / 1e6:,.0f} MB of weights" if files else "ready"))
            if selected and writes_images and (missing := known.load(name).missing_to_draw(run.weights)):
                found.append(Check("backbones", f"{name} images", ERROR, missing))
        except (UserError, OSError) as error:
            found.append(Check("backbones", name, ERROR if selected else NOTE, str(error)))
    return found


def tasks(run: Options, suite: Suite) -> list[Check]:
    """Whether the run's backbone reads and writes what the suite's tasks do. Nothing where its weights are missing."""
    from cnext import backbones as known

    try:
        known.load(run.backbone).check(run.weights)
    except (UserError, OSError):
        return []
    try:
        known.check_tasks(run.backbone, run.weights, suite.tasks)
    except UserError as error:
        return [Check("backbones", f"{run.backbone} tasks", ERROR, str(error))]
    return []


def data(suite: Suite, folder: Path | None) -> list[Check]:
    """Whether the files and image folders of every task exist. Opens no file."""
    from cnext.tasks.rows import files

    if folder is None:
        if suite.synthetic:
            return [Check("data", suite.name, OK, "generated by the first run")]
        fix = f"--data FOLDER; `cnext list {suite.name}` shows the files"
        return [Check("data", suite.name, ERROR, "needs a folder with its files", fix)]
    found = []
    for task in suite.tasks:
        missing, count = [], 0
        for split in task.splits:
            try:
                count += len(files(folder, getattr(task, split)))
            except DataError as error:
                missing.append(str(error))
            root = folder / task.image_folder(split)
            if not root.is_dir():
                missing.append(f"no image folder {root}")
        text = "; ".join(dict.fromkeys(missing)) or f"{count} files; `cnext data check` reads them"
        found.append(Check("data", f"{suite.name} {task.name}", ERROR if missing else OK, text))
    return found


def scorers(suite: Suite, clip: str | None, found: Sequence[Check] = ()) -> list[Check]:
    """Whether the CLIP that scores the suite's images can be loaded; one that would be downloaded is not tried.

    found: the checks of packages.
    """
    name = clip or suite.clip
    if not any("image" in task.writes for task in suite.tasks):
        return [Check("scorers", "rules", OK, "no task of the suite writes images")]
    from cnext.scoring.clip import EMBEDDED, load_clip, needs_open_clip

    if name in EMBEDDED:
        return [Check("scorers", "CLIP", OK, f"{name}, installed with cnext")]
    if needs_open_clip(name):
        lacking = [check for check in found if check.name in ("torchvision", "open_clip_torch") and check.state != OK]
        if lacking:
            text = f"{name} needs {' and '.join(check.name for check in lacking)}"
            return [Check("scorers", "CLIP", ERROR, text, lacking[0].fix)]
    if not Path(name).exists() and clip is None:
        text = f"{name} is loaded from open_clip's cache, or downloaded by the first run"
        return [Check("scorers", "CLIP", NOTE, text, "--clip ViT-B-32.pt loads a file instead")]
    try:
        model = load_clip(name, "cpu").model
    except UserError as error:
        return [Check("scorers", "CLIP", ERROR, str(error))]
    text = f"{name}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
    if Path(name).name == "ViT-B-32.pt":
        same = hashlib.sha256(Path(name).read_bytes()).hexdigest() == VIT_B_32_SHA256
        text += f", {'' if same else 'not '}the file published by OpenAI"
    return [Check("scorers", "CLIP", OK, text)]


def memory_and_disk(run: Options) -> list[Check]:
    """Free memory, compared with the measured peak of a run or else the size of its weights, and free disk."""
    import torch

    from cnext.studies import resources

    needed, source = _needed_memory(run)
    free = {f"cuda:{index}": float(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count())}
    # With GPUs, weights pass through the machine's memory one file at a time.
    free = free or {"memory": resources.available_memory()}
    state = OK if sum(free.values()) > needed else ERROR
    suffix = f"; {source} {needed / 1e9:.1f} GB" if needed else ""
    checks = [Check("memory and disk", name, state, f"{size / 1e9:.1f} GB free{suffix}") for name, size in free.items()]
    written = DISK.get(run.backbone, 0.0)
    suffix = (
        f"; a run writes {written / 1e6:.0f} MB" if written else "; `cnext-run --dry-run` estimates what a run writes"
    )
    for name, path in (("runs", run.out), ("cache", cache())):
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
        space, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
        text = f"{space / 1e9:.1f} GB free for {path}{suffix if name == 'runs' else ''}"
        text += "" if writable else f"; {existing} is not writable"
        checks.append(Check("memory and disk", name, OK if writable and space > written else ERROR, text))
    return checks


def _needed_memory(run: Options) -> tuple[float, str]:
    """Bytes that a run needs at least, and where the figure comes from; 0 if it is not known."""
    from cnext import backbones as known
    from cnext.studies.resources import PEAK_MEMORY

    if run.backbone in PEAK_MEMORY:
        return PEAK_MEMORY[run.backbone], "measured peak of a run:"
    try:
        files = known.load(run.backbone).check(run.weights)
        return float(sum(file.stat().st_size for file in files)), "size of the weights:"
    except (UserError, OSError):
        return 0.0, ""


def failed(checks: list[Check]) -> list[Check]:
    """The checks that prevent a run."""
    return [check for check in checks if check.state == ERROR]


def report(checks: list[Check]) -> str:
    """The checks by section with the fix of each failed one, and a line that says whether a run can start."""
    marks = {OK: "  ", NOTE: "- ", ERROR: "! "}
    lines, section = [], ""
    width = max(len(check.name) for check in checks)
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section] if lines else [section]
        first, *more = check.text.splitlines() or [""]
        lines.append(f"  {marks[check.state]}{check.name:<{width}}  {first}")
        lines += [f"    {'':<{width}}  {line}" for line in more]
        lines += [f"    {'':<{width}}  -> {check.fix}"] if check.fix else []
    names = ", ".join(f"{check.section}: {check.name}" for check in failed(checks))
    return "\n".join([*lines, "", f"failed: {names}" if names else "ready: a run can start"])
