"""A child that is slow is waited for; one that hangs, or never ends, is killed and told with what it said."""

from __future__ import annotations

import subprocess
import sys

import pytest
from waiting import Hanging, outputs, until


def child(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True)


SLOW = """
import time
for step in range(30):
    begin = time.process_time()
    while time.process_time() - begin < 0.02: pass
    time.sleep(0.08)
print("x" * 100_000)
"""


def test_a_slow_child_is_waited_for_longer_than_it_may_idle() -> None:
    """Three seconds at a fifth of a core, and more output than a pipe holds, where one second may be idle."""
    quick, slow = child("import sys; sys.exit('bad')"), child(SLOW)
    assert outputs([quick, slow], idle=1.0) == [("", "bad\n"), ("x" * 100_000 + "\n", "")]
    assert (quick.returncode, slow.returncode) == (1, 0)


SHORT = """
import os, time
for child in range(30):
    if not os.fork():
        while time.process_time() < 0.01: pass
        time.sleep(0.1)
        os._exit(0)
    os.wait()
"""


def test_a_child_that_waits_for_one_short_process_after_another_makes_progress() -> None:
    """None of them computes as long as a process must in the time that it may be idle."""
    one = child(SHORT)
    assert outputs([one], idle=1.0) == [("", "")]
    assert one.returncode == 0


def test_a_hanging_child_is_killed_with_its_descendants() -> None:
    inner = "import subprocess, sys; print('before', flush=True); import time; time.sleep(1000)"
    waits, other = child(inner), child("import time; time.sleep(1000)")
    with pytest.raises(Hanging, match=r"(?s)have made no progress for 1 s; they said:\nbefore"):
        outputs([waits, other], idle=1.0)
    assert waits.returncode == other.returncode == -9


def test_a_child_in_a_loop_is_killed() -> None:
    loops = child("while True: pass")
    with pytest.raises(Hanging, match=r"have computed \d+ s and do not end"):
        outputs([loops], most=1.0)
    assert loops.returncode == -9


def test_until_watches_those_that_are_waited_for() -> None:
    done = child("")
    until(lambda: done.poll() is not None, [done.pid])
    assert done.communicate() == ("", "")
