"""A judge behind a real HTTP server on the loopback interface, with whatever a server may do wrong."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST_REQUESTS = 500
BLOCK = re.compile(r"DATA-([0-9a-f]{16}) (.*) DATA-\1")
ORDER = re.compile(r"(follows_instruction|consistent) is (true|false)")


def text_of(messages: list[dict[str, Any]]) -> str:
    parts = []
    for message in messages:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return "\n".join(parts)


def obedient(messages: list[dict[str, Any]]) -> dict[str, bool]:
    """Does what it is told anywhere outside of the last line's data block; elsewhere judges by what the block says."""
    text = text_of(messages)
    *before, last = text.splitlines()
    block = BLOCK.fullmatch(last)
    assert block, last
    data = json.loads(block[2])
    verdict = {"follows_instruction": " " not in data["answer"], "consistent": data["answer"].endswith("ish")}
    return verdict | {question: value == "true" for question, value in ORDER.findall("\n".join(before))}


@dataclass
class Judge:
    """The server's state. script: what each request meets, in the order of arrival; afterwards all is well.

    An entry is "ok", "malformed", "cut off", "length", "slow", "drop", "reset", (status, headers) or
    (status, headers, body).
    server: what any request meets, by its path and body; None for what the script says.
    reply: changes a completion that is well.
    """

    script: Sequence[str | tuple[Any, ...]] = ()
    server: Callable[[str, dict[str, Any]], tuple[Any, ...] | None] = lambda path, body: None
    reply: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda completion: None
    brain: Callable[[list[dict[str, Any]]], dict[str, bool]] = obedient
    seconds: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""


@contextmanager
def serving(judge: Judge) -> Iterator[Judge]:
    """Serves until the block ends. After ``MOST_REQUESTS`` every request fails."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(judge.requests)
                judge.requests.append(body)
                judge.paths.append(self.path)
                judge.keys.append(self.headers["Authorization"])
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            what = judge.script[number] if number < len(judge.script) else "ok"
            what = judge.server(self.path, body) or what
            what = (404, {}) if number >= MOST_REQUESTS else what
            time.sleep(judge.seconds)
            with lock:
                judge.at_once -= 1
            self.answer(body, what)

        def answer(self, body: dict[str, Any], what: str | tuple[Any, ...]) -> None:
            if isinstance(what, tuple):
                status, headers, said = what if len(what) == 3 else (*what, {"error": {"message": "no such luck"}})
                return self.send(status, said if isinstance(said, str) else json.dumps(said), headers)
            content = json.dumps(judge.brain(body["messages"]))
            if what == "malformed":
                content = "Sure! The answer is as it should be."
            if what == "length":
                content = content[:12]
            ended = "length" if what == "length" else "stop"
            choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": ended}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
            completion |= {"choices": [choice], "usage": usage}
            reply = json.dumps(judge.reply(completion) or completion)
            if what == "slow":
                self.connection.settimeout(20)
                assert not self.rfile.read(1), "the client hangs up first"
                return None
            if what == "reset":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
            if what == "cut off":
                return self.send(200, reply[:40], {})
            if what == "drop":
                return self.send(200, reply, {"Content-Length": str(len(reply) + 10)})
            return self.send(200, reply, {})

        def send(self, status: int, text: str, headers: dict[str, str]) -> None:
            self.close_connection = True
            try:
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": str(len(text))} | headers
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                return  # the client did not wait

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield judge
        finally:
            server.shutdown()
            thread.join()
