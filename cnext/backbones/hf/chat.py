"""Texts of samples by a model's chat template, and which characters of them are answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn

PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token + '\n' if message['role'] == 'assistant' else '\n' }}{% endfor %}"
)
"""Template of a text model that has none: each instruction and each answer on a line, an end token after an answer."""
MARK = "\ue000{}\ue001"
"""Stands for the answer of a turn while the template is rendered, which may trim or repeat what it is given."""
_MARKS = re.compile("\ue000(\\d+)\ue001")


class Conversation(NamedTuple):
    """text: up to the end of the last answer.  answers: (begin, end) of each in it, with its end token."""

    text: str
    answers: list[tuple[int, int]]


class Chat:
    """Renders samples by a chat template.

    An answer is supervised from the end of the generation prompt to the token that ends the turn in the template; where
    the template has none, the tokenizer's end token takes its place, as in the training of LLaVA.

    Args:
        renderer: processor or tokenizer with ``apply_chat_template``.
        tokenizer: its special tokens are those that a text may contain.
        parts: whether contents are lists of parts, as processors have them, or plain text.
        system: text of a system message; "": what the template puts there by itself.

    Raises:
        UserError: no template, or one that does not show an answer once.
    """

    def __init__(self, renderer: Any, tokenizer: Any, parts: bool, system: str = "") -> None:
        self.renderer, self.tokenizer, self.parts, self.system = renderer, tokenizer, parts, system
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no eos_token, which ends an answer; add it to tokenizer_config.json")
        self.special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special |= set(map(str, tokenizer.all_special_tokens))
        template = str(renderer.chat_template)
        # Qwen3 and others then answer at once, and show every answer as they do so.
        self._switches: dict[str, Any] = {"enable_thinking": False} if "enable_thinking" in template else {}
        probe = Sample("", (Turn("?"),))
        before, tail = self._pieces(probe)
        prompt = self._render(self._messages(probe, answered=False), True)
        lead = before.removeprefix(prompt)
        self._prompted = before.startswith(prompt) and not lead.strip()
        """Whether a question with its generation prompt is how the conversation begins, but for spaces."""
        self._lead = lead if self._prompted else before[len(before.rstrip(" ")) :]
        found = re.match(rf"\s*({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})", tail)
        self._tail = found[0] if found else ""
        self._blank = "" if found else tail[: len(tail) - len(tail.lstrip())]
        self.end = found[1] if found else tokenizer.eos_token
        """The token that ends an answer."""
        shown = Sample("", (Turn("?"), Turn("?")), Path("image") if parts else None)
        structure = self._render(self._messages(shown), True)
        names = ("bos_token", "eos_token", "pad_token", "image_token", "video_token", "audio_token")
        fixed = {getattr(one, name, None) for name in names for one in (tokenizer, renderer)} | {self.end}
        self.reserved = {token for token in self.special if token in fixed or token in structure}
        """Special tokens that would change the structure of a conversation if they were in a text."""

    def question(self, sample: Sample) -> str:
        """The first instruction, up to where its answer begins."""
        asked = Sample("", sample.turns[:1], sample.image, image_first=sample.image_first)
        if self._prompted:
            return self._render(self._messages(asked, answered=False), True)
        return self._pieces(asked)[0].removesuffix(self._lead)

    def conversation(self, sample: Sample) -> Conversation:
        """All turns. Raises UserError for a text with a reserved token, or a conversation that the template refuses."""
        self.check(sample)
        text, *pieces = self._pieces(sample)
        answers = []
        for turn, piece in zip(sample.turns, pieces, strict=True):
            begin = len(text.removesuffix(self._lead))
            ended = self._tail and piece.startswith(self._tail)
            text += turn.answer.strip() + (self._tail if ended else self.tokenizer.eos_token)
            answers.append((begin, len(text)))
            text += piece.removeprefix(self._tail if ended else self._blank)
        return Conversation(text[: answers[-1][1]], answers)

    def check(self, sample: Sample) -> None:
        """Raises UserError for a text with a reserved token."""
        for text in (text for turn in sample.turns for text in (turn.instruction, turn.answer)):
            if found := [token for token in self.reserved if token in text]:
                raise UserError(
                    f"sample {sample.origin or sample.id} has {min(found)} in its text, which the model's tokenizer "
                    "takes for the end or beginning of a part of the conversation; write it in another way"
                )

    def _pieces(self, sample: Sample) -> list[str]:
        """What the template writes before, between and after the answers."""
        text, *found = _MARKS.split(self._render(self._messages(sample), False))
        if found[::2] != [str(index) for index in range(len(sample.turns))]:
            raise UserError(
                f"the chat template shows {len(found[::2])} of the {len(sample.turns)} answers of a conversation; "
                "expected each once, in order: name another by --backbone-options chat_template=FILE"
            )
        return [text, *found[1::2]]

    def _messages(self, sample: Sample, answered: bool = True) -> list[dict[str, Any]]:
        messages = [self._message("system", self.system)] if self.system else []
        for index, turn in enumerate(sample.turns):
            image = sample.image is not None and index == 0
            messages.append(self._message("user", turn.instruction.strip(), image, sample.image_first))
            if answered:
                messages.append(self._message("assistant", MARK.format(index)))
        return messages

    def _message(self, role: str, text: str, image: bool = False, first: bool = True) -> dict[str, Any]:
        if not self.parts:
            return {"role": role, "content": text}
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if image:
            content.insert(0 if first else 1, {"type": "image"})
        return {"role": role, "content": content}

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.renderer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **self._switches
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"the model's chat template refuses a conversation: {error}\nname another by --backbone-options "
                "chat_template=FILE"
            ) from error
