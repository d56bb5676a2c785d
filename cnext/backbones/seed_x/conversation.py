"""Token ids, labels and position roles of a SEED-X sample."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.seed_x.sizes import TOKENS
from cnext.backbones.seed_x.tokenizer import BEGIN, END, Tokenizer
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn

PHRASES = (
    "",
    "Of course, here it is.",
    "Gladly! This is my picture.",
    "Here is what I have drawn.",
    "This is the image that you asked for.",
    "I hope that it looks as you imagined.",
    "Certainly. Have a look.",
    "With pleasure.",
    "The picture is ready.",
    "I have made this for you.",
    "Let me show you.",
    "This is how I see it.",
    "Done! Here comes the image.",
    "As you wish.",
    "See whether this is right.",
    "No problem, one moment.",
    "This should match your words.",
    "I tried to keep to your description.",
    "Here you are.",
    "My result is below.",
    "I am happy to help with that.",
)
"""Text before an image in training, for samples without a response of their own."""


@dataclass(frozen=True)
class TokenizedSample:
    """ids, labels (IGNORED where there is no target) and roles (see `Backbone.positions`), equally long."""

    ids: list[int]
    labels: list[int]
    roles: list[int]


def phrase(sample: Sample) -> str:
    """Text before the sample's target image: its answer, or else one of `PHRASES`, by a hash, see `Sample.draw`."""
    answer = sample.turns[0].answer
    if answer or sample.draw is None:
        return answer
    digest = hashlib.sha256((sample.draw or sample.id).encode()).digest()
    return PHRASES[int.from_bytes(digest[:8], "big") % len(PHRASES)]


def _instruction(tokenizer: Tokenizer, turn: Turn, views: int, image_first: bool) -> list[int]:
    """Ids of "[INST] image instruction [/INST]" and a line feed, or with the image after the instruction."""
    before, after = "[INST] ", " [/INST]\n"
    if not views:
        return tokenizer.encode(before + turn.instruction + after)
    image = tokenizer.picture(views)
    if image_first:
        return tokenizer.encode(before, image, turn.instruction + after)
    return tokenizer.encode(before + turn.instruction, image, after)


def question(tokenizer: Tokenizer, sample: Sample, views: int) -> TokenizedSample:
    """The first instruction alone; its last position predicts the first token of the answer."""
    ids = [BEGIN, *_instruction(tokenizer, sample.turns[0], views, sample.image_first)]
    labels = [IGNORED] * len(ids)
    return TokenizedSample(ids, labels, [*_roles(tokenizer, ids, labels)[:-1], TEXT_WRITTEN])


def conversation(
    tokenizer: Tokenizer, sample: Sample, views: int, *, end_every_turn: bool = False, max_length: int = 880
) -> TokenizedSample:
    """All turns of a sample. Supervised are the answers and the last token, </s>; of a target image the text before it,
    ``<img>`` and </s>.

    Args:
        views: number of views of the image that is read; 0 without one.
        end_every_turn: whether </s> follows every answer, and not only the last, as released.
        max_length: most tokens; longer text is truncated.

    Raises:
        UserError: truncation would leave no answer, or part of an image.
    """
    ids, labels, whole = untruncated(tokenizer, sample, views, end_every_turn)
    if whole >= max_length:
        raise UserError(
            f"{sample.origin or sample.id}: expected less than {max_length} tokens before the answer, images "
            f"included, found {whole}; leave the sample out, or raise the backbone's max_length"
        )
    roles = _roles(tokenizer, ids, labels)
    return TokenizedSample(ids[:max_length], labels[:max_length], roles[:max_length])


def longest(tokenizer: Tokenizer, sample: Sample) -> Sample:
    """A sample with the longest phrase, in tokens, of those that may be drawn."""
    if "phrase" not in sample.redraws:
        return sample
    (first, *more) = sample.turns
    return replace(sample, turns=(replace(first, answer=_longest_phrase(tokenizer)), *more))


@functools.cache
def _longest_phrase(tokenizer: Tokenizer) -> str:
    return max(PHRASES, key=lambda text: len(tokenizer.encode(text)))


def untruncated(
    tokenizer: Tokenizer, sample: Sample, views: int, end_every_turn: bool
) -> tuple[list[int], list[int], int]:
    """All ids and labels of a `conversation`, and how many must not be cut off."""
    ids = [BEGIN, *_instruction(tokenizer, sample.turns[0], views, sample.image_first)]
    labels = [IGNORED] * len(ids)
    whole = len(ids)
    if sample.target_image:
        answer = tokenizer.encode(phrase(sample), tokenizer.picture(1))
        ids += answer
        labels += [*answer[: -TOKENS - 1], *[IGNORED] * (TOKENS + 1)]
        whole = len(ids)
    else:
        for number, turn in enumerate(sample.turns):
            if number:
                user = tokenizer.encode(f"\n[INST] {turn.instruction} [/INST]\n")
                ids += user
                labels += [IGNORED] * len(user)
            answer = tokenizer.encode(turn.answer)
            if end_every_turn and number + 1 < len(sample.turns):
                answer.append(END)
            ids += answer
            labels += answer
    return [*ids, END], [*labels, END], whole


def _roles(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The role of each position. Image tokens are read before the first label and written after it; text is written
    where a position holds or predicts a supervised token."""
    slots = set(tokenizer.slots)
    answer = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
    roles = []
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token in slots:
            roles.append(IMAGE_READ if index < answer else IMAGE_WRITTEN)
        else:
            following = labels[index + 1] if index + 1 < len(labels) else IGNORED
            roles.append(TEXT_READ if label == following == IGNORED else TEXT_WRITTEN)
    return roles
