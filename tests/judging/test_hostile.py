"""Servers that mean harm or are broken, on the loopback: where they send a request, how long, how much, and what."""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from judging.judge_server import Judge, serving
from judging.test_client import BROKEN, PROMPTS, case, judged, no_proxy  # noqa: F401

from cnext.judging.client import Client
from cnext.judging.connection import MAX_REPLY, Unavailable, bounded
from cnext.judging.replies import Completion, Malformed, NoReply, NoVerdict, ServerError, parse, read, server_error

MOST_CONNECTIONS = 20
VERDICT = '{"follows_instruction": true, "consistent": false}'
REPLY = json.dumps({"choices": [{"message": {"content": VERDICT}}], "model": "toy"}).encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def raw(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bool]]]:
    """A server that answers each request as told. Yields its URL, and whether each client hung up first.

    ``answer`` may wait for the client 20 seconds in all.
    """
    left: list[bool] = []

    def serve() -> None:
        for _ in range(MOST_CONNECTIONS):
            connection, _ = server.accept()
            with connection:
                connection.settimeout(20)
                if not connection.recv(2**16):
                    return  # the end of the test
                left.append(False)
                try:
                    answer(connection)
                except (BrokenPipeError, ConnectionResetError):
                    left[-1] = True

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", left
        finally:
            with socket.create_connection(server.getsockname()):
                pass
            thread.join()


def sending(content: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(content)


def asked(url: str, timeout: float = 5.0) -> Completion:
    with Client(url, "toy", timeout, tries=1) as client:
        return client.ask(PROMPTS.messages(case("blue")))


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Judge]:
    with serving(Judge()) as judge:
        yield judge


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["{}", "https:{0}", "//localhost:{1}/v1", "http://127.0.0.1@localhost:{1}/%1b[2J"])
def test_a_redirect_to_another_server_is_refused(
    status: int, where: str, elsewhere: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    host = elsewhere.url.removeprefix("http:")
    target = where.format(elsewhere.url if where == "{}" else host, elsewhere.url.rsplit(":")[-1].removesuffix("/v1"))
    with serving(Judge([(status, {"Location": target})] * 9)) as judge:
        with pytest.raises(Unavailable, match=r"redirects to .*, where nothing was sent") as error:
            asked(judge.url)
        assert len(judge.requests) == 1
        ours, theirs = str(error.value).split(" redirects to ")
        assert ours == f"the judge at {judge.url}/"
        assert ("localhost" if "localhost" in target else "127.0.0.1") in theirs
    assert str(error.value).isprintable()
    assert not elsewhere.requests


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_lose_the_request_is_refused(status: int) -> None:
    with serving(Judge([(status, {"Location": "/v2/chat/completions"})])) as judge:
        with pytest.raises(Unavailable, match=r"redirects to .*/v2/chat/completions"):
            asked(judge.url)
        assert len(judge.requests) == 1


def test_a_redirect_on_the_same_server_is_followed() -> None:
    def server(path: str, body: dict[str, Any]) -> tuple[Any, ...] | None:
        return None if path.endswith("/") else (307, {"Location": f"{path}/"})

    with serving(Judge(server=server)) as judge:
        assert parse(asked(judge.url).content)
        assert judge.paths == ["/v1/chat/completions", "/v1/chat/completions/"]


def test_redirects_in_a_circle_end() -> None:
    with serving(Judge(server=lambda path, body: (307, {"Location": path}))) as judge:
        with pytest.raises(Unavailable, match="redirects in a circle"):
            asked(judge.url)
        assert len(judge.requests) == 4


@pytest.mark.parametrize("location", [None, "", "http://[", "http://:x", "\xff", "/\x1b[2J"])
def test_a_redirect_to_nowhere(location: str | None) -> None:
    headers = {} if location is None else {"Location": location}
    with serving(Judge(server=lambda path, body: (302, headers))) as judge:
        with pytest.raises((Unavailable, NoReply)) as error:
            asked(judge.url)
        assert str(error.value).isprintable()
        assert len(judge.requests) == 1


def dripping(head: bytes, part: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        wait = threading.Event()
        for _ in range(400):
            wait.wait(0.05)
            connection.sendall(part)

    return answer


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"", b"H"),
        (OK, b"X-A: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"Content-Length: 9999\r\n\r\n", b" "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (OK + b"\r\n" + REPLY, b" "),
        (b"HTTP/1.1 500 No\r\n\r\n", b" "),
    ],
    ids=["status", "headers", "continue", "length", "chunks", "until-close", "error"],
)
def test_a_request_has_an_end_however_slowly_data_comes(head: bytes, part: bytes) -> None:
    with raw(dripping(head, part)) as (url, left), pytest.raises(NoReply, match=r"no reply within 0\.5 s"):
        asked(url, timeout=0.5)
    assert left == [True], "the client hangs up"


@pytest.mark.parametrize("head", [b"", OK + b"Transfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n"])
def test_no_more_is_read_than_a_reply_has(head: bytes) -> None:
    sent = []

    def answer(connection: socket.socket) -> None:
        connection.sendall(head or OK)
        part = b"8000\r\n" + bytes(0x8000) + b"\r\n" if head else b"X-A: " + b"b" * 0x8000 + b"\r\n"
        for _ in range(2000):
            sent.append(connection.send(part))

    why = "a reply of more than 1,048,576 bytes" if head else BROKEN
    with raw(answer) as (url, left), pytest.raises(NoReply, match=why):
        asked(url)
    assert left == [True]
    assert sum(sent) < 50 * MAX_REPLY


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
def test_a_bomb_is_not_unpacked(status: int, pack: Callable[[bytes], bytes]) -> None:
    name = "gzip" if pack is gzip.compress else "deflate"
    content = pack(bytes(9 * MAX_REPLY))
    assert len(content) < MAX_REPLY
    head = f"HTTP/1.1 {status} X\r\nContent-Encoding: {name}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with raw(sending(head + content)) as (url, _), pytest.raises(NoReply, match="a reply of more than 1,048,576 bytes"):
        asked(url)
    unpacked = []
    with suppress(NoReply):
        unpacked += bounded([content], name)
    assert not unpacked


@pytest.mark.parametrize("name", ["gzip", "GZIP ", "deflate", "br", "gzip, gzip", "zstd", "identity", ""])
def test_packed_replies(name: str) -> None:
    content = gzip.compress(REPLY) if "zip" in name.lower() else zlib.compress(REPLY) if name == "deflate" else REPLY
    head = OK + f"Content-Encoding: {name}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with raw(sending(head + content)) as (url, _):
        if name in ("br", "zstd", "gzip, gzip"):
            with pytest.raises(NoReply, match=f"{BROKEN}: 'the encoding '{name}' was not asked for'"):
                asked(url)
        else:
            assert asked(url).content == VERDICT


@pytest.mark.parametrize("charset", ["utf-16", "zlib", "hex", "idna", "undefined", "unicode_escape", "\x1b", "utf-8"])
def test_json_is_utf_8(charset: str) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset={charset}\r\n".encode()
    with raw(sending(head + b"Connection: close\r\n\r\n" + REPLY)) as (url, _), suppress(NoReply):
        assert asked(url).content == VERDICT


@pytest.mark.parametrize(
    "answer",
    [
        b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        REPLY,
        b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\n" + REPLY,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n" + REPLY,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n" + REPLY,
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n" + REPLY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n" + REPLY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + REPLY,
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + REPLY,
        b"HTTP/1.1 999 \x1b[2J\r\n\r\n\x1b[2J",
        b"HTTP/1.1 400 \xe2\x80\xae\r\n\r\n\xe2\x80\xae\x1b[2J\r\n\xff",
        b"HTTP/1.1 200 OK\r\n\r\n\xff\xfe" + REPLY,
    ],
    ids=(
        "nothing tls http-0.9 short too-long negative two-lengths no-chunk large-chunk 204 304 101 999 400 mark"
    ).split(),
)
def test_what_is_no_reply_is_said_in_a_line(answer: bytes) -> None:
    with raw(sending(answer)) as (url, left), pytest.raises((NoVerdict, Unavailable)) as error:
        asked(url, timeout=2.0)
    assert str(error.value).isprintable()
    assert left == [False]


def nested(kind: str, depth: int) -> str:
    return kind * depth + "1" + {"[": "]", '{"a":': "}"}[kind] * depth


ODD = [
    "null",
    "true",
    "NaN",
    "-Infinity",
    "1e999",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '"\\u001b[2J\\u202e"',
    "[]",
    "{}",
]
ODD += ["[1]", "[null]", '[{"type": "text", "text": [1]}]', '{"message": {}}', '{"a": 1, "a": 2}', '""']
ODD += [nested(kind, depth) for kind in ("[", '{"a":') for depth in (300, 900, 5000, 100_000)]
FIELDS = ["choices", "choices.0", "choices.0.message", "choices.0.message.content", "choices.0.finish_reason", "model"]
FIELDS += ["choices.0.message.refusal", "choices.0.message.tool_calls", "choices.0.message.function_call", "usage"]
FIELDS += ["usage.prompt_tokens", "error", "error.message", "error.code", "detail", "choices.0.error", ""]


@pytest.mark.parametrize("field", FIELDS)
def test_a_reply_may_hold_anything_anywhere(field: str) -> None:
    """It is a completion of strings and small counts, or an error with a line to show."""
    for odd in ODD:
        whole: dict[str, Any] = {"choices": [{"message": {"content": VERDICT}}], "usage": {"completion_tokens": 3}}
        *path, last = field.split(".")
        place: Any = whole
        for name in path:
            place = place[int(name)] if name.isdigit() else place.setdefault(name, {})
        place[int(last) if last.isdigit() else last] = "ODD"
        body = json.dumps(whole).replace('"ODD"', odd) if field else odd
        assert str(server_error(500, body, {})).isprintable()
        try:
            found = read(body, {})
        except (Malformed, ServerError):
            continue
        assert all(type(count) is int and 0 <= count < 2**53 for count in found.tokens.values())
        assert found.served.isprintable()
        with suppress(Malformed):
            parse(found.content)


@pytest.mark.parametrize(
    "unit", ["<think></think>", "{'follows_instruction': True,", '{"a":1,', '{"a":1}', '{"a":' * 900]
)
def test_a_long_reply_is_read_in_linear_time(unit: str) -> None:
    """They took minutes."""
    with pytest.raises(Malformed):
        parse(unit * (MAX_REPLY // len(unit)))
    with pytest.raises(Malformed, match="not the JSON object alone"):
        parse(f"The answer {VERDICT}", unit * 2000 + VERDICT)


def test_waits_are_numbers() -> None:
    for given in ("nan", "inf", "-inf", "1e999", "-5", "\x1b", "Thu, 99 Foo 9999", "9" * 400):
        assert 0 <= server_error(429, "", {"retry-after": given}).retry_after <= 600 or math.isnan(float(given))


@pytest.mark.parametrize("url", ["http://[::1", "http://h:99999/v1", "http://h:port", "http://h\x1b/v1", "http://h:0"])
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ValueError, match="expected openai:URL with http:// or https://") as error:
        Client(url)
    assert str(error.value).isprintable()


def test_failures_of_that_kind_leave_no_label(tmp_path: Path) -> None:
    elsewhere = {"Location": "http://127.0.0.2:9/"}
    with serving(Judge(["ok", (307, elsewhere)])) as judge:
        with pytest.raises(Unavailable, match="redirects to"):
            judged(judge, [case("blue"), case("navy", 1), case("green", 2)], tmp_path / "toy.jsonl")
        assert len(judge.requests) == 2
    assert len((tmp_path / "toy.jsonl").read_text().splitlines()) == 1
