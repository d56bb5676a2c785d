"""The processes of a run compare what they were started with before they form a group, in the store of the launcher.

A group would wait for a process that was refused, and one with another configuration would hang it or train otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
from torch import distributed

from cnext.errors import UserError, parse_json

HANDSHAKE = 20.0
"""Seconds in which the first process, or its store, answers one that has reached it."""
GRACE = 30.0
"""Seconds that the others have to come, and then to leave, when it is known that the run cannot start."""
POLL = 0.05
SETTINGS = "its settings"
LAUNCHERS = ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE")
NUMBERS = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS")
"""Variables of launchers and libraries that decide how, or to which bits, a run computes."""
ADVICE = "give all processes another MASTER_PORT (torchrun --master-port N, accelerate launch --main_process_port N)"
_TURNS = itertools.count()


def environment() -> dict[str, Any]:
    """What a process computes with: versions, and variables that decide numbers."""
    chosen = {name for name in os.environ if name.startswith("CNEXT_")} - {"CNEXT_CACHE"}
    return {
        "cnext": metadata.version("cnext"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in sorted({*chosen, *LAUNCHERS, *NUMBERS} & {*os.environ})},
    }


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """A line for each value in which what rank 0 and another process were started with differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = dict.fromkeys([*one, *other])
        return [line for n in names for line in differences(one.get(n), other.get(n), f"{path}.{n}" if path else n)]
    return [] if one == other else [f"{path}: {json.dumps(one)} on rank 0, {json.dumps(other)} there"]


def verdict(settings: Mapping[int, Any], what: str = SETTINGS) -> str:
    """Which ranks differ from rank 0, and in what; "" where none does. settings: by rank."""
    found = {rank: lines for rank in sorted(settings) if (lines := differences(settings[0], settings[rank]))}
    if not found:
        return ""
    ranks = " and ".join(f"rank {rank}" for rank in found)
    lines = [f"  rank {rank}: {line}" for rank, own in found.items() for line in own]
    return "\n".join(
        [f"{ranks}: not the same as rank 0 in {what}; start all by one command, on the same data:", *lines]
    )


def attend(
    store: distributed.Store,
    rank: int,
    size: int,
    settings: Mapping[str, Any],
    problem: str = "",
    turn: int | None = None,
) -> None:
    """Waits for all processes, and compares what they were started with.

    Args:
        settings: of this process, as JSON takes them.
        problem: why this process cannot start, or "".
        turn: counts the calls of a process.

    Raises:
        UserError: on every rank, where one cannot start, or differs from rank 0; or another run answers at the port.
    """
    turn = next(_TURNS) if turn is None else turn
    own = {"nonce": uuid.uuid4().hex, "size": size, "settings": settings, "problem": problem}
    try:
        store.set(f"{turn}/start/{rank}", json.dumps(own))
        said = _collected(store, turn, size, own) if rank == 0 else _awaited(store, turn, rank, own)
    except distributed.DistError as error:
        raise UserError(f"rank 0 of {size} was lost before the run began; start all processes again") from error
    if said:
        raise UserError(said)


def _collected(store: distributed.Store, turn: int, size: int, own: dict[str, Any]) -> str:
    """What rank 0 finds, and tells the others."""
    posts, ends = {0: own}, float("inf")
    while len(posts) < size and time.monotonic() < ends:
        for rank in set(range(size)) - {*posts}:
            if store.check([f"{turn}/start/{rank}"]):
                posts[rank] = parse_json(store.get(f"{turn}/start/{rank}"))
                store.set(f"{turn}/seen/{posts[rank]['nonce']}", "")
        if ends == float("inf") and _said(posts):
            ends = time.monotonic() + GRACE
        time.sleep(POLL)
    said = _said(posts)
    store.set(f"{turn}/verdict", said)
    ends = time.monotonic() + GRACE
    while said and time.monotonic() < ends and not all(store.check([f"{turn}/left/{r}"]) for r in posts if r):
        time.sleep(POLL)  # as the store ends with this process
    return said


def _said(posts: Mapping[int, dict[str, Any]]) -> str:
    problems = [
        f"rank {rank} cannot start: {post['problem']}" for rank, post in sorted(posts.items()) if post["problem"]
    ]
    sizes = {rank: {"WORLD_SIZE": post["size"]} for rank, post in posts.items()}
    return "\n".join(problems) or verdict(sizes) or verdict({rank: post["settings"] for rank, post in posts.items()})


def _awaited(store: distributed.Store, turn: int, rank: int, own: dict[str, Any]) -> str:
    """What rank 0 tells this one."""
    ends = float("inf")
    while not store.check([f"{turn}/seen/{own['nonce']}"]):
        if ends == float("inf") and store.check([f"{turn}/start/0"]):
            ends = time.monotonic() + HANDSHAKE
            if (first := parse_json(store.get(f"{turn}/start/0")))["size"] != own["size"]:
                return verdict({0: {"WORLD_SIZE": first["size"]}, rank: {"WORLD_SIZE": own["size"]}})
        if time.monotonic() > ends:
            return f"another run answers at {place()}; {ADVICE}"
        time.sleep(POLL)
    while not store.check([f"{turn}/verdict"]):
        time.sleep(POLL)
    said = store.get(f"{turn}/verdict").decode()
    store.set(f"{turn}/left/{rank}", "")
    return said


def place() -> str:
    """Where the processes meet."""
    return f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"


def open_store(rank: int, size: int, timeout: timedelta) -> distributed.Store:
    """The store of a launcher's processes, which rank 0 makes unless the launcher's agent has.

    Raises:
        UserError: the port is in use, or nothing that answers is there.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, given = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (given.isdecimal() and 0 < int(given) < 2**16):
        raise UserError(f"MASTER_PORT, which a launcher sets, must be the number of a port, got {given!r}")
    makes = rank == 0 and not agent
    if not makes:
        _reach(host, int(given), timeout.total_seconds())
    made: list[Any] = []

    def make() -> None:
        options = {"is_master": makes, "timeout": timeout, "wait_for_workers": False, "multi_tenant": True}
        try:
            made.append(distributed.TCPStore(host, int(given), size, **options))
        except (RuntimeError, ValueError) as error:
            made.append(error)

    # In a thread, as it would wait without end for what listens there and is no store.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(HANDSHAKE)
    if not made or isinstance(made[0], Exception):
        raise UserError(f"the processes cannot meet at {place()}, which another program uses; {ADVICE}")
    return distributed.PrefixStore(f"cnext/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", made[0])


def _reach(host: str, port: int, seconds: float) -> None:
    """Waits until something listens there, as the first process may start later."""
    ends = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=HANDSHAKE).close()
            return
        except OSError as error:
            if time.monotonic() > ends or isinstance(error, socket.gaierror):
                raise UserError(f"no process listens at {place()}: {error}; start rank 0 there") from error
        time.sleep(4 * POLL)
