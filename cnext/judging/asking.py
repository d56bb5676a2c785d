"""Asking a model about many cases: a few at a time, each verdict kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock

from cnext.judging.cache import Verdicts
from cnext.judging.cases import Case
from cnext.judging.client import Client, NoReply, Unavailable
from cnext.judging.requests import Prompts, input_hash
from cnext.judging.verdict import Malformed, parse

GIVE_UP = 10
"""So many requests in a row without a reply end the judging: the server is down, and waiting for each would be vain."""


def keys(cases: Sequence[Case], verdicts: Verdicts) -> dict[Case, tuple[str, str]]:
    """The key of each case's verdict and the hash of its input."""
    return {case: (verdicts.key(digest := input_hash(case)), digest) for case in cases}


def ask(
    named: dict[Case, tuple[str, str]],
    verdicts: Verdicts,
    client: Client,
    prompts: Prompts,
    concurrency: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Asks about the cases that have no verdict yet; equal cases are asked about once.

    Args:
        named: cases as ``keys`` gives them.
        advance: called after each request, from the calling thread.

    Returns:
        Why there is no verdict, by the key of those that stay without one.

    Raises:
        Unavailable: no reply can be had; the verdicts that were given are kept.
    """
    silent, lock = 0, Lock()
    waiting = {name: (case, digest) for case, (name, digest) in named.items() if verdicts.error_type(name) is None}

    def one(name: str) -> tuple[str, str]:
        """The key, and why there is no verdict: "" where there is one."""
        nonlocal silent
        case, digest = waiting[name]
        for again in (False, True):
            if client.stopped.is_set():
                return name, "stopped"
            try:
                reply = client.ask(prompts.messages(case, again))
                answers = parse(reply.content)
                silent = 0
            except Malformed as error:
                silent = 0
                reason = f"malformed reply, {str(error).split(':')[0]}"
                continue
            except NoReply as error:
                with lock:
                    silent += 1
                if silent >= GIVE_UP:
                    client.stopped.set()
                    raise Unavailable(
                        f"the judge at {client.url} gave no reply to {silent} requests in a row ({error})"
                    ) from error
                return name, str(error)
            except Unavailable:
                client.stopped.set()
                raise
            about = {field: getattr(case, field) for field in ("stage", "task", "index", "id")}
            said = {**answers, "served": reply.served, "tokens": reply.tokens}
            verdicts.add({"key": name, "input_sha256": digest, **about, **said})
            return name, ""
        return name, reason

    reasons: dict[str, str] = {}
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
    try:
        for future in as_completed([pool.submit(one, name) for name in waiting]):
            name, reason = future.result()
            advance()
            if reason:
                reasons[name] = reason
    finally:
        client.stopped.set()
        pool.shutdown(cancel_futures=True)
    return reasons
