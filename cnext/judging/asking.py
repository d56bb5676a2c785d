"""Many cases asked about in parallel: once for cases of equal input, each verdict saved as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any

from cnext.judging.cache import Verdict, Verdicts
from cnext.judging.cases import Case
from cnext.judging.client import Client
from cnext.judging.connection import Unavailable
from cnext.judging.replies import Completion, Malformed, NoReply, NoVerdict, Reply, parse
from cnext.judging.requests import Prompts, input_hash

MAX_FAILED = 10
"""Cases in a row without a verdict after which judging ends: the server is down, or the model does not understand."""

GRACE = 0.4
"""Seconds that open requests have to end after an interrupt."""


def keys(cases: Sequence[Case], verdicts: Verdicts) -> dict[Case, tuple[str, str]]:
    """The key of each case's verdict, and the hash of its input."""
    return {case: (verdicts.key(digest := input_hash(case)), digest) for case in cases}


class _Failures:
    """Counts the cases in a row without a verdict; thread-safe."""

    def __init__(self, client: Client) -> None:
        self.client, self.count, self.lock = client, 0, Lock()

    def reset(self) -> None:
        with self.lock:
            self.count = 0

    def add(self, error: NoVerdict) -> None:
        """Raises Unavailable for the last in a row, with what came."""
        with self.lock:
            self.count += 1
            count = self.count
        if count >= MAX_FAILED:
            self.client.stopped.set()
            what = "malformed replies on" if isinstance(error, Malformed) else "no reply to"
            kind = "cases" if isinstance(error, Malformed) else "requests"
            raise Unavailable(
                f"the judge at {self.client.url} gave {what} {count} {kind} in a row ({error})"
            ) from error


def judge(
    keyed: dict[Case, tuple[str, str]],
    verdicts: Verdicts,
    client: Client,
    prompts: Prompts,
    concurrency: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Asks about the cases without a verdict.

    Args:
        keyed: cases as ``keys`` gives them.
        concurrency: requests at a time.
        advance: called after each case, in the calling thread.

    Returns:
        Why there is no verdict, by the key of those that stay without one.

    Raises:
        Unavailable: the server cannot be used, or gives no verdicts; those so far are saved.
    """
    verdicts.open()
    waiting = {key: (case, digest) for case, (key, digest) in keyed.items() if verdicts.error_type(key) is None}
    failures = _Failures(client)
    todo, done = SimpleQueue[str](), SimpleQueue[tuple[str, Verdict | str] | BaseException]()

    def one(key: str) -> Verdict | str:
        """The verdict, or why there is none."""
        case, digest = waiting[key]
        try:
            completion, reply = _answer(case, client, prompts)
        except NoVerdict as error:
            if client.stopped.is_set():
                return "stopped"
            failures.add(error)
            return f"malformed reply, {error.reason}" if isinstance(error, Malformed) else error.reason
        failures.reset()
        return Verdict(
            *(key, digest, case.stage, case.task, case.index, case.id),
            *(reply.follows_instruction, reply.consistent, completion.served, completion.tokens),
            *(verdicts.model, prompts.version, prompts.sha256, completion.parameters),
        )

    def work() -> None:
        with suppress(Empty):
            while not client.stopped.is_set():
                key = todo.get_nowait()
                try:
                    done.put((key, one(key)))
                except BaseException as error:  # noqa: BLE001 (raised in the calling thread)
                    client.stopped.set()
                    done.put(error)

    reasons: dict[str, str] = {}

    def keep(key: str, found: Verdict | str) -> None:
        if isinstance(found, Verdict):
            verdicts.add(found)
        else:
            reasons[key] = found
        advance()

    for key in waiting:
        todo.put(key)
    # They do not outlive the program, whatever a server or a name lookup does.
    threads = [Thread(target=work, daemon=True, name=f"judge-{n}") for n in range(min(concurrency, len(waiting)))]
    patience = client.timeout
    try:
        for thread in threads:
            thread.start()
        for _ in waiting:
            result = _next(done)
            if isinstance(result, BaseException):
                raise result
            keep(*result)
    except KeyboardInterrupt:
        patience = GRACE
        raise
    finally:
        client.stopped.set()
        try:
            _join(threads, patience)
        finally:
            client.hang_up()
            _join(threads, GRACE)
            while not done.empty():
                result = done.get()
                if not isinstance(result, BaseException):
                    keep(*result)
    return reasons


def _next(queue: SimpleQueue[Any]) -> Any:
    # A signal that comes just before a wait does not end it.
    while True:
        with suppress(Empty):
            return queue.get(timeout=0.2)


def _join(threads: list[Thread], seconds: float) -> None:
    """Waits for threads, at most so many seconds in all."""
    end = monotonic() + seconds
    for thread in threads:
        while thread.is_alive() and monotonic() < end:
            thread.join(0.1)


def _answer(case: Case, client: Client, prompts: Prompts) -> tuple[Completion, Reply]:
    """The judge's reply; after a malformed one it is asked once more, with a reminder."""
    texts = "\n".join((case.instruction, case.expected, case.answer))
    try:
        completion = client.ask(prompts.messages(case))
        return completion, parse(completion.content, texts)
    except Malformed as error:
        if client.stopped.is_set():
            raise NoReply("stopped") from error
        completion = client.ask(prompts.messages(case, again=True))
        return completion, parse(completion.content, texts)
