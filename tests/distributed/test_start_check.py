"""Processes that were started differently, that cannot start, or whose port is taken end with a line, all of them."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from distributed.launched import finish, start
from torch import distributed

from cnext import RunConfig
from cnext.config.plan import plan
from cnext.distributed import start_check
from cnext.errors import UserError
from cnext.ops import dispatch

CHILD = Path(__file__).with_name("meeting_child.py")
SETTINGS = {"seed": 0, "order": "a,b", "recipe": {"learning_rate": 0.1}, "environment": {}}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_check, "HANDSHAKE", 0.5)
    monkeypatch.setattr(start_check, "GRACE", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "29500")


def attended(*members: Callable[[distributed.Store], Any]) -> list[str]:
    """What each member says, in a thread of its own."""
    store, said = distributed.HashStore(), [""] * len(members)

    def take_part(rank: int, member: Callable[[distributed.Store], Any]) -> None:
        try:
            member(store)
        except UserError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=take_part, args=given) for given in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return said


def member(rank: int, size: int = 3, problem: str = "", **changes: Any) -> Callable[[distributed.Store], None]:
    return lambda store: start_check.attend(store, rank, size, SETTINGS | changes, problem, turn=0)


def test_processes_that_were_started_alike_go_on() -> None:
    assert attended(member(0), member(1), member(2)) == ["", "", ""]


CHANGES = [
    ({"seed": 7}, "seed: 0 on rank 0, 7 there"),
    ({"order": "b,a"}, 'order: "a,b" on rank 0, "b,a" there'),
    ({"recipe": {"learning_rate": 0.2}}, "recipe.learning_rate: 0.1 on rank 0, 0.2 there"),
    ({"environment": {"CNEXT_OPS": "reference"}}, 'environment.CNEXT_OPS: null on rank 0, "reference" there'),
    ({"size": 4}, "WORLD_SIZE: 3 on rank 0, 4 there"),
]


@pytest.mark.parametrize(("change", "line"), CHANGES)
def test_the_rank_and_the_field_that_differ_are_named_on_all(change: dict[str, Any], line: str) -> None:
    said = attended(member(0), member(1, **change), member(2))
    assert len(set(said)) == 1
    assert said[0].splitlines() == [
        "rank 1: not the same as rank 0 in its settings; start all by one command, on the same data:",
        f"  rank 1: {line}",
    ]


def test_a_rank_that_cannot_start_ends_all() -> None:
    for broken in (0, 1):
        members = [member(rank, problem="no such order" if rank == broken else "") for rank in range(3)]
        assert attended(*members) == [f"rank {broken} cannot start: no such order"] * 3


def test_a_rank_of_a_larger_world_is_told_so() -> None:
    """Which the first process does not wait for."""
    found = attended(member(0, size=1), lambda store: None, member(2, size=3))
    assert found[0] == ""
    assert "  rank 2: WORLD_SIZE: 1 on rank 0, 3 there" in found[2]


def test_a_store_of_another_run_is_not_taken_for_its_own() -> None:
    """Of one that has begun: its first process answers no more."""
    store = distributed.HashStore()
    store.set("0/start/0", json.dumps({"size": 3, "settings": SETTINGS, "problem": "", "nonce": "a"}))
    store.set("0/verdict", "")
    with pytest.raises(UserError, match="another run answers at MASTER_ADDR host, MASTER_PORT 29500; give all"):
        member(1)(store)


def test_what_is_compared_is_the_configuration_and_what_computes(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setenv("CNEXT_ANY", "1")
    monkeypatch.setenv("CNEXT_CACHE", "elsewhere")
    here = start_check.environment()
    assert {"cnext", "torch"} <= here.keys()
    assert here["environment"]["CNEXT_ANY"] == "1"
    assert "CNEXT_CACHE" not in here["environment"]
    base = {"method": "mage", "data": data, "device": "cpu"}
    settings = plan(RunConfig(**base)).settings()
    assert settings["ops"] == dispatch.best("cpu")
    for change in (
        {"method": "lora"}, {"order": "reverse"}, {"seed": 1}, {"checkpoint_interval": 3}, {"learning_rate": 0.01},
        {"prompts": "consistent"}, {"threads": 2}, {"split": "validation"}, {"hyperparameters": {"c": 3.0}},
    ):  # fmt: skip
        assert plan(RunConfig(**{**base, **change})).settings() != settings, change


def ports(count: int) -> list[str]:
    with ExitStack() as held:
        free = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in free:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in free]


def test_two_processes_end_together_and_meet_again(tmp_path: Path) -> None:
    finish(start([str(CHILD), *ports(3), str(tmp_path)]))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one[0] == other[0]
    assert one[0].endswith("  rank 1: seed: 0 on rank 0, 1 there")
    assert (one[1], other[1]) == ("rank 1 cannot start: --order is unknown", "--order is unknown")
    assert one[2] == other[2]
    assert one[2].endswith("  rank 1: seed: 0 on rank 0, 1 there")
    assert one[3] == other[3]
    assert "rank 1: not the same as rank 0 in the data that it reads; " in one[3]
    assert "  rank 1: data.A.test: 0 on rank 0, 1 there" in one[3]
    assert (one[4], other[4]) == ("--order is unknown", "rank 0 cannot go on: --order is unknown")
    assert (one[5:], other[5:]) == (["7", "(2.0,)"], ["None", "(2.0,)"])


def test_a_port_in_use_is_said_by_every_process(tmp_path: Path) -> None:
    """By a program that answers nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finish(start([str(CHILD), str(port), str(tmp_path)]))
        for rank in (0, 1):
            (said,) = json.loads((tmp_path / f"{rank}.json").read_text())
            assert said.startswith(f"the processes cannot meet at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}, which ")
