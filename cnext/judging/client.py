"""Client of an OpenAI-compatible server: requests with retries, and many cases in parallel."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event, Lock
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from cnext.errors import UserError
from cnext.judging.cache import Verdict, Verdicts
from cnext.judging.cases import Case
from cnext.judging.requests import PARAMETERS, Malformed, Prompts, input_hash, parse

DEFAULT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_WAIT = 60.0
"""The longest wait in seconds before a retry, unless the server names a longer one."""
ONE_REQUEST = (400, 413, 422)
"""Status codes that may concern one request only: too long, or an image size that the model does not take."""
MAX_SILENT = 10
"""Requests in a row without a reply after which judging ends: the server is down."""


class Unavailable(UserError):
    """The server cannot be used as it is: every further request would fail too."""


class NoReply(Exception):
    """One request got no reply in all its tries; others may get one."""


@dataclass(frozen=True)
class Completion:
    """A chat completion: its message, the model as the server names it, and the tokens that it counts."""

    content: str
    served: str
    tokens: dict[str, int]


@dataclass
class Client:
    """One server and one model; thread-safe.

    url: for example http://localhost:8000/v1.  timeout: seconds without data after which a request fails.
    tries: of one request, while the server is overloaded, fails or is silent.  wait: seconds before the second try,
    doubled for each further one, with a random factor between 0.5 and 1.
    """

    url: str
    model: str = DEFAULT_MODEL
    timeout: float = 120.0
    tries: int = 5
    wait: float = 1.0
    stopped: Event = field(default_factory=Event)
    """Set to end all waits."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"expected openai:URL with http:// or https://, got {self.url!r}; try http://localhost:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(f"the URL of the judge has a user name or password; set {KEY_VARIABLE} instead")
        try:
            import openai
        except ImportError as error:
            raise UserError("a judge behind a server needs the openai client: pip install 'cnext[judge]'") from error
        self._openai = openai
        # Local servers accept any key, but want one. Retries are done here, so that waits can be ended.
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def ask(self, messages: list[Any]) -> Completion:
        """The completion of messages.

        Raises:
            Malformed: the reply is cut off, or no chat completion.
            NoReply: the server was overloaded, failed or timed out at every try, or refuses this request.
            Unavailable: it cannot be reached, or refuses the key or the model.
        """
        openai = self._openai
        for attempt in range(self.tries):
            asked_wait = 0.0
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages, **PARAMETERS
                )
                return _read(raw.text)
            except openai.APITimeoutError as error:
                failure: Exception = NoReply(f"no reply within {self.timeout:g} s")
                cause: Exception = error
            except openai.APIConnectionError as error:
                reason = f"{error.__cause__ or error}"
                failure, cause = (
                    Unavailable(f"the judge at {self.url} cannot be reached ({reason}); start it, or correct the URL"),
                    error,
                )
            except openai.APIStatusError as error:
                if error.status_code in ONE_REQUEST:
                    raise NoReply(f"refused with status {error.status_code}: {_message(error)}") from error
                if error.status_code != 429 and error.status_code < 500:
                    raise self._refusal(error) from error
                failure, cause = NoReply(f"status {error.status_code}"), error
                asked_wait = _seconds(error.response.headers.get("retry-after", ""))
            if attempt + 1 == self.tries:
                raise failure from cause
            backoff = min(self.wait * 2**attempt, MAX_WAIT) * random.uniform(0.5, 1.0)
            if self.stopped.wait(max(backoff, asked_wait)):
                raise NoReply("stopped") from cause
        raise AssertionError("tries must be at least 1")

    def _refusal(self, error: Any) -> Unavailable:
        status = error.status_code
        if status in (401, 403):
            given = (
                f"refuses the key in {KEY_VARIABLE}"
                if os.environ.get(KEY_VARIABLE)
                else f"wants a key in {KEY_VARIABLE}"
            )
            return Unavailable(f"the judge at {self.url} {given} (status {status})")
        return Unavailable(
            f"the judge at {self.url} refuses a request for {self.model} (status {status}): {_message(error)}"
        )


def _message(error: Any) -> str:
    return " ".join(str(error.message).split())[:200]


def _read(body: str) -> Completion:
    try:
        value = json.loads(body)
        choice, usage = value["choices"][0], value.get("usage") or {}
        content, ended = choice["message"]["content"], choice.get("finish_reason")
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Malformed(f"no chat completion: {body[:80]!r}") from error
    if ended == "length":
        raise Malformed(f"cut off: {str(content)[:80]!r}")
    return Completion(str(content or ""), str(value.get("model") or ""), tokens)


def _seconds(header: str) -> float:
    """The seconds of a Retry-After header; 0 where it has a date, for which the usual wait is used."""
    try:
        return min(max(float(header), 0.0), 10 * MAX_WAIT)
    except ValueError:
        return 0.0


def keys(cases: Sequence[Case], verdicts: Verdicts) -> dict[Case, tuple[str, str]]:
    """The key of each case's verdict, and the hash of its input."""
    return {case: (verdicts.key(digest := input_hash(case)), digest) for case in cases}


def judge(
    keyed: dict[Case, tuple[str, str]],
    verdicts: Verdicts,
    client: Client,
    prompts: Prompts,
    concurrency: int = 8,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """Asks about the cases without a verdict, once for cases of equal input, and saves each verdict as it arrives.

    Args:
        keyed: cases as ``keys`` gives them.
        concurrency: requests at a time.
        advance: called after each request, in the calling thread.

    Returns:
        Why there is no verdict, by the key of those that stay without one.

    Raises:
        Unavailable: the server cannot be used; verdicts so far are saved.
    """
    silent, lock = 0, Lock()
    waiting = {key: (case, digest) for case, (key, digest) in keyed.items() if verdicts.error_type(key) is None}

    def one(key: str) -> tuple[str, str]:
        """The key, and why there is no verdict: "" where there is one."""
        nonlocal silent
        case, digest = waiting[key]
        for again in (False, True):
            if client.stopped.is_set():
                return key, "stopped"
            try:
                completion = client.ask(prompts.messages(case, again))
                reply = parse(completion.content)
                silent = 0
            except Malformed as error:
                silent = 0
                reason = f"malformed reply, {str(error).split(':')[0]}"
                continue
            except NoReply as error:
                with lock:
                    silent += 1
                if silent >= MAX_SILENT:
                    client.stopped.set()
                    raise Unavailable(
                        f"the judge at {client.url} gave no reply to {silent} requests in a row ({error})"
                    ) from error
                return key, str(error)
            except Unavailable:
                client.stopped.set()
                raise
            verdicts.add(
                Verdict(
                    *(key, digest, case.stage, case.task, case.index, case.id),
                    *(reply.follows_instruction, reply.consistent, completion.served, completion.tokens),
                    *(verdicts.model, prompts.version, prompts.sha256),
                )
            )
            return key, ""
        return key, reason

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
