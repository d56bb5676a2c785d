"""Generation of SEED-X against a loop without cache, and with a head of fixed output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from backbones.seed_x.unbatched import TASKS, asked, hidden_of
from torch import Tensor, nn
from torch.nn import functional as F

from cnext.backbones.conversation import IMAGE_WRITTEN, TEXT_WRITTEN
from cnext.backbones.seed_x.conversation import question
from cnext.backbones.seed_x.model import SeedX
from cnext.tasks.base import Sample, Turn

# diffusers turns a tensor into an array in a way that numpy 2 announces to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Dictated(nn.Module):
    """A head that wants the given tokens, one column after another, and then </s>; rows in the batch's order."""

    def __init__(self, rows: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.rows, self.step, self.vocabulary = rows, 0, vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        wanted = torch.tensor([row[self.step] if self.step < len(row) else 2 for row in self.rows])
        self.step += 1
        return F.one_hot(wanted, self.vocabulary).float()


def test_an_answer_has_the_text_as_released_where_it_differs(fresh: SeedX, tasks: dict[str, list[Sample]]) -> None:
    token, asks = fresh.tokenizer, [asked(sample) for sample in tasks["VQAv2"]]
    fresh.llm.lm_head = Dictated([token.encode("dog < red"), token.encode("dog")], len(token))
    first, second = fresh.generate(asks, 20)
    assert (first.text, first.released_text, first.as_released) == ("dog < red", "dog", "dog")
    assert (second.text, second.released_text, second.as_released) == ("dog", None, "dog")


@torch.no_grad()
def test_an_image_once_begun_is_completed(fresh: SeedX, tasks: dict[str, list[Sample]]) -> None:
    """The second row begins a picture as its second token; the third wants the tokens of one unbidden, and gets
    others; states are those of the whole sequence in one pass."""
    token = fresh.tokenizer
    samples = [asked(tasks["VQAv2"][0]), asked(tasks["HQEdit"][0]), asked(tasks["Flickr30k"][0])]
    red = token.model.encode("red")[0]
    chain = token.picture(1)
    fresh.llm.lm_head = Dictated([[red, 2], [red, chain[0]] + [2] * 65 + [red], [*chain[1:], 2]], len(token))
    prompts = fresh.encode_prepared([replace(fresh.prepare(sample).question, target=None) for sample in samples])
    seen: list[Tensor] = []
    fresh.llm.model.register_forward_pre_hook(lambda *_: seen.append(fresh.positions))
    written = fresh._answers(prompts, 100)
    assert written[0].ids == [red, 2]
    assert written[0].states is None
    assert written[1].ids == [red, *chain, red, 2]
    assert not set(written[2].ids) & set(chain[1:])
    # The prompt, then each token as it is fed: red, <img>, the 64, </img>.
    roles = torch.cat([positions[1] for positions in seen])[-68:]
    assert roles.tolist() == [TEXT_WRITTEN] * 2 + [IMAGE_WRITTEN] * 64 + [TEXT_WRITTEN] * 2
    whole = torch.cat([prompts[1].ids, torch.tensor([red, *chain])])
    item = replace(prompts[1], ids=whole)
    expected = hidden_of(fresh, item)[-65:-1]
    torch.testing.assert_close(written[1].states, expected, rtol=1e-3, atol=1e-4)
    # A picture that the limit cuts off is none.
    fresh.llm.lm_head = Dictated([[chain[0]]], len(token))
    assert fresh._answers(prompts[1:2], 65)[0].states is None
    fresh.llm.lm_head = Dictated([[chain[0]]], len(token))
    assert fresh._answers(prompts[1:2], 66)[0].states is not None


@torch.no_grad()
def test_generation_equals_a_loop_without_cache(loaded: SeedX, tasks: dict[str, list[Sample]]) -> None:
    """The cache and the padding on the left change no token."""
    samples = [asked(sample) for task in TASKS for sample in tasks[task][:1]]
    answers = loaded.generate(samples, 6)
    never = loaded.tokenizer.picture(1)[1:]
    for sample, answer in zip(samples, answers, strict=True):
        item = loaded.encode([sample])[0].question
        assert (
            item.ids.tolist()
            == question(loaded.tokenizer, sample, 0 if item.centres is None else len(item.centres)).ids
        )
        written: list[int] = []
        while len(written) < 6 and 2 not in written:
            longer = replace(item, ids=torch.cat([item.ids, torch.tensor(written, dtype=torch.long)]))
            logits = loaded.llm.lm_head(hidden_of(loaded, longer)[-1])
            logits[never] = -torch.inf
            written.append(int(logits.argmax()))
        assert loaded.tokenizer.decode(written) == answer.text
        assert answer.image is None


@pytest.mark.parametrize("edit_stage", ["first", "second"])
def test_all_tasks_are_answered_with_text_and_images(
    folder: Path, tasks: dict[str, list[Sample]], edit_stage: str
) -> None:
    model = SeedX.load(weights=folder, edit_stage=edit_stage, steps=1)
    samples = [asked(sample) for task in TASKS for sample in tasks[task][:1]]
    begin = model.tokenizer["<img>"]
    model.llm.lm_head = Dictated(
        [[begin] if task in ("Flickr30k", "HQEdit") else [2] for task in TASKS], len(model.tokenizer)
    )
    answers = model.generate(samples, 80)
    drawn = {task: answer.image for task, answer in zip(TASKS, answers, strict=True) if answer.image is not None}
    assert drawn.keys() == {"Flickr30k", "HQEdit"}
    assert all(image.shape == (16, 16, 3) and image.dtype == numpy.uint8 for image in drawn.values())
    assert (drawn["HQEdit"] != drawn["Flickr30k"]).any()
    assert model.generate([], 5) == []


def test_without_detokenizer_no_images_are_returned(folder: Path, tmp_path: Path) -> None:
    for name in ("seed_x_i", "QwenViT"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.warns(UserWarning, match="de-tokenizer"):
        model = SeedX.load(weights=tmp_path)
    model.llm.lm_head = Dictated(
        [[*model.tokenizer.model.encode("red"), model.tokenizer["<img>"]]], len(model.tokenizer)
    )
    answer = model.generate([Sample("", (Turn("draw"),))], 80)[0]
    assert (answer.text, answer.image) == ("red", None)
