"""The HTTP connection of one thread to a judge's server, and how long, how much and where the server may make it go."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from socket import SHUT_RDWR, socket
from threading import Lock, Timer
from typing import Any

from cnext.errors import UserError
from cnext.judging.replies import NoReply, line

MAX_REPLY = 2**20
"""Bytes of a response, as sent and as unpacked; one with a verdict has some hundreds."""
MAX_REDIRECTS = 3


class Unavailable(UserError):
    """The server cannot be used as it is: every further request would fail too."""


def library(openai: Any) -> Any:
    """The HTTP library that the openai client builds on: httpx, or httpx2."""
    return import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])


class Connection:
    """An HTTP client for one thread, whose open request another thread can end.

    Redirects to another server are refused, and responses beyond `MAX_REPLY`.

    http: the client, for ``openai.OpenAI(http_client=...)``.
    ended: whether the request that is open, or was last, was ended by ``hang_up``.
    """

    def __init__(self, openai: Any, base: str, timeout: float, verify: Any) -> None:
        self.ended = False
        self._library = library(openai)
        self._socket: socket | None = None
        self._lock = Lock()
        self.http = openai.DefaultHttpxClient(
            base_url=base,
            timeout=timeout,
            verify=verify,
            max_redirects=MAX_REDIRECTS,
            event_hooks={"request": [self._asks], "response": [self._answered]},
        )

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Context of one request. Raises TimeoutError where it takes longer, however little is sent at a time."""
        self.ended, whole = False, False
        timer = Timer(seconds, self.hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
            whole = True
        finally:
            timer.cancel()
            # The end of a connection can also look like that of a reply.
            if self.ended:
                raise TimeoutError
            if not whole:
                with self._lock:
                    self._shut()

    def hang_up(self) -> None:
        """Ends the open request, if any, from any thread: its next read or write finds the connection closed."""
        with self._lock:
            self.ended = True
            self._shut()

    def close(self) -> None:
        self.http.close()
        self._hold(None)

    def _hold(self, new: socket | None) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = new
            if self.ended:
                self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(SHUT_RDWR)

    def _asks(self, request: Any) -> None:
        """Refuses what a redirect makes of a request, before it is sent. The key and the data are for one server."""
        base, url = self.http.base_url, request.url
        there, here = ((each.scheme, each.host, each.port) for each in (url, base))
        if there != here or request.method != "POST":
            raise Unavailable(
                f"the judge at {line(str(base))} redirects to {line(str(url))}, where nothing was sent: "
                "give the URL of the server itself, if you trust it"
            )
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, found: dict[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            # A duplicate, as the original becomes another object for TLS.
            self._hold(found["return_value"].get_extra_info("socket").dup())

    def _answered(self, response: Any) -> None:
        packed = response.headers.pop("content-encoding", "identity").strip().lower()
        # JSON is UTF-8, whatever the header says.
        response.encoding = "utf-8"
        sent, broken = response.stream, self._library.DecodingError

        class Bounded(self._library.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                try:
                    yield from bounded(sent, packed)
                except zlib.error as error:
                    raise broken(f"{error}") from error

            def close(self) -> None:
                sent.close()

        response.stream = Bounded()


def bounded(parts: Iterable[bytes], packed: str) -> Iterator[bytes]:
    """What a response holds, at most `MAX_REPLY` of it.

    Args:
        packed: the Content-Encoding. None is asked for; gzip and deflate, which some servers send anyway, are unpacked.

    Raises:
        zlib.error: it cannot be unpacked.
        NoReply: it is larger.
    """
    if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise zlib.error(f"the encoding {packed!r} was not asked for")
    unpacker = None if packed in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    sent = size = 0
    for part in parts:
        sent += len(part)
        content = unpacker.decompress(part, MAX_REPLY + 1 - size) if unpacker else part
        size += len(content)
        if max(sent, size) > MAX_REPLY:
            raise NoReply(f"a reply of more than {MAX_REPLY:,} bytes")
        yield content
    if unpacker and sent and not unpacker.eof:
        raise zlib.error("it breaks off")
