"""Many cases asked about in parallel: once for cases of equal input, each verdict saved as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock

from cnext.judging.cache import Verdict, Verdicts
from cnext.judging.cases import Case
from cnext.judging.client import Client, Unavailable
from cnext.judging.replies import Completion, Malformed, NoReply, NoVerdict, Reply, parse
from cnext.judging.requests import Prompts, input_hash

MAX_FAILED = 10
"""Cases in a row without a verdict after which judging ends: the server is down, or the model does not understand."""


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
    waiting = {key: (case, digest) for case, (key, digest) in keyed.items() if verdicts.error_type(key) is None}
    failures = _Failures(client)

    def one(key: str) -> tuple[str, str]:
        """The key, and why there is no verdict: "" where there is one."""
        case, digest = waiting[key]
        if client.stopped.is_set():
            return key, "stopped"
        try:
            completion, reply = _answer(case, client, prompts)
        except NoVerdict as error:
            if client.stopped.is_set():
                return key, "stopped"
            failures.add(error)
            return key, f"malformed reply, {error.reason}" if isinstance(error, Malformed) else error.reason
        except Unavailable:
            client.stopped.set()
            raise
        failures.reset()
        verdicts.add(
            Verdict(
                *(key, digest, case.stage, case.task, case.index, case.id),
                *(reply.follows_instruction, reply.consistent, completion.served, completion.tokens),
                *(verdicts.model, prompts.version, prompts.sha256, completion.parameters),
            )
        )
        return key, ""

    reasons: dict[str, str] = {}
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    try:
        for future in as_completed([pool.submit(one, key) for key in waiting]):
            key, reason = future.result()
            advance()
            if reason:
                reasons[key] = reason
    finally:
        client.stopped.set()
        pool.shutdown(cancel_futures=True)
    return reasons


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
