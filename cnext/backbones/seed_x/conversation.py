"""A sample as token ids, what of them is supervised, and what each is for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
"""What is said before a picture in training, where the sample has no words of its own."""


@dataclass(frozen=True)
class Conversation:
    """ids, labels (IGNORED where nothing is supervised) and roles (rows of BRANCH_ROLES), equally long."""

    ids: list[int]
    labels: list[int]
    roles: list[int]


def phrase(sample: Sample) -> str:
    """What is said before the sample's picture: its answer, or else one of `PHRASES`, by a hash of its id."""
    digest = hashlib.sha256(sample.id.encode()).digest()
    return sample.turns[0].answer or PHRASES[int.from_bytes(digest[:8], "big") % len(PHRASES)]


def _asked(tokenizer: Tokenizer, turn: Turn, views: int, first: bool) -> list[int]:
    """Ids of "[INST] picture instruction [/INST]" and a line feed; the picture stands after unless first."""
    before, after = "[INST] ", " [/INST]\n"
    if not views:
        return tokenizer.encode(before + turn.instruction + after)
    picture = tokenizer.picture(views)
    if first:
        return tokenizer.encode(before, picture, turn.instruction + after)
    return tokenizer.encode(before + turn.instruction, picture, after)


def question(tokenizer: Tokenizer, sample: Sample, views: int) -> Conversation:
    """The first instruction alone, from whose last position the answer begins."""
    ids = [BEGIN, *_asked(tokenizer, sample.turns[0], views, sample.image_first)]
    labels = [IGNORED] * len(ids)
    return Conversation(ids, labels, [*_roles(tokenizer, ids, labels)[:-1], TEXT_WRITTEN])


def conversation(
    tokenizer: Tokenizer, sample: Sample, views: int, *, end_every_turn: bool = False, max_length: int = 880
) -> Conversation:
    """All turns of a sample. Supervised are the answers and the last token, </s>; of a picture to write its phrase,
    ``<img>`` and </s>.

    Args:
        views: of the image that is read; 0: none is.
        end_every_turn: whether </s> follows every answer, and not the last alone, as released.
        max_length: text is cut there.

    Raises:
        UserError: the cut would leave no answer, or part of a picture.
    """
    ids = [BEGIN, *_asked(tokenizer, sample.turns[0], views, sample.image_first)]
    labels = [IGNORED] * len(ids)
    whole = len(ids)
    if sample.target_image:
        picture = tokenizer.picture(1)
        answer = tokenizer.encode(phrase(sample), picture)
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
    ids.append(END)
    labels.append(END)
    if whole >= max_length:
        raise UserError(
            f"{sample.origin or sample.id}: expected less than {max_length} tokens before the answer, pictures "
            f"included, found {whole}; leave the sample out, or raise the backbone's max_length"
        )
    roles = _roles(tokenizer, ids, labels)
    return Conversation(ids[:max_length], labels[:max_length], roles[:max_length])


def _roles(tokenizer: Tokenizer, ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """What each position is for: tokens of images are read before the first label and written after it; text is
    written where a token is supervised, or the next one is."""
    slots = set(tokenizer.slots)
    begun = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
    roles = []
    for place, (index, label) in enumerate(zip(ids, labels, strict=True)):
        if index in slots:
            roles.append(IMAGE_READ if place < begun else IMAGE_WRITTEN)
        else:
            following = labels[place + 1] if place + 1 < len(labels) else IGNORED
            roles.append(TEXT_READ if label == following == IGNORED else TEXT_WRITTEN)
    return roles
