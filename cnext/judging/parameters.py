"""The parameters of a request, in the form that one server takes."""

from __future__ import annotations

import re
from threading import Lock
from typing import Any

from cnext.judging.requests import PARAMETERS

# What messages call each of them.
_NAMES = {
    "response_format": r"response.?format|json.?schema|json.?object|structured.?output|guided|grammar",
    **{name: rf"\b{name}\b" for name in ("max_tokens", "temperature", "top_p", "seed")},
}
_TOO_LONG = re.compile(r"too (large|long|many|high)|context|exceed|at most|at least|range|greater|less than", re.I)
"""A refusal of a number of tokens, as opposed to one of the parameter."""


def changes(sent: dict[str, Any]) -> dict[str, Any]:
    """What is sent in place of the parameters of the prompts' version; None for what is left out."""
    names = sorted(PARAMETERS.keys() | sent.keys())
    return {name: sent.get(name) for name in names if sent.get(name) != PARAMETERS.get(name)}


class Parameters:
    """The parameters of requests to a server; thread-safe. One that it refuses gives way to its next form.

    sent: those of the next request; a new dictionary after each change.
    """

    def __init__(self, max_tokens: int) -> None:
        self.sent: dict[str, Any] = PARAMETERS | {"max_tokens": max_tokens}
        self._forms: dict[str, list[dict[str, Any]]] = {
            "response_format": [{"response_format": {"type": "json_object"}}, {}],
            "max_tokens": [{"max_completion_tokens": max_tokens}],
            **{name: [{}] for name in ("temperature", "top_p", "seed")},
        }
        self._lock = Lock()

    def give_way(self, sent: dict[str, Any], refusal: str) -> str | None:
        """Replaces the parameter that a server's refusal names.

        Args:
            sent: the parameters of the request that it refused.

        Returns:
            What is sent from now on, "" where another thread has replaced it already, None where nothing is replaced.
        """
        with self._lock:
            if sent is not self.sent:
                return ""
            name = self._named(refusal)
            if name is None:
                return None
            form = self._forms[name].pop(0)
            self.sent = {key: value for key, value in sent.items() if key != name} | form
            texts = [f"{key} {value['type'] if isinstance(value, dict) else value}" for key, value in form.items()]
            return " ".join(texts) or f"no {name}"

    def _named(self, refusal: str) -> str | None:
        """The parameter that a refusal names first and that has another form."""
        found = {
            name: match.start()
            for name, pattern in _NAMES.items()
            if name in self.sent and self._forms[name] and (match := re.search(pattern, refusal, re.I))
        }
        if _TOO_LONG.search(refusal):
            found.pop("max_tokens", None)
        return min(found, key=lambda name: found[name], default=None)
