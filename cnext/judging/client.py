"""Client of an OpenAI-compatible server: one request, with retries, in the form that the server takes."""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event, Lock, local
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from cnext.errors import UserError, printable
from cnext.judging.connection import Connection, Unavailable, library
from cnext.judging.parameters import Parameters, changes
from cnext.judging.replies import Completion, Malformed, NoReply, NoVerdict, ServerError, line, read, server_error
from cnext.judging.requests import PARAMETERS

DEFAULT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_TOKENS = PARAMETERS["max_tokens"]
MAX_WAIT = 60.0
"""The longest wait in seconds before a retry, unless the server names a longer one."""
ONE_REQUEST = (400, 413, 422)
"""Status codes that may concern one request only: too long, or an image size that the model does not take."""
OVERLOADED = (408, 425, 429)
BROKEN_REPLY = ("ReadError", "RemoteProtocolError", "DecodingError")
"""Names of errors of httpx, or of httpx2 where the openai client builds on that."""
NO_SUCH_PARAMETER = (400, 422, 501)
NO_SUCH_PATH = (404, 405)


def _ignore(text: str) -> None:
    pass


@dataclass
class Client:
    """One server and one model; thread-safe.

    url: for example http://localhost:8000/v1; where nothing is found there, /v1 is appended.
    timeout: seconds that a request may take in all.  tries: of one request, while the server is overloaded,
    fails or is silent.  wait: seconds before the second try, doubled for each further one, with a random factor between
    0.5 and 1.  max_tokens: of a reply.  warn: is told what is sent otherwise than asked for, and of long waits.
    """

    url: str
    model: str = DEFAULT_MODEL
    timeout: float = 120.0
    tries: int = 5
    wait: float = 1.0
    stopped: Event = field(default_factory=Event)
    """Set to end all waits."""
    max_tokens: int = MAX_TOKENS
    warn: Callable[[str], None] = _ignore
    usage: Counter[str] = field(default_factory=Counter, init=False)
    """Of all requests: how many, the tokens that the server counted, and replies for which it counted none."""

    def __post_init__(self) -> None:
        invalid = UserError(
            f"expected openai:URL with http:// or https://, got {self.url!r}; try http://localhost:8000/v1"
        )
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and self.url.isprintable()
        except ValueError as error:
            raise invalid from error
        if not usable:
            raise invalid
        if parts.username or parts.password:
            raise UserError(f"the URL of the judge has a user name or password; set {KEY_VARIABLE} instead")
        try:
            import openai
        except ImportError as error:
            raise UserError("a judge behind a server needs the openai client: pip install 'cnext[judge]'") from error
        self._openai = openai
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        base = parts._replace(path=path, query="", fragment="").geturl()
        try:
            library(openai).URL(base)
        except library(openai).InvalidURL as error:
            raise invalid from error
        # Servers have their paths below a version; some have no version.
        self._other_base = "" if re.search(r"/v\d", path) else f"{base}/v1"
        self._base, self._key, self._query = base, _key(), dict(parse_qsl(parts.query))
        self._verify = library(openai).create_ssl_context()
        self._mine, self._connections = local(), list[Connection]()
        self._lock = Lock()
        self.parameters = Parameters(self.max_tokens)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()

    def hang_up(self) -> None:
        """Ends all open requests; theirs is no reply."""
        self.stopped.set()
        for connection in self._connections:
            connection.hang_up()

    def _connected(self) -> tuple[Connection, Any]:
        """The connection of this thread, and the openai client on it."""
        if not hasattr(self._mine, "pair"):
            connection = Connection(self._openai, self._base, self.timeout, self._verify)
            # Local servers accept any key, but want one. Retries are done here, so that waits can be ended.
            api = self._openai.OpenAI(
                base_url=self._base,
                api_key=self._key or "none",
                timeout=self.timeout,
                max_retries=0,
                default_query=self._query,
                default_headers={"Accept-Encoding": "identity"},
                http_client=connection.http,
            )
            self._mine.pair = connection, api
            self._connections.append(connection)
        return self._mine.pair

    def ask(self, messages: list[Any]) -> Completion:
        """The completion of messages.

        Raises:
            Malformed: the reply is cut off, or no chat completion.
            NoReply: the server was overloaded, failed, timed out or sent a broken reply at every try, or it or the
                model refuses this request.
            Unavailable: it cannot be reached, or refuses the key or the model.
        """
        for attempt in range(self.tries):
            asked_wait = 0.0
            try:
                return self._whole(self._request(messages))
            except (self._openai.APITimeoutError, TimeoutError) as error:
                failure: Exception = NoReply(f"no reply within {self.timeout:g} s")
                cause: Exception = error
            except self._openai.APIConnectionError as error:
                failure, cause = self._unread(error), error
            except ServerError as error:
                failure, cause, asked_wait = self._failure(error), error, error.retry_after
                passing = error.status >= 500 or error.status in OVERLOADED
                if not passing or isinstance(failure, Unavailable):
                    raise failure from error
            if attempt + 1 == self.tries:
                raise failure from cause
            backoff = min(self.wait * 2**attempt, MAX_WAIT) * random.uniform(0.5, 1.0)
            if asked_wait > MAX_WAIT:
                self.warn(f"the judge at {self.url} asks to wait {asked_wait:.0f} s ({failure})")
            if self.stopped.wait(max(backoff, asked_wait)):
                raise NoReply("stopped") from cause
        raise AssertionError("tries must be at least 1")

    def _request(self, messages: list[Any]) -> Completion:
        """The reply to one request; a request that the server does not take as sent is repeated in another form."""
        connection, api = self._connected()
        while True:
            if self.stopped.is_set():
                raise NoReply("stopped")
            base, sent = self._base, self.parameters.sent
            api.base_url = base
            self._count({"requests": 1})
            try:
                with connection.limited(self.timeout):
                    raw = api.chat.completions.with_raw_response.create(model=self.model, messages=messages, **sent)
                completion = read(raw.text, raw.headers)
            except self._openai.APIStatusError as error:
                refusal = server_error(error.status_code, error.response.text, error.response.headers)
            except ServerError as error:
                refusal = error
            else:
                self._count(completion.tokens or {"uncounted_replies": 1})
                self._other_base = ""
                return replace(completion, parameters=changes(sent))
            if not self._adapt(base, sent, refusal):
                raise refusal

    def _adapt(self, base: str, sent: dict[str, Any], refusal: ServerError) -> bool:
        """Whether requests have another form now than the one that the server refused."""
        if refusal.status in NO_SUCH_PARAMETER:
            new = self.parameters.give_way(sent, refusal.text)
            if new:
                self.warn(f"the judge at {self.url} refuses a parameter ({refusal}); it is sent {new} from now on")
            return new is not None
        nothing_there = refusal.status in NO_SUCH_PATH and not re.search("model", refusal.text, re.IGNORECASE)
        # LM Studio returns this with status 200.
        if nothing_there or "unexpected endpoint" in refusal.text.lower():
            with self._lock:
                if base == self._base and self._other_base:
                    self._base, self._other_base = self._other_base, ""
                return base != self._base
        return False

    def _whole(self, completion: Completion) -> Completion:
        """A completion that is not cut off or refused."""
        if completion.finish_reason == "length":
            raise Malformed(
                f"cut off after {self.max_tokens} tokens, --max-tokens must be larger", completion.content or "(empty)"
            )
        if completion.finish_reason == "content_filter" or (completion.refusal and not completion.content.strip()):
            raise NoReply("declined by the model or its filter", completion.refusal or completion.content)
        return completion

    def _unread(self, error: Exception) -> Exception:
        """What it means that no whole reply came: of a server that was reached, others may come."""
        cause = error.__cause__
        if isinstance(cause, NoVerdict | Unavailable):
            raise cause
        if type(cause).__name__ == "TooManyRedirects":
            raise Unavailable(f"the judge at {self.url} redirects in a circle; correct the URL")
        reason = line(f"{cause or error}")
        if type(cause).__name__ in BROKEN_REPLY:
            return NoReply("the reply broke off or cannot be unpacked", reason)
        return Unavailable(f"the judge at {self.url} cannot be reached ({reason}); start it, or correct the URL")

    def _failure(self, error: ServerError) -> Exception:
        """What an error of the server means for this request and for others."""
        status = error.status
        if status in (401, 403):
            given = f"refuses the key in {KEY_VARIABLE}" if self._key else f"wants a key in {KEY_VARIABLE}"
            return Unavailable(f"the judge at {self.url} {given} (status {status})")
        if status in ONE_REQUEST:
            return NoReply(f"refused with status {status}: {error}")
        if status >= 500 or (status in OVERLOADED and "insufficient_quota" not in error.text):
            return NoReply(f"status {status}", str(error))
        advice = "; check the URL and --model" if status in NO_SUCH_PATH else ""
        return Unavailable(
            f"the judge at {self.url} refuses a request for {printable(self.model)} (status {status}): {error}{advice}"
        )

    def _count(self, numbers: dict[str, int]) -> None:
        with self._lock:
            self.usage.update(numbers)


def _key() -> str:
    """The key, without the line end that a file may have added."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{KEY_VARIABLE} has characters that no key has; set it again")
    return key
