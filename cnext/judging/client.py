"""A model behind an OpenAI-compatible server: one request, tried again where that may help, with a reason if not."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from threading import Event
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from cnext.errors import UserError
from cnext.judging.requests import PARAMETERS
from cnext.judging.verdict import Malformed

DEFAULT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0
"""The longest wait in seconds before a request is tried again, unless the server names a longer one."""
OF_ONE = (400, 413, 422)
"""Refusals that may be of one request alone: too long, or a picture of a shape that the model does not take."""


class Unavailable(UserError):
    """No answer can be had from this server as it is: every further request would fare the same."""


class NoReply(Exception):
    """One request got no reply in all its tries; others may."""


@dataclass(frozen=True)
class Reply:
    """What a server said. content: the message. tokens: of request and reply, as the server counts them."""

    content: str
    served: str
    tokens: dict[str, int]


@dataclass
class Client:
    """One server and one model. Any number of threads may ``ask``.

    url: for example http://localhost:8000/v1.  timeout: seconds that the server may be silent.
    tries: of one request, while the server is overloaded, fails or is silent.  wait: seconds before the second try;
    doubled for each further one, and shortened by up to a half at random.
    """

    url: str
    model: str = DEFAULT_MODEL
    timeout: float = 120.0
    tries: int = 5
    wait: float = 1.0
    stopped: Event = field(default_factory=Event)
    """Set to end every wait at once."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"expected openai:URL with http:// or https://, got {self.url!r}; try http://localhost:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(f"the URL of the judge holds a name or password; put the key into {KEY_VARIABLE} instead")
        try:
            import openai
        except ImportError as error:
            raise UserError("a judge behind a server needs the openai client: pip install 'cnext[judge]'") from error
        self._openai = openai
        # Local servers want some key, whatever it is. Retries are ours, so that waits can be ended.
        key = os.environ.get(KEY_VARIABLE) or "none"
        self._client = openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=0)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def ask(self, messages: list[Any]) -> Reply:
        """The reply to some messages.

        Raises:
            Malformed: the reply is cut off, or no chat completion.
            NoReply: the server was overloaded, failed or was silent at every try, or refuses this request.
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
                    Unavailable(f"the judge at {self.url} cannot be reached ({reason}); start it, or mend the URL"),
                    error,
                )
            except openai.APIStatusError as error:
                if error.status_code in OF_ONE:
                    raise NoReply(f"refused with status {error.status_code}: {_said(error)}") from error
                if error.status_code != 429 and error.status_code < 500:
                    raise self._refusal(error) from error
                failure, cause = NoReply(f"status {error.status_code}"), error
                asked_wait = _seconds(error.response.headers.get("retry-after", ""))
            if attempt + 1 == self.tries:
                raise failure from cause
            backoff = min(self.wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
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
            f"the judge at {self.url} refuses a request for {self.model} (status {status}): {_said(error)}"
        )


def _said(error: Any) -> str:
    return " ".join(str(error.message).split())[:200]


def _read(body: str) -> Reply:
    try:
        value = json.loads(body)
        choice, usage = value["choices"][0], value.get("usage") or {}
        content, ended = choice["message"]["content"], choice.get("finish_reason")
        tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Malformed(f"no chat completion: {body[:80]!r}") from error
    if ended == "length":
        raise Malformed(f"cut off: {str(content)[:80]!r}")
    return Reply(str(content or ""), str(value.get("model") or ""), tokens)


def _seconds(header: str) -> float:
    """Seconds in a Retry-After header; 0 for a date, which our own waits serve as well."""
    try:
        return min(max(float(header), 0.0), 10 * LONGEST_WAIT)
    except ValueError:
        return 0.0
