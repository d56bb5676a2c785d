"""The tokenizer against that of transformers 4.30, and labels and roles of conversations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from backbones.seed_x.released import ADDED, PIECES, TOKENIZER

from cnext.backbones.conversation import IGNORED, IMAGE_READ, IMAGE_WRITTEN, TEXT_READ, TEXT_WRITTEN
from cnext.backbones.seed_x.conversation import PHRASES, conversation, longest, phrase, question, untruncated
from cnext.backbones.seed_x.model import SeedX
from cnext.backbones.seed_x.tokenizer import Tokenizer
from cnext.errors import UserError
from cnext.tasks.base import Sample, Turn

VIEW = [f"<img_{number:05d}>" for number in range(64)]
PICTURE = "".join(["<img>", *VIEW, "</img>"])
TILE = "".join(["<patch>", *VIEW, "</patch>"])


def legacy_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """As the slow tokenizer of 4.30 goes about it: cut out the longest added token wherever one begins; strip what is
    beside one; give every remaining stretch to sentencepiece, which puts a space before it."""
    stretches, current, place = [], "", 0
    while place < len(text):
        token = max((name for name in ADDED if text.startswith(name, place)), key=len, default="")
        if token:
            stretches += [current, token]
            current = ""
        current += "" if token else text[place]
        place += len(token) or 1
    stretches.append(current)
    ids = []
    for number, stretch in enumerate(stretches):
        if number % 2:
            ids.append(PIECES + ADDED.index(stretch))
            continue
        stretch = stretch.lstrip() if number else stretch
        stretch = stretch.rstrip() if number + 1 < len(stretches) else stretch
        pieces = tokenizer.model.encode(stretch, out_type=str) if stretch else []
        ids += [tokenizer.model.piece_to_id(piece) for piece in pieces]
    return ids


@pytest.fixture(scope="module")
def tokenizer(loaded: SeedX) -> Tokenizer:
    return loaded.tokenizer


@pytest.mark.parametrize("views", [0, 1, 3], ids="{} views".format)
@pytest.mark.parametrize("first", [True, False], ids=["first", "after"])
@pytest.mark.parametrize("asked", ["What color?", " two  spaces ", "at <box_start> <loc-3><loc-12> <box_end> é\n"])
def test_ids_are_those_of_the_legacy_tokenizer(tokenizer: Tokenizer, views: int, first: bool, asked: str) -> None:
    sample = Sample("1", (Turn(asked, "red"),), Path("i") if views else None, image_first=first)
    image = TILE * (views - 1) + PICTURE if views else ""
    text = f"[INST] {image if first else ''}{asked}{'' if first else image} [/INST]\n"
    assert question(tokenizer, sample, views).ids == [1, *legacy_ids(tokenizer, text)]


def test_no_stray_space_stands_before_an_image(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("[INST] ", tokenizer.picture(1), "red [/INST]\n")
    begin = ids.index(tokenizer["<img>"])
    assert tokenizer.model.decode(ids[:begin]) == "[INST]"
    assert tokenizer.model.id_to_piece(ids[begin + 66]).startswith("▁")


def test_image_tokens_cannot_be_typed(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a <img> <img_00003> </s> <patch> <loc-7> b")
    assert [index for index in ids if index >= PIECES] == [tokenizer["<loc-7>"]]
    assert 2 not in ids


def test_decoding_leaves_out_added_tokens_and_markup(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the dog", tokenizer.picture(1)), *tokenizer.encode("is <b>red"), 2]
    assert tokenizer.decode(ids) == "the dog is red"


def test_markup_is_removed_as_released_while_the_end_is_spelled(tokenizer: Tokenizer) -> None:
    asked, drawn = tokenizer.encode("the dog < red"), tokenizer.encode("the dog < red", tokenizer.picture(1), "blue")
    for ids, text, released in (
        ([*asked, 2], "the dog < red", "the dog"),
        (asked, "the dog < red", "the dog < red"),
        ([*drawn, 2], "the dog < red blue", "the dog  blue"),
        ([*tokenizer.encode("the <b>dog"), 2], "the dog", "the dog"),
        ([*tokenizer.encode("the", [tokenizer["<loc-3>"]], "dog"), 0, 2], "the dog", "the  dog"),
    ):
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_as_released(ids) == released


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda added: added.pop("<loc-5>"), "found 329; missing <loc-5>"),
        (lambda added: added.update({"<pad>": PIECES + 330}), "found 331; not of SEED-X <pad>"),
        (lambda added: added.update({"<loc-5>": PIECES}), "each once"),
    ],
    ids=["too few", "too many", "an id twice"],
)
def test_other_added_tokens_are_refused(folder: Path, tmp_path: Path, change: object, message: str) -> None:
    shutil.copytree(folder / "seed_x_i" / TOKENIZER, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "added_tokens.json"
    added = json.loads(file.read_text())
    change(added)
    file.write_text(json.dumps(added))
    with pytest.raises(UserError, match=message):
        Tokenizer.from_folder(tmp_path / "tokenizer")


def supervised(tokenizer: Tokenizer, sample: Sample, views: int, **options: object) -> list[int]:
    return [label for label in conversation(tokenizer, sample, views, **options).labels if label != IGNORED]


def test_answers_of_all_turns_and_the_last_end_are_supervised(tokenizer: Tokenizer) -> None:
    sample = Sample("1", (Turn("what color", "red"), Turn("and now", "blue")), Path("i"))
    made = conversation(tokenizer, sample, 2)
    asked = legacy_ids(tokenizer, f"[INST] {TILE}{PICTURE}what color [/INST]\n")
    again = tokenizer.model.encode("\n[INST] and now [/INST]\n")
    red, blue = tokenizer.model.encode("red"), tokenizer.model.encode("blue")
    assert made.ids == [1, *asked, *red, *again, *blue, 2]
    unseen = [[IGNORED] * len(part) for part in ([1, *asked], again)]
    assert made.labels == [*unseen[0], *red, *unseen[1], *blue, 2]
    assert supervised(tokenizer, sample, 2, end_every_turn=True) == [*red, 2, *blue, 2]


def test_the_end_of_every_turn_is_an_option_of_loading(
    folder: Path, loaded: SeedX, tasks: dict[str, list[Sample]]
) -> None:
    (talk, _), every = tasks["VQAv2"], SeedX.load(weights=folder, end_every_turn=True)
    ends = [int((model.prepare(talk).labels == 2).sum()) for model in (loaded, every)]
    assert ends == [1, len(talk.turns)] == [1, 3]


@pytest.mark.parametrize("response", ["", "Sure, here."])
def test_phrase_begin_and_end_of_an_image_are_supervised(tokenizer: Tokenizer, response: str) -> None:
    sample = Sample("7", (Turn("draw", response),), None, Path("t"))
    before = response or phrase(sample)
    assert supervised(tokenizer, sample, 0) == [*tokenizer.model.encode(before), tokenizer["<img>"], 2]
    made = conversation(tokenizer, sample, 0)
    assert made.ids[-67:] == [*tokenizer.picture(1), 2]
    assert [role for role, index in zip(made.roles, made.ids, strict=True) if index in tokenizer.slots] == (
        [IMAGE_WRITTEN] * 64
    )


def test_phrases_drawn_anew_count_with_the_longest(tokenizer: Tokenizer) -> None:
    sample = Sample("1", (Turn("draw"),), None, Path("t"), redraws=("phrase",))
    drawn = [sample.drawn(f"0/HQEdit/{epoch}") for epoch in range(200)]
    assert {phrase(one) for one in drawn} == set(PHRASES)
    assert [phrase(one) for one in drawn] == [phrase(sample.drawn(f"0/HQEdit/{epoch}")) for epoch in range(200)]
    counts = [len(untruncated(tokenizer, one, 0, end_every_turn=False)[0]) for one in drawn]
    assert len(untruncated(tokenizer, longest(tokenizer, sample), 0, end_every_turn=False)[0]) == max(counts)
    assert longest(tokenizer, drawn[0]) == drawn[0]


def test_an_empty_response_may_be_the_phrase(tokenizer: Tokenizer) -> None:
    for number in range(40):
        sample = Sample(str(number), (Turn("draw"),), None, Path("t"), draw=None)
        assert supervised(tokenizer, sample, 0) == [tokenizer["<img>"], 2]


def test_phrases_depend_on_the_id_and_all_are_used() -> None:
    drawn = [phrase(Sample(str(number), (Turn("draw"),))) for number in range(400)]
    assert set(drawn) == set(PHRASES)
    assert drawn == [phrase(Sample(str(number), (Turn("paint"),))) for number in range(400)]


def test_roles(tokenizer: Tokenizer) -> None:
    """An edit: the source's tokens are read, the target's written; text is written from where its first token is
    given to its last; </img> gives the end and so writes, and the last position holds it."""
    made = conversation(tokenizer, Sample("1", (Turn("red", "blue"),), Path("s"), Path("t")), 2)
    before = len(tokenizer.model.encode("blue"))
    begin = len(made.ids) - 64 - 3 - before
    assert made.roles[begin:] == [TEXT_WRITTEN] * (before + 1) + [IMAGE_WRITTEN] * 64 + [TEXT_WRITTEN] * 2
    assert made.roles[begin - 1] == TEXT_WRITTEN
    assert made.roles[: begin - 1].count(IMAGE_READ) == 128
    assert set(made.roles[: begin - 1]) == {TEXT_READ, IMAGE_READ}


def test_long_text_is_truncated_and_images_never(tokenizer: Tokenizer) -> None:
    talk = tuple(Turn("what color", "red") for _ in range(40))
    whole = conversation(tokenizer, Sample("1", talk, Path("i")), 2, max_length=10_000)
    cut = conversation(tokenizer, Sample("1", talk, Path("i")), 2, max_length=300)
    assert cut.ids == whole.ids[:300]
    assert cut.labels == whole.labels[:300]
    edit = Sample("7", (Turn("red"),), Path("s"), Path("t"), origin="train.jsonl:4")
    length = len(conversation(tokenizer, edit, 2).ids)
    assert len(conversation(tokenizer, edit, 2, max_length=length).ids) == length
    with pytest.raises(UserError, match=rf"train.jsonl:4: expected less than {length - 1} tokens"):
        conversation(tokenizer, edit, 2, max_length=length - 1)
