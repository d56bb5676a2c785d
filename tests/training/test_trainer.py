"""Training a task: schedules, batches and micro-batches, workers, trained parameters, precision."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training.conftest import Make
from training.toy import copy_suite, rows

from cnext import methods, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.config.plan import loading_options, plan
from cnext.config.schedules import SCHEDULES
from cnext.distributed import collectives
from cnext.errors import UserError
from cnext.runs import checkpoint
from cnext.runs.run_folder import RunFolder
from cnext.tasks import formats, suites
from cnext.tasks.base import Recipe, Sample
from cnext.training.batches import Batches, Order
from cnext.training.precision import in_float32
from cnext.training.setup import load_backbone
from cnext.training.trainer import StepLog, TaskTrainer

PAPER = Recipe({"a": 3000}, learning_rate=1e-4, warmup_steps=125)


def samples(data: Path, name: str) -> list[Sample]:
    return formats.read_samples(suites.load("next-tiny").task(name), data, "train")


@pytest.mark.parametrize(
    ("step", "wanted"),
    [(0, 8e-7), (62, 1e-4), (1500, 5e-6), (2999, 9.96e-5)],
    ids=["first", "peak", "half", "last"],
)
def test_the_released_schedule_rises_again(step: int, wanted: float) -> None:
    """Rates of the released code's scheduler at optimizer steps 1, 63, 1501 and 3000."""
    assert SCHEDULES["released"](PAPER, step, 3000) == pytest.approx(wanted, rel=4e-3)


def test_the_cosine_schedule_ends_at_its_minimum() -> None:
    rates = [SCHEDULES["cosine"](PAPER, step, 3000) for step in range(3000)]
    assert rates[:125] == pytest.approx([1e-4 * (step + 1) / 125 for step in range(125)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[124:]))
    assert rates[-1] == pytest.approx(5e-6, rel=1e-3)
    assert rates[125 + (3000 - 125) // 2] == pytest.approx((1e-4 + 5e-6) / 2, rel=1e-3), "halfway"


def test_every_sample_once_per_epoch() -> None:
    order = Order(10, 4, ("seed",))
    drawn = [index for step in range(5) for index in order.indices(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert Order(10, 4, ("seed",)).indices(3) == drawn[12:16], "a step needs nothing but its number"


class Late(TinyBackbone):
    """The tiny backbone, but each batch is encoded when it is used, as with large backbones."""

    encodes_ahead = False


@pytest.mark.parametrize("kind", [TinyBackbone, Late], ids=["ahead", "when due"])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(data: Path, kind: type[TinyBackbone], workers: int) -> None:
    made = kind.load()
    given = samples(data, "HQEdit")
    batches = Batches(made, given, 6, ("seed",), workers)
    for step in (0, 1, 2, 5):
        expected = made.encode([given[index] for index in Order(len(given), 6, ("seed",)).indices(step)])
        found = batches.at(step, 7)
        assert len(found) == 6
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.ids, other.ids)
            torch.testing.assert_close(one.features, other.features)
            torch.testing.assert_close(one.target, other.target)


def test_epochs_are_counted_with_their_samples() -> None:
    order = Order(10, 4, ("seed",))
    assert [epoch for step in range(5) for _, epoch in order.places(step)] == [0] * 10 + [1] * 10
    assert [index for index, _ in order.places(2)] == order.indices(2)


class Told:
    """What `Batches` asks of a backbone: what a sample has been drawn to."""

    def __init__(self, encodes_ahead: bool) -> None:
        self.encodes_ahead = encodes_ahead

    def prepare(self, sample: Sample) -> tuple[str, bool, str | None]:
        return sample.id, sample.image_first, sample.draw

    def encode_prepared(self, prepared: list[tuple[str, bool, str | None]]) -> list[tuple[str, bool, str | None]]:
        return prepared


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "when due"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_anew_in_every_epoch(ahead: bool, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the seed, whatever the workers, the processes and the step that training goes on from. The rest stays."""
    redraws = [("image_first", "phrase"), ("phrase",), ("image_first",), (), ("image_first",)]
    given = [Sample(f"s{index}", (), redraws=names) for index, names in enumerate(redraws)]
    steps, size, seed = 16, 4, (0, "HQEdit")

    def drawn(start: int = 0, seed: tuple[object, ...] = seed) -> list[tuple[str, bool, str | None]]:
        batches = Batches(Told(ahead), given, size, seed, workers)
        return [one for step in range(start, steps) for one in batches.at(step, steps)]

    whole, places = drawn(), [place for step in range(steps) for place in Order(len(given), size, seed).places(step)]
    assert whole == [Told(ahead).prepare(given[index].drawn(f"0/HQEdit/{epoch}")) for index, epoch in places]
    for sample, names in zip(given, redraws, strict=True):
        mine = [one for one in whole if one[0] == sample.id]
        assert (len({first for _, first, _ in mine}) > 1) == ("image_first" in names)
        assert (len({draw for _, _, draw in mine}) > 1) == ("phrase" in names)
    assert drawn(5) == whole[5 * size :]
    assert drawn(seed=(1, "HQEdit")) != whole
    parts = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "shard", lambda listed, rank=rank: listed[rank::2])
        parts.append(drawn())
    assert [one for pair in zip(*parts, strict=True) for one in pair] == whole


def test_reading_samples_takes_no_random_numbers(data: Path) -> None:
    """A resumed run starts to read at another step, and must draw the same dropout masks."""
    batches = Batches(Late.load(), samples(data, "HQEdit"), 6, ("seed",))
    before = torch.get_rng_state()
    assert len(batches.at(1, 3)) == 6
    assert torch.equal(torch.get_rng_state(), before)


def trained(
    data: Path, recipe: Recipe, method: str = "mage-paper", task: str = "Flickr30k"
) -> tuple[dict[str, Tensor], StepLog]:
    tiny = TinyBackbone.load()
    made = methods.load(method)()
    tasks = [suites.load("next-tiny").task(name) for name in ("VQAv2", task)]
    made.setup(tiny, tasks, torch.Generator().manual_seed(0))
    for each in tasks:
        parameters = made.trainable(each)
        trainer = TaskTrainer(tiny, made, parameters, samples(data, each.name), recipe, 2, (0, each.name))
        made.before_task(parameters, 2, {})
        log = [trainer.train_step() for _ in range(2)][-1]
        trainer.finish()
    return {name: parameter.detach().clone() for name, parameter in made.adapter_parameters().items()}, log


@pytest.mark.parametrize("method", ["mage-paper", "ewc", "distillation", "prompt-pool"])
def test_micro_batches_give_the_batch(data: Path, method: str) -> None:
    """Parts of 3, 3 and 2 with different numbers of tokens: the mean is over all tokens, not over the parts' means."""
    # eps: Adam would make whole steps of gradients as small as what sums of other lengths differ by.
    recipe = Recipe({}, batch_size=8, learning_rate=1e-2, warmup_steps=1, eps=1e-5)
    whole, log = trained(data, recipe, method)
    parts, other = trained(data, replace(recipe, micro_batch_size=3), method)
    assert log.tokens == other.tokens
    # A penalty over samples is a mean over the parts, so its weight differs with their lengths.
    loose = method in ("distillation", "prompt-pool")
    for key in ("loss", "text_loss", "image_loss"):
        assert getattr(other, key) == pytest.approx(getattr(log, key), rel=0.05 if loose else 1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0.2 if loose else 1e-3, atol=3e-2 if loose else 2e-4)


def test_a_recipe_may_differ_by_task() -> None:
    recipe = suites.load("continual-next").budgets["paper"]
    edit, other = recipe.of("HQEdit"), recipe.of("VQAv2")
    assert (other.batch_size, other.micro_batch_size, other.warmup_steps) == (256, 16, 125)
    assert (edit.batch_size, edit.micro_batch_size, edit.warmup_steps) == (96, 6, 250)
    assert edit.steps == recipe.steps
    assert (recipe.precision, recipe.trainable, recipe.schedule) == ("bfloat16", "connections", "cosine")
    as_released = suites.load("continual-next").budgets["released"]
    assert (as_released.trainable, as_released.schedule) == ("released", "released")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": "all"}, "trainable of the budget 'all'"),
        ({"precision": "int8"}, "precision of the budget 'int8'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"by_task": {"a": {"eps": 1}}}, "field of the budget for a 'eps'"),
    ],
    ids=["trainable", "precision", "batch size", "by task"],
)
def test_bad_recipes_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe({}, **changes)


def test_flags_override_the_preset_for_every_task(config: Make, toy_suite: Path, tmp_path: Path) -> None:
    different = {"HQEdit": {"batch_size": 4, "warmup_steps": 2}}
    suite = str(copy_suite(toy_suite, tmp_path / "suite", by_task=different))
    made = plan(config(suite=suite)).recipe
    assert (made.of("HQEdit").batch_size, made.of("VQAv2").batch_size) == (4, 16)
    made = plan(config(suite=suite, batch_size=8)).recipe
    assert (made.of("HQEdit").batch_size, made.of("HQEdit").warmup_steps, made.of("VQAv2").batch_size) == (8, 2, 8)


@pytest.mark.parametrize("trainable", ["connections", "released"])
def test_connections_are_trained_if_a_recipe_says_so(
    config: Make, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change, nothing else of the model does, a resumed run has the same bits, and results count them."""
    shared = {"order": "VQAv2,HQEdit", "checkpoint_interval": 3, "trainable": trainable}
    whole = config(**shared)
    results = run(whole)
    tiny = TinyBackbone.load()
    expected = set(tiny.connections()) | (set(tiny.released_extras()) if trainable == "released" else set())
    counted = sum(tiny.get_parameter(name).numel() for name in expected)
    before = methods.load("mage")()
    before.setup(tiny, [suites.load("next-tiny").task("VQAv2")], torch.Generator().manual_seed(0))
    branches = sum(p.numel() for p in before.trainable(suites.load("next-tiny").task("VQAv2")).values())
    assert results["cost"]["trainable_params_by_task"]["VQAv2"] == branches + counted

    saved_there, _ = checkpoint.load(whole.folder / "checkpoints" / "2_HQEdit")
    original = TinyBackbone.load().state_dict()
    beside = {k.removeprefix("backbone."): v for k, v in saved_there["adapters"].items() if k.startswith("backbone.")}
    assert beside.keys() == expected
    assert not [name for name, value in beside.items() if torch.equal(value, original[name])], "all are trained"

    part, save, saved = config(**shared), RunFolder.save, []

    def stopping(*arguments: object) -> None:
        save(*arguments)
        saved.append(arguments)
        if len(saved) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(part)
    assert run(part) == results


@pytest.mark.parametrize("method", sorted(set(methods.modules()) - {"zero-shot"}))
def test_every_method_learns_in_bfloat16(data: Path, method: str) -> None:
    """The frozen model in bfloat16, what is trained in float32: near the loss that float32 gives, and it changes."""
    logs = []
    for dtype, precision in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        tiny = TinyBackbone.load(dtype=dtype)
        made = methods.load(method)(**({"router_steps": 1} if method == "mr-lora" else {}))
        task = suites.load("next-tiny").task("HQEdit")
        made.setup(tiny, [task], torch.Generator().manual_seed(0))
        parameters = made.trainable(task)
        assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
        recipe = Recipe({}, batch_size=4, learning_rate=1e-3, warmup_steps=1, precision=precision)
        given = samples(data, "HQEdit")
        trainer = TaskTrainer(tiny, made, parameters, given, recipe, 2, (0, "HQEdit"))
        before = [parameter.detach().clone() for parameter in parameters.values()]
        made.before_task(parameters, 2, {"HQEdit": given[: made.card.rehearsal]} if made.card.rehearsal else {})
        logs.append([trainer.train_step() for _ in range(2)])
        assert any(not torch.equal(old, new) for old, new in zip(before, parameters.values(), strict=True))
        trainer.finish()
    assert [log.loss for log in logs[1]] == pytest.approx([log.loss for log in logs[0]], rel=0.08)


def test_widening_keeps_the_values() -> None:
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    before = layer.weight.detach().clone()
    in_float32(dict(layer.named_parameters()))
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before.float())


def test_a_whole_run_in_bfloat16_with_checkpointing(config: Make) -> None:
    """It is as long as the same in float32, and near to it at first."""
    shared, losses = {"order": "VQAv2", "micro_batch_size": 8}, []
    for changes in ({}, {"precision": "bfloat16", "checkpointing": True}):
        made = config(**shared, **changes)
        assert run(made)["finished"]
        losses.append([row["loss"] for row in rows(made.folder / "train.jsonl")])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.08)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), {}),
        (("edit_stage=second", "steps=30"), {"edit_stage": "second", "steps": 30}),
        (("end_every_turn=true", "resolution=512"), {"end_every_turn": True, "resolution": 512}),
        (("end_every_turn=False",), {"end_every_turn": False}),
    ],
    ids=["none", "a word and a number", "a switch", "as Python writes it"],
)
def test_options_of_a_backbone_are_read(given: tuple[str, ...], expected: dict) -> None:
    assert loading_options("seed-x", given) == expected


def test_options_may_be_whole_numbers_and_any_text() -> None:
    given = ("temperature=1", "guidance=2.5", "sample=false", "negative_prompt=", "positive_prompt= a = b, c.")
    expected = {"temperature": 1.0, "guidance": 2.5, "sample": False, "negative_prompt": ""}
    found = loading_options("emu3", given)
    assert found == expected | {"positive_prompt": " a = b, c."}
    assert type(found["temperature"]) is float
    for bad in ("top_k=2.5", "temperature=true"):
        with pytest.raises(UserError, match=r"--backbone-options .* takes a value like"):
            loading_options("emu3", (bad,))


def test_an_option_of_a_backbone_is_given_once() -> None:
    with pytest.raises(UserError, match="--backbone-options steps is given twice"):
        loading_options("seed-x", ("steps=3", "steps=4"))


def test_a_backbone_samples_by_the_seed_of_the_run(config: Make) -> None:
    assert load_backbone(plan(config(seed=3))).seed == 3


@pytest.mark.parametrize(
    ("backbone", "given", "message"),
    [
        ("seed-x", "stage=second", "option of backbone seed-x 'stage'"),
        ("seed-x", "steps=many", "steps takes a number, true or false, got 'many'"),
        ("seed-x", "steps=true", "steps takes a value like 50, got true"),
        ("tiny", "steps=3", "takes no options, got .steps."),
    ],
    ids=["unknown", "no number", "another type", "none known"],
)
def test_bad_options_of_a_backbone_are_named(backbone: str, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loading_options(backbone, [given])
