"""``cnext doctor``: whether a run can start here, what is in its way, and what to do about it.

Things are tried and not guessed: packages are imported, kernels and a CLIP given by path are loaded, folders are looked
into. Nothing is downloaded, and of a backbone's weights only the names and sizes of their files are read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cnext import packages
from cnext.errors import UserError, unknown
from cnext.packages import BAD, NOTE, OK, Finding
from cnext.tasks.base import DataError, Suite

NEEDED_BY = {"seed-x": ("diffusers", "sentencepiece")}
"""Packages of some runs that a backbone cannot do without."""
MEMORY, DISK = {"tiny": 1.1e9}, {"tiny": 3e7}
"""Bytes that a run takes at its peak, and leaves on the disk, where that has been measured."""
KEEP = (
    "where no GPU is wanted, a CPU build of torch takes 5 GB less: in a new environment install torch and torchvision "
    "from the index of CPU builds, and then cnext, which keeps both"
)
OPENAI = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
"""SHA-256 of ViT-B-32.pt as OpenAI publishes it."""


@dataclass(frozen=True)
class Wanted:
    """The run that is asked about; fields as in ``cnext.config.run_config.Options``."""

    backbone: str = "tiny"
    suite: str = "next-tiny"
    weights: Path | None = None
    data: Path | None = None
    clip: str | None = None
    out: Path = Path("runs")


def examine(wanted: Wanted) -> list[Finding]:
    """Everything that a run asks of this machine. Raises UserError for a backbone or a suite that is not known."""
    from cnext import backbones as known
    from cnext.tasks import suites

    if wanted.backbone not in known.modules():
        raise unknown("backbone", wanted.backbone, sorted(known.modules()))
    suite = suites.load(wanted.suite)
    found = packages.packages(NEEDED_BY.get(wanted.backbone, ()))
    bad = {finding.name for finding in found if finding.state == BAD}
    if {"torch", "numpy"} & bad:
        return [*found, *data(suite, wanted.data)]
    drawn = any("image" in task.writes for task in suite.tasks)
    found += [*devices(), *kernels(), *backbones(wanted, drawn), *data(suite, wanted.data)]
    if not {"torchvision", "open_clip_torch", "pillow"} & bad:
        found += scorers(suite, wanted.clip)
    return found + room(wanted)


def devices() -> list[Finding]:
    """The processor's cores and the CUDA devices."""
    import torch

    from cnext.studies import resources

    found = [Finding("devices", "cpu", OK, f"{resources.cores():g} cores, {torch.backends.cpu.get_cpu_capability()}")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 1e9:.0f} GB"
        found.append(Finding("devices", f"cuda:{index}", OK, text))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch is built without CUDA" if built is None else f"torch is built for CUDA {built} and sees no device"
        cure = "" if built is None else KEEP
        found.append(Finding("devices", "cuda", NOTE, f"{why}; runs are on the processor", cure))
    return found


def kernels() -> list[Finding]:
    """What computes the ops on each kind of device, and why it is nothing faster."""
    import torch

    from cnext.ops import dispatch

    found = []
    for device, impls in dispatch.BEST.items():
        if device == "cuda" and not torch.cuda.is_available():
            reasons = [f"{impl}: {dispatch.missing(impl, device) or 'ready for a device'}" for impl in impls]
            found.append(Finding("kernels", device, NOTE, "; ".join(reasons)))
            continue
        lacking = [f"no {impl}: {why}" for impl in impls if (why := dispatch.missing(impl, device))]
        best = next((impl for impl in impls if not dispatch.missing(impl, device)), "")
        if best:
            part = "dropout and the products fused with it" if best == "triton" else "dropout"
            text = f"{best} for averaging and the branches' {part}; torch for the rest"
            found.append(Finding("kernels", device, OK, "; ".join([text, *lacking])))
        else:
            found.append(Finding("kernels", device, NOTE, "; ".join([f"plain torch, {dispatch.SLOWER}", *lacking])))
    return found


def backbones(wanted: Wanted, drawn: bool = False) -> list[Finding]:
    """Whether a backbone's weights are there: of the one that is asked about, and of those that need none.

    drawn: whether the run draws, and the one asked about needs what turns features into pixels as well.
    """
    from cnext import backbones as known

    found = []
    for name in sorted(known.modules()):
        asked = name == wanted.backbone
        try:
            files = known.load(name).check(wanted.weights if asked else None)
            size = sum(file.stat().st_size for file in files)
            found.append(Finding("backbones", name, OK, f"{size / 1e6:,.0f} MB of weights" if files else "ready"))
            if asked and drawn and (missing := known.load(name).missing_to_draw(wanted.weights)):
                found.append(Finding("backbones", f"{name} drawing", BAD, missing))
        except (UserError, OSError) as error:
            found.append(Finding("backbones", name, BAD if asked else NOTE, str(error)))
    return found


def data(suite: Suite, folder: Path | None) -> list[Finding]:
    """Whether every task's files and image folders are where they are looked for. No file is opened."""
    from cnext.tasks.rows import files

    if folder is None:
        if suite.synthetic:
            return [Finding("data", suite.name, OK, "drawn when it is first needed")]
        cure = f"--data FOLDER; `cnext list {suite.name}` shows what belongs there"
        return [Finding("data", suite.name, BAD, "needs a folder with its files", cure)]
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
        found.append(Finding("data", f"{suite.name} {task.name}", BAD if missing else OK, text))
    return found


def scorers(suite: Suite, clip: str | None) -> list[Finding]:
    """Whether the CLIP that scores the suite's pictures loads; one that would be downloaded is not asked for."""
    name = clip or suite.clip
    if not any("image" in task.writes for task in suite.tasks):
        return [Finding("scorers", "rules", OK, "no task of the suite draws")]
    if name == "tiny":
        return [Finding("scorers", "CLIP", OK, "tiny, which is installed with cnext")]
    if not Path(name).exists() and clip is None:
        text = f"{name} comes from open_clip's cache, or from the network when the first run starts"
        return [Finding("scorers", "CLIP", NOTE, text, "--clip ViT-B-32.pt takes a file instead")]
    from cnext.scoring.clip import load_clip

    try:
        model = load_clip(name, "cpu").model
    except UserError as error:
        return [Finding("scorers", "CLIP", BAD, str(error))]
    text = f"{name}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"
    if Path(name).name == "ViT-B-32.pt":
        same = hashlib.sha256(Path(name).read_bytes()).hexdigest() == OPENAI
        text += ", the file that OpenAI publishes" if same else ", which is not the file that OpenAI publishes"
    return [Finding("scorers", "CLIP", OK, text)]


def room(wanted: Wanted) -> list[Finding]:
    """Memory and disk, against what a run takes: measured, or at least what the weights take."""
    import torch

    from cnext.config.run_config import cache
    from cnext.studies import resources

    least, why = _memory(wanted)
    needed = f"; {why} {least / 1e9:.1f} GB" if least else ""
    places = {f"cuda:{index}": float(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count())}
    # With devices the weights only pass through the processor's memory, a file at a time.
    places = places or {"memory": resources.memory()}
    enough = sum(places.values()) > least
    found = [
        Finding("room", place, OK if enough else BAD, f"{free / 1e9:.1f} GB free{needed}")
        for place, free in places.items()
    ]
    for label, path in (("runs", wanted.out), ("cache", cache())):
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        text = f"{free / 1e9:.1f} GB free for {path}"
        if label == "runs":
            leaves = DISK.get(wanted.backbone)
            text += (
                f"; a run leaves {leaves / 1e6:.0f} MB" if leaves else "; `cnext-run --dry-run` says what a run leaves"
            )
        if not os.access(there, os.W_OK):
            text += f"; {there} cannot be written to"
        fits = os.access(there, os.W_OK) and free > DISK.get(wanted.backbone, 0.0)
        found.append(Finding("room", label, OK if fits else BAD, text))
    return found


def _memory(wanted: Wanted) -> tuple[float, str]:
    """Bytes that a run takes at least, and where that is known from; 0 where it is not."""
    from cnext import backbones as known

    if wanted.backbone in MEMORY:
        return MEMORY[wanted.backbone], "a run has taken"
    try:
        files = known.load(wanted.backbone).check(wanted.weights)
        return float(sum(file.stat().st_size for file in files)), "the weights alone take"
    except (UserError, OSError):
        return 0.0, ""


def problems(findings: list[Finding]) -> list[Finding]:
    """Those that are in the way of a run."""
    return [finding for finding in findings if finding.state == BAD]


def report(findings: list[Finding]) -> str:
    """The findings section by section, each problem with its cure, and the verdict."""
    marks = {OK: "  ", NOTE: "- ", BAD: "! "}
    lines, section = [], ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        first, *more = finding.text.splitlines() or [""]
        lines.append(f"  {marks[finding.state]}{finding.name:<{width}}  {first}")
        lines += [f"    {'':<{width}}  {line}" for line in more]
        lines += [f"    {'':<{width}}  -> {finding.cure}"] if finding.cure else []
    named = [f"{finding.section}: {finding.name}" for finding in problems(findings)]
    verdict = f"in the way of a run: {', '.join(named)}" if named else "ready: nothing is in the way of a run"
    return "\n".join([*lines, "", verdict])
