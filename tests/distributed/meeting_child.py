"""One of two processes that meet as a run's do: PORT OTHER_PORT OUT. Writes what each attempt said, as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cnext.distributed import collectives, processes, start_check
from cnext.errors import UserError

SHORT = 3.0


def said(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def meet(settings: dict[str, object]) -> str:
    with processes.process_group("cpu", settings):
        return ""


def refuse() -> None:
    with processes.refusals():
        raise UserError("--order is unknown")


def main() -> None:
    rank, ports, out = int(os.environ["RANK"]), sys.argv[1:-1], Path(sys.argv[-1])
    found = []
    if len(ports) == 1:  # which another program uses
        start_check.HANDSHAKE = SHORT
        os.environ["MASTER_PORT"] = ports[0]
        found.append(said(lambda: meet({})))
    else:
        os.environ["MASTER_PORT"] = ports[0]
        found.append(said(lambda: meet({"seed": rank, "recipe": {"learning_rate": 0.1}})))
        os.environ["MASTER_PORT"] = ports[1]
        found.append(said(refuse if rank else lambda: meet({})))
        os.environ["MASTER_PORT"] = ports[2]
        with processes.process_group("cpu", {"seed": 1}):
            found.append(said(lambda: meet({"seed": rank})))
            found.append(said(lambda: processes.compare({"data": {"A": {"test": rank}}}, "the data that it reads")))
            found.append(said(lambda: processes.first_alone(refuse)))
            found.append(str(processes.first_alone(lambda: 7)))
            found.append(str(collectives.all_reduce(1.0)))
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
