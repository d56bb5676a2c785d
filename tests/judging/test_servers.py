"""Servers that speak Chat Completions in their own ways: parameters, paths, errors and replies, on the loopback."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judging.judge_server import Judge, serving
from judging.test_client import PROMPTS, case, no_proxy  # noqa: F401

from cnext.errors import UserError
from cnext.judging import asking
from cnext.judging.cache import Verdicts
from cnext.judging.client import Client, Unavailable
from cnext.judging.requests import PARAMETERS


class Judged:
    """What judging some cases gave."""

    def __init__(self, url: str, file: Path, count: int = 4, tries: int = 3, max_tokens: int = 64, threads: int = 1):
        cases = [case(f"blue{index}", index) for index in range(count)]
        self.warnings: list[str] = []
        verdicts = Verdicts(file, PROMPTS, "toy")
        try:
            keyed = asking.keys(cases, verdicts)
            with Client(url, "toy", 5.0, tries, wait=0.01, max_tokens=max_tokens, warn=self.warnings.append) as client:
                self.client = client
                self.reasons = Counter(asking.judge(keyed, verdicts, client, PROMPTS, threads).values())
            self.labels = [verdicts.error_type(key) for key, _ in keyed.values()]
            self.parameters = verdicts.parameters(key for key, _ in keyed.values())
        finally:
            verdicts.close()


def refusing(name: str, message: str, status: int = 400, **error: Any) -> Any:
    """A server that refuses requests with a parameter, or with that type of response_format."""

    def server(path: str, body: dict[str, Any]) -> tuple[Any, ...] | None:
        refused = name in body or body.get("response_format", {}).get("type") == name
        return (status, {}, {"error": {"message": message, **error}}) if refused else None

    return server


OBJECT = {"response_format": {"type": "json_object"}}
COMPLETION_TOKENS = {"max_completion_tokens": 64, "max_tokens": None}
MAX_TOKENS = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)
NO_SCHEMA = "response_format type json_schema is not supported"


@pytest.mark.parametrize(
    ("server", "changed", "more"),
    [
        (refusing("max_tokens", MAX_TOKENS), COMPLETION_TOKENS, 1),
        (refusing("max_tokens", "Unsupported parameter", param="max_tokens"), COMPLETION_TOKENS, 1),
        (refusing("json_schema", NO_SCHEMA), OBJECT, 1),
        (refusing("json_schema", "This response_format type is unavailable now"), OBJECT, 1),
        (refusing("json_schema", "Extra inputs: response_format.json_schema", 422), OBJECT, 1),
        (refusing("response_format", "Structured outputs are not supported"), {"response_format": None}, 2),
        (refusing("temperature", "'temperature' does not support 0 with this model."), {"temperature": None}, 1),
        (refusing("seed", "Unrecognized request argument supplied: seed"), {"seed": None}, 1),
        (refusing("top_p", "top_p must be in (0, 1)", 422), {"top_p": None}, 1),
    ],
    ids=["max-tokens", "param", "schema", "unavailable", "422", "no-format", "temperature", "seed", "top-p"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["status", "in-200"])
def test_a_refused_parameter_gives_way_for_good(
    server: Any, changed: dict[str, Any], more: int, inside: bool, tmp_path: Path
) -> None:
    def within(path: str, body: dict[str, Any]) -> tuple[Any, ...] | None:
        refused = server(path, body)
        return (200, {}, {"error": {**refused[2]["error"], "code": refused[0]}}) if refused else None

    with serving(Judge(server=within if inside else server)) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl")
        assert found.labels == ["hallucination"] * 4
        assert not found.reasons
        assert len(judge.requests) == 4 + more
    wanted = {name: value for name, value in (PARAMETERS | changed).items() if value is not None}
    assert {name: judge.requests[-1].get(name) for name in PARAMETERS | changed} == dict.fromkeys(
        PARAMETERS
    ) | wanted | {name: None for name, value in changed.items() if value is None}
    assert found.parameters == [changed]
    assert len(found.warnings) == more
    assert "refuses a parameter" in found.warnings[0]


def test_a_server_may_refuse_everything_that_is_optional(tmp_path: Path) -> None:
    def server(path: str, body: dict[str, Any]) -> tuple[Any, ...] | None:
        refused = next((name for name in PARAMETERS if name in body), None)
        detail = [{"type": "extra_forbidden", "loc": ["body", refused], "msg": "Extra inputs", "input": body}]
        return (422, {}, {"detail": detail}) if refused else None

    with serving(Judge(server=server)) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl", threads=4, count=8)
    assert found.labels == ["hallucination"] * 8
    assert found.parameters == [dict.fromkeys(PARAMETERS) | {"max_completion_tokens": 64}]
    assert len(found.warnings) == 6


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 64. This model's maximum context length is 4096 tokens",
        "This model's maximum context length is 4096 tokens. Please reduce the length of the messages.",
        "max_tokens must be less than 32",
        "image of 4x4 pixels is too small",
    ],
)
def test_a_refusal_of_one_request_changes_no_parameter(message: str, tmp_path: Path) -> None:
    with serving(Judge([(400, {}, {"error": {"message": message}})])) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl")
    assert found.labels == [None, *["hallucination"] * 3]
    assert found.reasons == {f"refused with status 400: {message}": 1}
    assert (found.warnings, found.parameters) == ([], [{}])


def test_a_form_that_is_refused_as_well_ends_it(tmp_path: Path) -> None:
    always = (400, {}, {"error": {"message": "max_tokens, max_completion_tokens: not supported"}})
    with serving(Judge(server=lambda path, body: always)) as judge:
        with pytest.raises(Unavailable, match=r"no reply to 10 requests in a row .*max_completion_tokens: not supp"):
            Judged(judge.url, tmp_path / "toy.jsonl", count=20)
        assert len(judge.requests) == 11


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1//", "/v1/chat/completions", "/v1/chat/completions/"])
@pytest.mark.parametrize("missing", [(404, {}, "404 page not found"), (405, {}, {"detail": "Method Not Allowed"}),
                                     (200, {}, {"error": "Unexpected endpoint or method. (POST /chat/completions)"})],
                         ids=["404", "405", "200"])  # fmt: skip
def test_the_version_in_the_url_is_found(ending: str, missing: tuple[Any, ...], tmp_path: Path) -> None:
    with serving(Judge(server=lambda path, body: None if path == "/v1/chat/completions" else missing)) as judge:
        found = Judged(judge.url.removesuffix("/v1") + ending, tmp_path / "toy.jsonl")
    assert found.labels == ["hallucination"] * 4
    assert judge.paths == ["/chat/completions"] * ("v1" not in ending) + ["/v1/chat/completions"] * 4


@pytest.mark.parametrize("base", ["", "/v1beta/openai", "/api/v3"])
def test_a_path_of_its_own_is_left(base: str, tmp_path: Path) -> None:
    missing = (404, {}, {"error": {"message": "no such path"}})
    path = f"{base}/chat/completions"
    with serving(Judge(server=lambda got, body: None if got == path else missing)) as judge:
        assert None not in Judged(judge.url.removesuffix("/v1") + base, tmp_path / "toy.jsonl").labels
    assert set(judge.paths) == {path}


def test_what_follows_the_path_is_sent(tmp_path: Path) -> None:
    with serving(Judge()) as judge:
        Judged(f"{judge.url}?api-version=2", tmp_path / "toy.jsonl", count=1)
    assert judge.paths == ["/v1/chat/completions?api-version=2"]


def test_nothing_at_either_path(tmp_path: Path) -> None:
    with serving(Judge(server=lambda path, body: (404, {}, "Not Found"))) as judge:
        with pytest.raises(Unavailable, match=r"refuses .* \(status 404\): Not Found; check the URL and --model"):
            Judged(judge.url.removesuffix("/v1"), tmp_path / "toy.jsonl")
        assert len(judge.requests) == 2


def test_a_path_that_works_is_not_left(tmp_path: Path) -> None:
    with serving(Judge(["ok", (404, {}, "Not Found")])) as judge:
        with pytest.raises(Unavailable, match=r"\(status 404\): Not Found"):
            Judged(judge.url.removesuffix("/v1"), tmp_path / "toy.jsonl")
        assert judge.paths == ["/chat/completions"] * 2


def test_an_unknown_model_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    unknown = (404, {}, {"error": {"message": "The model `toy` does not exist."}})
    with serving(Judge(server=lambda path, body: unknown)) as judge:
        with pytest.raises(Unavailable, match="The model `toy` does not exist"):
            Judged(judge.url.removesuffix("/v1"), tmp_path / "toy.jsonl")
        assert len(judge.requests) == 1


OVERLOADED = {"id": "gen-1", "error": {"message": "Upstream error: overloaded", "code": 429}}


def test_an_error_in_a_response_of_status_200_is_retried(tmp_path: Path) -> None:
    with serving(Judge([(200, {}, OVERLOADED), (200, {}, {"error": "overloaded"})])) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl", count=1)
    assert found.labels == ["hallucination"]
    assert [PROMPTS.texts["reminder"] in str(request) for request in judge.requests] == [False] * 3
    assert found.client.usage == {"requests": 3, "prompt_tokens": 7, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("status", "error", "message", "requests"),
    [
        (200, {"message": "bad key", "code": 401}, "wants a key in OPENAI_API_KEY", 1),
        (200, {"message": "no such model", "code": 404}, "no such model", 1),
        (402, {"message": "no credit"}, "no credit", 1),
        (429, {"message": "You exceeded your quota", "code": "insufficient_quota"}, "You exceeded your quota", 1),
        (200, OVERLOADED["error"], r"no reply to 10 requests in a row \(status 429: 'Upstream error", 20),
    ],
    ids=["key", "model", "credit", "quota", "overloaded"],
)
def test_what_no_retry_mends_ends_it(status: int, error: dict, message: str, requests: int, tmp_path: Path) -> None:
    with serving(Judge(server=lambda path, body: (status, {}, {"error": error}))) as judge:
        with pytest.raises(Unavailable, match=message):
            Judged(judge.url, tmp_path / "toy.jsonl", count=20, tries=2)
        assert len(judge.requests) == requests


def wrapped(**changes: Any) -> Any:
    """A change of a completion's message, or of its choice for finish_reason."""

    def reply(completion: dict[str, Any]) -> None:
        choice = completion["choices"][0]
        choice |= {key: value for key, value in changes.items() if key == "finish_reason"}
        choice["message"] |= {key: value for key, value in changes.items() if key != "finish_reason"}

    return reply


@pytest.mark.parametrize(
    ("reply", "reason", "shown", "requests"),
    [
        (wrapped(content="It is red."), "malformed replies on 10 cases", "not JSON: 'It is red.'", 20),
        (wrapped(content=None, reasoning_content="Let me look at", finish_reason="length"),
         "malformed replies on 10 cases", "cut off after 64 tokens, --max-tokens must be larger: 'Let me look", 20),
        (wrapped(content=None), "malformed replies on 10 cases", r"empty: '\(empty\)'", 20),
        (wrapped(content=None, refusal="I cannot"), "no reply to 10", "declined by the model .*: 'I cannot'", 10),
        (wrapped(content=[{"type": "refusal", "refusal": "I cannot"}]),
         "no reply to 10", "declined by the model .*: 'I cannot'", 10),
        (wrapped(content="", finish_reason="content_filter"), "no reply to 10", "declined by the model or its", 10),
    ],
    ids=["prose", "cut-off", "empty", "refusal", "refusal-part", "filter"],
)  # fmt: skip
def test_a_model_that_never_answers_is_given_up(
    reply: Any, reason: str, shown: str, requests: int, tmp_path: Path
) -> None:
    with serving(Judge(reply=reply)) as judge:
        with pytest.raises(Unavailable, match=rf"{reason}.* in a row \({shown}"):
            Judged(judge.url, tmp_path / "toy.jsonl", count=40)
        assert len(judge.requests) == requests


def test_failures_in_a_row_are_counted_anew_after_a_verdict(tmp_path: Path) -> None:
    bad = ["malformed"] * 18
    with serving(Judge([*bad, "ok", *bad, "ok"])) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl", count=20)
    assert found.reasons == {"malformed reply, not JSON": 18}
    assert [label is None for label in found.labels] == ([True] * 9 + [False]) * 2
    assert found.client.usage == {"requests": 38, "prompt_tokens": 38 * 7, "completion_tokens": 38 * 3}


def test_more_tokens(tmp_path: Path) -> None:
    with serving(Judge(server=refusing("max_tokens", MAX_TOKENS))) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl", max_tokens=2048)
    assert [request.get("max_tokens") for request in judge.requests] == [2048] + [None] * 4
    assert judge.requests[-1]["max_completion_tokens"] == 2048
    assert found.parameters == [{"max_completion_tokens": 2048, "max_tokens": None}]


def test_replies_without_a_count_are_counted(tmp_path: Path) -> None:
    with serving(Judge(reply=lambda completion: completion.pop("usage") and None)) as judge:
        found = Judged(judge.url, tmp_path / "toy.jsonl")
    assert found.client.usage == {"requests": 4, "uncounted_replies": 4}
    assert {str(json.loads(line)["tokens"]) for line in (tmp_path / "toy.jsonl").read_text().splitlines()} == {"{}"}


def test_a_key_with_a_line_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")
    with serving(Judge()) as judge:
        Judged(judge.url, tmp_path / "toy.jsonl", count=1)
    assert judge.keys == ["Bearer secret"]
    monkeypatch.setenv("OPENAI_API_KEY", "sécret")
    with pytest.raises(UserError, match="OPENAI_API_KEY has characters") as error:
        Client("http://127.0.0.1:1/v1")
    assert not re.search("s.cret", str(error.value))


def test_an_answer_that_is_a_verdict_is_not_taken_for_the_judge_s(tmp_path: Path) -> None:
    quoted = '{"follows_instruction": true, "consistent": true}'
    reply = wrapped(content=f"The answer {quoted} is no color.")
    with serving(Judge(reply=reply)) as judge, Client(judge.url, "toy") as client:
        verdicts = Verdicts(tmp_path / "toy.jsonl", PROMPTS, "toy")
        keyed = asking.keys([case(quoted), case("red", 1)], verdicts)
        reasons = asking.judge(keyed, verdicts, client, PROMPTS, 1)
        verdicts.close()
    assert [*reasons.values()] == ["malformed reply, not the JSON object alone"]
