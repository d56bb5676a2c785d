"""Environment fingerprint: results with different ones may differ in the last digits, or in more.

Standard library only, except `present`.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cnext.errors import UserError, parse_json
from cnext.runs import environment, seals

T = TypeVar("T")
PACKAGES = ("python", "cnext", "torch", "transformers", "open_clip_torch", "numpy", "pillow")
NOTES = {"error_rules": " (error types may differ, scores do not; null: version 1)"}
"""What is said of a field that differs, by its name."""
DATA = "data"
"""The joint digest of the data, which `data_alike` compares task by task."""
UNKNOWN = "unknown"
"""The fingerprint of older results, which have none."""


def processor() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def present(device: str, threads: int) -> dict[str, Any]:
    """The fingerprint of a run on a device ("cpu", "cuda", "cuda:1") here, by field: strings and numbers."""
    import torch

    from cnext.distributed import collectives
    from cnext.ops import dispatch
    from cnext.scoring.errors import RULES_VERSION

    versions = environment.versions()
    kind = torch.device(device).type
    return {
        **{name: versions[name] for name in PACKAGES},
        # Including the build, which the package version lacks.
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "processes": collectives.world_size(),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "cuda": torch.version.cuda if kind == "cuda" else None,
        "ops": dispatch.best(kind),
        "error_rules": RULES_VERSION,
    }


def joined(parts: Iterable[Mapping[str, Any]], data: str | None = None) -> dict[str, Any] | None:
    """The fingerprint of a run with parts in several environments: fields that differ have a list of values.

    None for no parts.  data: the joint digest of the data, the same for all parts.
    """
    parts = list(parts)
    fields = dict.fromkeys(name for part in parts for name in part)
    found = {}
    for name in fields:
        values = [part.get(name) for part in parts]
        once = [value for place, value in enumerate(values) if value not in values[:place]]
        found[name] = once[0] if len(once) == 1 else once
    found |= {} if data is None else {DATA: data}
    return {**found, "sha256": digest(found)} if parts else None


def digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint's fields."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def of_processes(file: Path) -> list[dict[str, Any]]:
    """The fingerprints of the processes that worked on a run so far, from its environment.json; none without the file.

    Raises: UserError where it is no such file, or was changed.
    """
    if not file.is_file():
        return []
    try:
        found = seals.opened(parse_json(file.read_bytes()), file)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{file} is not JSON ({error})") from error
    listed = found.get("fingerprints") if isinstance(found, dict) else None
    return [part for part in listed if isinstance(part, dict)] if isinstance(listed, list) else []


def differences(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    """One line per field of the environment in which two fingerprints differ."""
    if one is None or other is None:
        names = [UNKNOWN if each is None else "known" for each in (one, other)]
        return [] if one is other else [f"fingerprint: {' and '.join(names)}"]
    fields = [name for name in dict.fromkeys([*one, *other]) if name not in ("sha256", DATA)]
    return [
        f"{name}: {json.dumps(one.get(name))} and {json.dumps(other.get(name))}{NOTES.get(name, '')}"
        for name in fields
        if one.get(name) != other.get(name)
    ]


def check_alike(fingerprints: Mapping[str, Mapping[str, Any] | None], mix: bool = False) -> list[str]:
    """Notes on the environments of results to be averaged; [] where they are equal.

    Args: fingerprints: by the runs' names.  mix: average different ones, and note it.
    Raises: UserError naming the fields that differ, without ``mix``.
    """
    what = "in different environments, so that their scores may differ"
    fields = unlike(fingerprints, differences, what, "" if mix else "--mix-environments")
    if not fields:
        return []
    environments = [{**(found or {}), DATA: None, "sha256": None} for found in fingerprints.values()]
    count = len(set(map(digest, environments)))
    return [f"Averaged over runs of {count} different environments. {'; '.join(fields)}."]


def unlike(runs: Mapping[str, T], differ: Callable[[T, T], list[str]], what: str, flag: str) -> list[str]:
    """The lines in which runs differ from the first, each once.

    Args:
        runs: what is compared, by the runs' names.
        differ: the lines for two of them.
        what: how they were run, for the message.
        flag: the flag that averages them nevertheless; "" where it is given.

    Raises:
        UserError: two differ, and the flag is not given.
    """
    (first, expected), *others = runs.items()
    differing = {name: lines for name, found in others if (lines := differ(expected, found))}
    for name, lines in differing.items() if flag else ():
        listed = "\n".join(f"  {line}" for line in lines)
        raise UserError(
            f"{first} and {name} were run {what}:\n{listed}\n"
            f"{flag} averages them nevertheless, with a note in the tables"
        )
    return list(dict.fromkeys(line for lines in differing.values() for line in lines))


def older(fingerprints: Sequence[Mapping[str, Any] | None]) -> str:
    """A note on results without a fingerprint; "" if all have one."""
    count = sum(found is None for found in fingerprints)
    listed = f"{count} of {len(fingerprints)} runs have no environment fingerprint (results of an earlier version)"
    return f"{listed}; they count as one environment, {UNKNOWN!r}" if count else ""
