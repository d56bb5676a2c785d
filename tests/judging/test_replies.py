"""What a reply says: verdicts in the forms in which models and servers return them, and none where it is unclear."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from typing import Any

import pytest

from cnext.judging.replies import Malformed, Reply, ServerError, parse, read

VERDICT = '{"follows_instruction": true, "consistent": false}'
OTHER = '{"follows_instruction": true, "consistent": true}'


@pytest.mark.parametrize(
    "content",
    [
        VERDICT,
        f"\ufeff {VERDICT} ",
        f"```json\n{VERDICT}\n```",
        f"```\n{VERDICT}\n```",
        f"```JSON {VERDICT}```",
        f"Here is my verdict:\n{VERDICT}",
        f"My verdict {{as asked}}:\n```json\n{VERDICT}\n```\nThe color is wrong.",
        f"{VERDICT}\n\nThe answer {{red}} is of the form asked for.",
        f"<think>\nA word.\n</think>\n\n{VERDICT}",
        f"<think>Perhaps {OTHER}. No.</think>{VERDICT}",
        f"<think></think><think>Perhaps {OTHER}.</think>{VERDICT}",
        f"<Thinking>A {{ in it</Thinking>```json\n{VERDICT}\n```",
        f"[THINK]Perhaps {OTHER}.[/THINK]{VERDICT}",
        f"◁think▷Perhaps {OTHER}.◁/think▷{VERDICT}",
        f"The answer is a word.\n</think>\n{VERDICT}",
        f"<|channel|>analysis<|message|>A word.<|end|><|start|>assistant<|channel|>final<|message|>{VERDICT}",
        '{"reason": "red is not {blue}", "follows_instruction": true, "consistent": false}',
        '{"follows_instruction": true, "consistent": false, "scores": {"a": 1}, "label": null}',
        '{"follows_instruction": "true", "consistent": "False"}',
        "{'follows_instruction': True, 'consistent': False}",
        '{"follows_instruction": True, "consistent": False}',
        '{"follows_instruction": true, "consistent": false,}',
        '{"reason": "it says "red"", "follows_instruction": true, "consistent": false}',
        f'{{"verdict": {VERDICT}}}',
        f"[{VERDICT}]",
        f"{VERDICT}\n{VERDICT}",
        f"{OTHER}</think>{VERDICT}",
        f"Perhaps {OTHER}? No.\n</think>\n\n```json\n{VERDICT}\n```",
        f"Perhaps {OTHER}.[/THINK]{VERDICT} The color is wrong.",
        f"Perhaps.</think>Or {OTHER}.</think>{VERDICT}",
        f"I begin. <think>Perhaps {OTHER}.</think>{VERDICT}",
        '{"Follows_Instruction": true, "CONSISTENT": false}',
        '{"follows instruction": true, "consistent": false}',
        '{"followsInstruction": true, " consistent ": false}',
        '{"follows-instruction": true, "Consistent": false}',
        '{"follows_instruction": "yes", "consistent": "no"}',
        '{"follows_instruction": "Yes", "consistent": " NO "}',
        '{"follows_instruction": 1, "consistent": 0}',
        '{"follows_instruction": "1", "consistent": "0"}',
        "{'Follows instruction': Yes, 'Consistent': No}",
        '{"follows_instruction": true, "consistent": false, "consistent": false}',
        '{"follows_instruction": true, "Follows instruction": "yes", "consistent": 0, "consistent": "false"}',
        "{'follows_instruction': True, 'consistent': False, 'consistent': False}",
    ],
)
def test_a_verdict_is_understood(content: str) -> None:
    assert parse(content) == Reply(True, False)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "empty"),
        ("true", "not JSON"),
        ("[]", "not JSON"),
        ("follows_instruction: true, consistent: false", "not JSON"),
        ("{}", "not the two booleans asked for"),
        ('{"follows_instruction": true}', "not the two booleans asked for"),
        ('{"follows_instruction": true, "consistent": null}', "not the two booleans asked for"),
        ('{"follows_instruction": true or false, "consistent": true or false}', "not the two booleans asked for"),
        ('{"follows_instruction": "yes", "consistent": "partly"}', "not the two booleans asked for"),
        ('{"follows_instruction": "yes or no", "consistent": "no"}', "not the two booleans asked for"),
        ('{"follows_instruction": 2, "consistent": 0}', "not the two booleans asked for"),
        ('{"follows_instruction": 0.5, "consistent": 0}', "not the two booleans asked for"),
        ('{"follows_instruction": [true], "consistent": [false]}', "not the two booleans asked for"),
        ('{"Follows instruction": true, "consistent": true, "Consistent": false}', "not the two booleans asked for"),
        ('{"follows_instruction": true, "consistent": true, "consistent": null}', "not the two booleans asked for"),
        ('{"follows_instruction": true, "consistent": true, "consistent": false}', "not the two booleans asked for"),
        ("{'follows_instruction': True, 'consistent': True, 'consistent': False}", "not the two booleans asked for"),
        ('{"follows_instruction": true}{"consistent": true}', "not the two booleans asked for"),
        (VERDICT[:-1], "not JSON"),
        (f"<think>Perhaps {VERDICT}", "empty"),
        (f"<think>Perhaps {VERDICT}</think>", "empty"),
        (f"{VERDICT} or rather {OTHER}", "several verdicts that differ"),
        (f"Perhaps {VERDICT}</think>", "empty"),
        (f"{VERDICT}</think>{VERDICT} or rather {OTHER}", "several verdicts that differ"),
        ("[" * 100_000, "not JSON"),
        ("{" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
    ids=range(27),
)
def test_no_verdict_is_guessed(content: str, why: str) -> None:
    with pytest.raises(Malformed) as error:
        parse(content)
    assert error.value.reason == why
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("quoted", [OTHER, "{'follows_instruction': True, 'consistent': True}", f"red {OTHER} {{"])
def test_a_verdict_that_is_quoted_from_the_answer_does_not_count(quoted: str) -> None:
    with pytest.raises(Malformed, match="not the JSON object alone"):
        parse(f"The answer {quoted} is no color.", quoted)
    with pytest.raises(Malformed, match="several verdicts that differ"):
        parse(f"The answer {quoted} is no color: {VERDICT}", quoted)
    for alone in (VERDICT, f"```json\n{VERDICT}\n```", f"<think>It says {quoted}.</think>{VERDICT}"):
        assert parse(alone, quoted) == Reply(True, False)


@pytest.mark.parametrize("mark", ["</think>", "[/THINK]", "red </Reasoning>"])
def test_the_end_of_reasoning_may_be_quoted_from_the_answer(mark: str) -> None:
    quoted = f"{mark}{OTHER}"
    with pytest.raises(Malformed, match="several verdicts that differ"):
        parse(f"{VERDICT} The answer is {quoted}", quoted)


def completion(message: dict[str, Any], **choice: Any) -> dict[str, Any]:
    return {"model": "served", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": VERDICT},
        {"content": [{"type": "text", "text": VERDICT}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": OTHER}]},
                     {"type": "text", "text": VERDICT[:9]}, {"type": "text", "text": VERDICT[9:]}]},
        {"content": [{"type": "output_text", "text": VERDICT}]},
        {"content": None, "reasoning_content": VERDICT},
        {"content": "", "reasoning": f"So it is {VERDICT}"},
        {"content": " \n", "reasoning_content": VERDICT},
        {"reasoning_content": VERDICT},
        {"content": VERDICT, "reasoning_content": OTHER},
        {"content": VERDICT, "refusal": None, "tool_calls": None},
        {"content": None, "tool_calls": [{"type": "function", "function": {"name": "judge", "arguments": VERDICT}}]},
        {"content": "", "tool_calls": [{"function": {"arguments": json.loads(VERDICT)}}], "reasoning": OTHER},
        {"content": "I call it.", "tool_calls": [{"function": {"name": "judge", "arguments": VERDICT}}]},
        {"content": VERDICT, "tool_calls": [{"function": {"name": "judge", "arguments": VERDICT}}]},
        {"content": VERDICT, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}, {"function": None}, 3]},
        {"content": VERDICT, "tool_calls": "none"},
        {"tool_calls": [], "function_call": {"name": "judge", "arguments": VERDICT}},
    ],
)  # fmt: skip
def test_the_text_of_a_message(message: dict[str, Any]) -> None:
    found = read(json.dumps(completion(message)), {})
    assert parse(found.content) == Reply(True, False)
    assert (found.served, found.refusal, found.tokens) == ("served", "", {})


def test_the_first_of_several_choices_counts() -> None:
    body = completion({"content": VERDICT})
    body["choices"] += completion({"content": OTHER})["choices"]
    assert read(json.dumps(body), {}).content == VERDICT


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        (
            {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
            {"prompt_tokens": 7, "completion_tokens": 3},
        ),
        ({"prompt_tokens": 7}, {"prompt_tokens": 7}),
        ({"prompt_tokens": "7", "completion_tokens": None}, {}),
        ({"prompt_tokens": -7, "completion_tokens": 3.5}, {}),
        (None, {}),
        ([], {}),
    ],
)
def test_tokens_are_those_that_the_server_counts(usage: Any, tokens: dict[str, int]) -> None:
    assert read(json.dumps(completion({"content": VERDICT}) | {"usage": usage}), {}).tokens == tokens


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"id": "gen-1", "error": {"message": "overloaded", "code": 429}}, 429, "overloaded"),
        ({"error": {"message": "overloaded", "code": "503"}, "choices": None}, 503, "overloaded"),
        ({"error": {"message": "overloaded", "code": "rate_limit_exceeded"}}, 500, "overloaded"),
        ({"error": "overloaded"}, 500, "overloaded"),
        ({"object": "error", "message": "overloaded", "code": 400}, 400, "overloaded"),
        ({"detail": "overloaded"}, 500, "overloaded"),
        (completion({"content": ""}, error={"message": "overloaded", "code": 502}), 502, "overloaded"),
        (completion({"content": "over"}, finish_reason="error"), 500, "over error"),
    ],
)
def test_an_error_in_a_response_of_status_200(body: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(ServerError) as error:
        read(json.dumps(body), {"retry-after": "2"})
    assert (error.value.status, error.value.retry_after) == (status, 2.0)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "body",
    ["", "<!doctype html><title>Chat</title>", "[]", "3", "{}", '{"choices": []}', '{"choices": {}}',
     '{"choices": [3]}', '{"choices": [{"text": "x"}]}', "[" * 100_000, 'data: {"choices": []}'],
    ids=range(11),
)  # fmt: skip
def test_what_is_no_completion_is_malformed(body: str) -> None:
    with pytest.raises(Malformed, match="no chat completion"):
        read(body, {})


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({}, 0, 0),
        ({"retry-after": "7"}, 7, 7),
        ({"retry-after": "7", "retry-after-ms": "1500"}, 1.5, 1.5),
        ({"retry-after": formatdate(0, usegmt=True)}, 0, 0),
        ({"retry-after": "soon"}, 0, 0),
        ({"retry-after": "-3"}, 0, 0),
        ({"retry-after": "1e9"}, 600, 600),
    ],
)
def test_the_wait_that_a_server_asks_for(headers: dict[str, str], least: float, most: float) -> None:
    with pytest.raises(ServerError) as error:
        read('{"error": "overloaded"}', headers)
    assert least <= error.value.retry_after <= most


def test_the_wait_until_a_date() -> None:
    with pytest.raises(ServerError) as error:
        read('{"error": "overloaded"}', {"retry-after": formatdate(time.time() + 300, usegmt=True)})
    assert 200 < error.value.retry_after <= 300
