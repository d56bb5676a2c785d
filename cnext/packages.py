"""Whether the packages that cnext imports are there, new enough, and work: each is imported, in another process."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cnext.errors import UserError

OK, NOTE, BAD = "ok", "note", "problem"
EVERY_RUN = {
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers:LlamaForCausalLM",
    "open_clip_torch": "open_clip",
    "safetensors": "safetensors.torch",
    "numpy": "numpy",
    "pillow": "PIL.Image",
    "matplotlib": "matplotlib.pyplot",
    "rich": "rich.progress",
    "tyro": "tyro",
}
"""What every run imports: distribution to module, or module:name where the module alone would not load what counts.

torchvision stands before those that import it, so that what is broken in it is found in it."""
MODELS = ("torchvision", "transformers")
"""Those of ``EVERY_RUN`` that a backbone is made of."""
SOME_RUNS = {
    "triton": ("triton", "for kernels on CUDA devices, where the compiled ones are missing"),
    "accelerate": ("accelerate", "for several processes, and models spread over devices"),
    "peft": ("peft:PeftModel", "for adapters in PEFT's format"),
    "diffusers": ("diffusers:UNet2DConditionModel", "for pictures drawn by SEED-X"),
    "sentencepiece": ("sentencepiece", "for SEED-X's tokenizer"),
    "openai": ("openai", "for cnext judge --judge openai:URL"),
    "ray": ("ray", "for cnext-run --launcher ray"),
    "submitit": ("submitit", "for cnext-run --launcher slurm"),
}
EXTRAS = {"openai": "judge", "ray": "ray", "submitit": "slurm"}
"""Optional packages, and the extra of cnext that installs each."""
_ON_TORCHVISION = ("transformers", "open_clip_torch", "accelerate", "peft", "diffusers")
IMPORTED_BY = {"torch": ("torchvision", "safetensors", *_ON_TORCHVISION), "torchvision": _ON_TORCHVISION}
"""What a broken package takes down with it."""
PATIENCE = 300.0
"""Seconds that importing all packages may take."""
_IMPORT = """
import importlib, sys
for place in sys.argv[1:]:
    module, _, name = place.partition(":")
    found = importlib.import_module(module)
    name and getattr(found, name)
    print("imported", place, flush=True)
"""
_BOUND = re.compile(r"([\w.-]+)>=([\w.]+)")


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: OK, NOTE (worth knowing, in no one's way) or BAD.  cure: what to do."""

    section: str
    name: str
    state: str
    text: str
    cure: str = ""


def version(package: str) -> str | None:
    """A distribution's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(needed: Iterable[str] = ()) -> list[Finding]:
    """Every package: installed, as new as cnext asks for, and importable.

    Args: needed: those of ``SOME_RUNS`` that the run at hand cannot do without.
    """
    places = EVERY_RUN | {name: place for name, (place, _) in SOME_RUNS.items()}
    there = [name for name in places if version(name) is not None]
    reasons = dict(zip(there, broken([places[name] for name in there]), strict=True))
    oldest = bounds()
    found = []
    for name in places:
        has, reason, least = version(name), reasons.get(name, ""), oldest.get(name.lower(), "")
        purpose = f", {SOME_RUNS[name][1]}" if name in SOME_RUNS else ""
        wrong = BAD if name in EVERY_RUN or name in needed else NOTE
        if has is None:
            cure = f"pip install '{f'cnext[{EXTRAS[name]}]' if name in EXTRAS else name}'"
            found.append(Finding("packages", name, wrong, f"not installed{purpose}", cure))
        elif reason:
            found.append(Finding("packages", name, wrong, f"{has}, broken: {reason}", cure_of(name, reasons)))
        elif least and numbers(has) < numbers(least):
            cure = f"pip install --upgrade '{name}>={least}'"
            found.append(Finding("packages", name, wrong, f"{has}, older than {least}", cure))
        else:
            found.append(Finding("packages", name, OK, f"{has}{purpose}"))
    return found


def broken(places: Sequence[str]) -> list[str]:
    """Why each module cannot be imported, "" where it can. A process of its own dies of it, and nothing else."""
    reasons: list[str] = []
    while len(reasons) < len(places):
        command = [sys.executable, "-W", "ignore", "-c", _IMPORT, *places[len(reasons) :]]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
            out, why = done.stdout, _last(done.stderr, done.returncode)
        except subprocess.TimeoutExpired as error:
            out, why = (error.stdout or b"").decode(errors="replace"), f"importing takes more than {PATIENCE:.0f} s"
        reasons += [""] * out.count("imported ")
        if len(reasons) < len(places):
            reasons.append(why)
    return reasons


def require(*names: str) -> None:
    """Imports packages of ``EVERY_RUN``, here and now, that a run is about to import anyway.

    Raises:
        UserError: one cannot be imported: which, why, and what to do about it.
    """
    for name in names:
        module, _, attribute = EVERY_RUN[name].partition(":")
        try:
            found = importlib.import_module(module)
            if attribute:
                getattr(found, attribute)
        except (ImportError, RuntimeError, OSError, AttributeError, ValueError) as error:
            # What such an error says first is what counts; the rest is often the state of a whole library.
            said = str(error).strip().partition("\n")[0]
            has, cure = version(name) or "(not installed)", cure_of(name, {name: said})
            raise UserError(
                f"{name} {has} cannot be imported: {said}\n{cure}\n`cnext doctor` tries every package"
            ) from error


def _last(said: str, status: int) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"its import ends Python by signal {-status}" if status < 0 or not lines else lines[-1]


def cure_of(name: str, reasons: dict[str, str]) -> str:
    """What to do about a package that cannot be imported, when these are the ones that cannot."""
    for first, others in IMPORTED_BY.items():
        if reasons.get(first) and name in others:
            return f"mend {first} first, which it imports"
    if name == "torchvision":
        # Each is made for one build of torch, and breaks whatever imports it beside another.
        torch = version("torch") or ""
        index = " --index-url INDEX, with the index that torch came from" if "+" in torch else ""
        return f"install the one for this torch: pip install --force-reinstall torchvision torch=={torch}{index}"
    return f"pip install --force-reinstall {name}"


def bounds() -> dict[str, str]:
    """The oldest versions that cnext asks for, by distribution in lower case."""
    listed = importlib.metadata.requires("cnext") or []
    found = (_BOUND.match(requirement.replace(" ", "")) for requirement in listed)
    return {bound[1].lower(): bound[2] for bound in found if bound}


def numbers(text: str) -> list[int]:
    """The numbers that a version begins with, as [2, 6, 0] of "2.6.0+cu124"."""
    return [int(part) for part in re.split(r"[^\d.]", text)[0].split(".") if part]
