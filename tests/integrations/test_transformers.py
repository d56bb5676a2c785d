"""Averages in transformers' Trainer: as in a loop of one's own, in checkpoints, resumed, in evaluations, refused."""

from __future__ import annotations

import copy
import pickle
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.trainers import (
    STEPS,
    TASKS,
    Recorder,
    arguments,
    assert_equal,
    attached,
    llama,
    loop,
    rows,
    train,
    values,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from cnext import attach_mage, methods
from cnext.adapters import AttachedMage, saving
from cnext.adapters.attach import branch_parameters
from cnext.averaging import RULES, Constant, MovingAverage, Pema, PemaKron, PemaStep
from cnext.backbones.tiny.model import TinyBackbone
from cnext.config.schedules import SCHEDULES
from cnext.errors import UserError
from cnext.integrations import average_file
from cnext.integrations.transformers import AveragingCallback
from cnext.tasks import formats, suites
from cnext.tasks.base import Recipe
from cnext.training.batches import stable_seed
from cnext.training.trainer import TaskTrainer

pytestmark = pytest.mark.filterwarnings("ignore:pema-literal")
every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
@pytest.mark.parametrize("limit", [0.05, 0.0], ids=["clipped", "not clipped"])
def test_two_tasks_are_those_of_a_loop_of_ones_own(rule: str, limit: float, tmp_path: Path) -> None:
    one, other = attached(), attached()
    callback, average = AveragingCallback(rule), RULES[rule]()
    for task, (reads, writes) in enumerate(TASKS):
        args = arguments(tmp_path, max_grad_norm=limit)
        one.train_on(reads, writes)
        recorder = Recorder()
        train(one.model, args, task, callback, recorder, data_collator=recorder)
        assert len(recorder.steps) == STEPS
        parameters = other.train_on(reads, writes)
        if isinstance(average, PemaKron):
            average.frozen = {n: p for n, p in branch_parameters(other.model).items() if n not in parameters}
        loop(other.model, args, recorder.steps, average, parameters)
        assert_equal(values(one.model), values(other.model))
        assert callback.average.statistics == average.statistics
        assert args.max_grad_norm == limit
    state, expected = callback.average.state_dict(), average.state_dict()
    assert_equal(state, expected)


RECIPE = Recipe({}, batch_size=4, learning_rate=1e-2, warmup_steps=1, max_grad_norm=0.1, weight_decay=0.01)


class Steps(nn.Module):
    """A task of a run as a model whose input is the number of a step."""

    def __init__(self, task: TaskTrainer) -> None:
        super().__init__()
        self.backbone, self.task = task.backbone, task

    def forward(self, step: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(stable_seed(*self.task.seed, "step", int(step)))
        return {"loss": self.backbone.loss(self.task.batches.at(int(step), STEPS)).total}


class Scheduled(LRScheduler):
    """The schedule of a run."""

    def get_lr(self) -> list[float | Tensor]:
        return [SCHEDULES[RECIPE.schedule](RECIPE, self.last_epoch, STEPS)]


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> range:
        return range(self.args.max_steps)


def after_two_tasks(method: Any, data: Path, folder: Path | None) -> dict[str, Tensor]:
    """The branches after two tasks, by the loop of `cnext-run`, or by Trainer in a folder."""
    tiny = TinyBackbone.load()
    tasks = [suites.load("next-tiny").task(name) for name in ("VQAv2", "Flickr30k")]
    method.setup(tiny, tasks, torch.Generator().manual_seed(0))
    callback = AveragingCallback(method.rule)
    for task in tasks:
        parameters = method.trainable(task)
        samples = formats.read_samples(task, data, "train")
        trainer = TaskTrainer(tiny, method, parameters, samples, RECIPE, STEPS, (0, task.name))
        if folder is None:
            method.before_task(parameters, STEPS, {})
            for _ in range(STEPS):
                trainer.train_step()
            trainer.finish()
            continue
        size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        args = arguments(folder, max_grad_norm=RECIPE.max_grad_norm, **size)
        optimizers = trainer.optimizer, Scheduled(trainer.optimizer)
        rows = [{"step": step} for step in range(STEPS)]
        InOrder(Steps(trainer), args, train_dataset=rows, optimizers=optimizers, callbacks=[callback]).train()
    return {name: parameter.detach().clone() for name, parameter in method.adapter_parameters().items()}


@every_rule
def test_two_tasks_are_those_of_a_run(rule: str, data: Path, tmp_path: Path) -> None:
    kind = methods.load("mage-paper")
    assert_equal(*(after_two_tasks(kind(average=rule), data, folder) for folder in (None, tmp_path)))


def test_two_tasks_of_mage_are_those_of_a_run(data: Path, tmp_path: Path) -> None:
    """A is fixed: Trainer's average reads no gradient of it."""
    kind = methods.load("mage")
    assert_equal(*(after_two_tasks(kind(scale=1.0), data, folder) for folder in (None, tmp_path)))


Made = tuple[AttachedMage, AveragingCallback]


def made(average: str | MovingAverage = "constant", roles: Any = TASKS[0], **options: Any) -> Made:
    """A model of which a task's branches are trained, and a callback."""
    handle = attached()
    handle.train_on(*roles)
    return handle, AveragingCallback(average, **options)


class At(TrainerCallback):
    """Does something after a step, at an event."""

    def __init__(self, step: int, work: Any, event: str = "on_step_end") -> None:
        def call(args: TrainingArguments, state: Any, control: Any, **context: Any) -> None:
            if state.global_step == step:
                work(control, context)

        setattr(self, event, call)


def stop(control: Any, context: Any) -> None:
    control.should_training_stop = True


def fail(control: Any, context: Any) -> None:
    raise MemoryError


def test_without_an_average_nothing_changes(tmp_path: Path) -> None:
    """Neither the parameters nor the norms of the gradients that are logged."""
    found = []
    for callbacks in ([], [AveragingCallback("none")]):
        handle = attached()
        handle.train_on(*TASKS[0])
        start = values(handle.model)
        trainer = train(handle.model, arguments(tmp_path, logging_strategy="steps", logging_steps=1), 0, *callbacks)
        norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        assert len(norms) == STEPS
        assert min(norms) > trainer.args.max_grad_norm, "clipping changes every step"
        assert any(not torch.equal(start[name], value) for name, value in values(handle.model).items())
        found.append((norms, values(handle.model)))
    assert found[0][0] == found[1][0]
    assert_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("average", [Pema(unit="micro-batch"), PemaStep(dtype=torch.bfloat16)], ids=["unit", "dtype"])
def test_an_average_of_ones_own(average: MovingAverage, tmp_path: Path) -> None:
    (one, callback), recorder = made(average), Recorder()
    args = arguments(tmp_path, max_grad_norm=0.0)
    train(one.model, args, 0, callback, recorder, data_collator=recorder)
    other, _ = made()
    again = type(average)(unit="micro-batch") if isinstance(average, Pema) else PemaStep(dtype=torch.bfloat16)
    loop(other.model, args, recorder.steps, again, other.train_on(*TASKS[0]))
    assert_equal(values(one.model), values(other.model))


@pytest.mark.parametrize("changes", [{"torch_compile": True, "torch_compile_backend": "eager"}], ids=["compiled"])
def test_other_ways_to_train_are_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for each in ({}, changes):
        handle, callback = made("pema-kron")
        for task in range(2):
            handle.train_on(*TASKS[task])
            train(handle.model, arguments(tmp_path, **each), task, callback)
        found.append(values(handle.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize("rule", ["pema", "pema-kron", "pema-step", "dema"])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_last_checkpoint_and_evaluation_have_the_average(rule: str, strategy: str, tmp_path: Path) -> None:
    handle, callback = made(rule)
    args = arguments(tmp_path, save_strategy=strategy, eval_strategy=strategy, save_steps=4, eval_steps=3)
    trainer = train(handle.model, args, 0, callback, eval_dataset=rows(2))
    saved = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    trained = {n: p.detach() for n, p in handle.model.named_parameters() if p.requires_grad}
    assert_equal({name: saved[name] for name in trained}, trained)
    last = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row][-1]
    assert trainer.evaluate()["eval_loss"] == last


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_within_a_task_see_the_average(sets: int, strategy: str, tmp_path: Path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
            if state.global_step < STEPS:
                own, average = callback.average.parameters, callback.average.evaluated()
                seen.append(all(torch.equal(average[name], p) for name, p in own.items()))

    alone, without = made("pema-step")
    train(alone.model, arguments(tmp_path), 0, without)
    handle, callback = made("pema-step", eval_sets=sets)
    every = {"a": rows(2), "b": rows(3)} if sets == 2 else rows(2)
    args = arguments(tmp_path, eval_strategy=strategy, eval_steps=2, save_strategy=strategy, save_steps=2)
    train(handle.model, args, 0, callback, Watch(), eval_dataset=every)
    assert len(seen) >= 2 * sets
    assert all(seen)
    assert_equal(values(handle.model), values(alone.model))


def test_several_evaluation_sets_are_declared(tmp_path: Path) -> None:
    every = {"a": rows(2), "b": rows(3)}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    handle, callback = made()
    with pytest.raises(UserError, match="pass their number as eval_sets"):
        train(handle.model, args, 0, callback, eval_dataset=every)
    handle, callback = made(eval_sets=3)
    with pytest.raises(UserError, match="eval_sets is 3, and Trainer went on after 2 evaluations"):
        train(handle.model, args, 0, callback, eval_dataset=every)


def test_an_evaluation_that_does_not_see_the_average_says_so(tmp_path: Path) -> None:
    handle, callback = made()
    ask = At(3, lambda control, context: setattr(control, "should_evaluate", True))
    with pytest.warns(RuntimeWarning, match="saw the parameters in training"):
        train(handle.model, arguments(tmp_path), 0, callback, ask, eval_dataset=rows(2))


def test_a_copied_callback_goes_on_between_trainings(tmp_path: Path) -> None:
    """As the original, but that it checks the values of the model, which it does not know."""
    handle, callback = made("pema")
    train(handle.model, arguments(tmp_path), 0, callback)
    copied = pickle.loads(pickle.dumps(callback))
    kept, again = callback.average.state_dict(), copied.average.state_dict()
    assert kept.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in kept.items())
    train(handle.model, arguments(tmp_path), 0, copied)
    assert copied.average.statistics
    copied = pickle.loads(pickle.dumps(copied))
    with torch.no_grad():
        for parameter in branch_parameters(handle.model).values():
            parameter.add_(1)
    with pytest.warns(RuntimeWarning, match="another model than in the task before, and other values"):
        train(handle.model, arguments(tmp_path), 0, copied)
    with pytest.raises(UserError, match="use copy"):
        copy.copy(copied)
    copied._running = True
    with pytest.raises(UserError, match=r"a training is running.*between trainings"):
        copy.deepcopy(copied)


def test_the_average_after_a_task_is_loaded_for_the_next(tmp_path: Path) -> None:
    whole, callback = made("pema")
    args = arguments(tmp_path / "one", save_strategy="steps")
    train(whole.model, args, 0, callback)
    (tmp_path / "saved").mkdir()
    callback.save(tmp_path / "saved")
    between = whole.model.state_dict()
    between = {name: value.clone() for name, value in between.items()}
    whole.train_on(*TASKS[1])
    train(whole.model, arguments(tmp_path / "two"), 1, callback)
    for folder in (tmp_path / "saved", tmp_path / "one" / "checkpoint-6"):
        again, other = made("pema", TASKS[1])
        again.model.load_state_dict(between)
        other.load(folder)
        train(again.model, arguments(tmp_path / "two"), 1, other)
        assert_equal(values(again.model), values(whole.model))


@pytest.mark.parametrize("interval", [3, 4], ids=["at an epoch's end", "within"])
def test_a_task_that_is_resumed_at_its_end_stays_as_it_is(interval: int, tmp_path: Path) -> None:
    """Of 16 or 12 rows, Trainer takes one step too many after the sixth, or none."""
    handle, callback = made("pema")
    args = arguments(tmp_path, save_strategy="steps", save_steps=interval)
    Trainer(handle.model, args, train_dataset=rows(0, 4 * interval), callbacks=[callback]).train()
    again, other = made("pema")
    trainer = Trainer(again.model, args, train_dataset=rows(0, 4 * interval), callbacks=[other])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(values(again.model), values(handle.model))
    assert_equal(other.average.state_dict(), callback.average.state_dict())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == "checkpoint-6"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints after four and six steps of a task with `pema`."""
    folder = tmp_path_factory.mktemp("interrupted")
    handle, callback = made("pema")
    train(handle.model, arguments(folder, save_strategy="steps", save_steps=4), 0, callback)
    return folder


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (4, {"max_steps": 8}, "after 4 of 6 steps, and Trainer resumes after 4 of 8; a task keeps"),
        (6, {"max_steps": 8}, "the task ended after 6 steps"),
        (4, {"average": "dema"}, "is of the rule 'pema', and the average's is 'dema'"),
        (4, {"roles": (["image"], ["image"])}, "are not those that this state was saved with"),
        (4, {"resume_from": "elsewhere"}, "elsewhere has no moving_average.safetensors"),
    ],
    ids=["steps", "ended", "rule", "branches", "folder"],
)
def test_a_checkpoint_of_another_task_is_refused(
    step: int, change: dict[str, Any], message: str, interrupted: Path
) -> None:
    steps = {"max_steps": change.get("max_steps", STEPS)}
    options = {key: value for key, value in change.items() if key != "max_steps"}
    handle, callback = made(**{"average": "pema", **options})
    args = arguments(interrupted, **steps)
    with pytest.raises(UserError, match=message):
        train(handle.model, args, 0, callback, resume=str(interrupted / f"checkpoint-{step}"))


@pytest.fixture(scope="module")
def branches_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, another in other/, and a checkpoint without the base model after four steps."""
    folder, model = tmp_path_factory.mktemp("base"), llama()
    model.save_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    model.save_pretrained(folder / "other")
    handle = attach_mage(LlamaForCausalLM.from_pretrained(folder), rank=2, dropout=0.0)
    handle.train_on(*TASKS[0])
    args = arguments(folder, save_strategy="steps", save_steps=4)
    train(handle.model, args, 0, AveragingCallback("pema"))
    return folder


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("", {"scale": 8.0}, "attached with scale"),
        ("", {"modalities": ["text", "image", "audio"]}, "attached with modalities"),
        ("other", {}, "the model without branches has other logits"),
        ("other", {"unchecked": True}, "not trained have other values or dtypes now; resume with the base model"),
        ("", {}, None),
    ],
    ids=["scale", "modalities", "base", "base without logits", "same"],
)
def test_branches_of_another_model_are_refused(
    base: str, options: dict[str, Any], message: str | None, branches_alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer alone loads a checkpoint's branches into any model."""
    if "unchecked" in options:
        monkeypatch.setattr(saving, "require_same", lambda *_: None)
    model = LlamaForCausalLM.from_pretrained(branches_alone / base)
    attach_mage(
        model, rank=2, dropout=0.0, **{key: value for key, value in options.items() if key != "unchecked"}
    ).train_on(*TASKS[0])
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        resume = str(branches_alone / "checkpoint-4")
        train(model, arguments(branches_alone), 0, AveragingCallback("pema"), resume=resume)


def test_a_checkpoint_elsewhere(interrupted: Path, tmp_path: Path) -> None:
    folder = str(interrupted / "checkpoint-4")
    handle, callback = made("pema")
    with pytest.raises(UserError, match=r"checkpoint-4 has no moving_average.safetensors"):
        train(handle.model, arguments(tmp_path), 0, callback, resume=folder)
    handle, callback = made("pema", resume_from=folder)
    train(handle.model, arguments(tmp_path), 0, callback, resume=folder)
    saved = load_file(interrupted / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(saved[n], p) for n, p in handle.model.named_parameters() if p.requires_grad)


def test_a_damaged_state_is_named(interrupted: Path, tmp_path: Path) -> None:
    content = (interrupted / "checkpoint-4" / average_file.NAME).read_bytes()
    (tmp_path / average_file.NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read it"):
        AveragingCallback("pema").load(tmp_path)
    with pytest.raises(UserError, match="was saved after 4 of a task's 6 steps; finish the task first"):
        AveragingCallback("pema").load(interrupted / "checkpoint-4")


def test_training_that_stops_early_averages_what_it_has_seen(tmp_path: Path) -> None:
    handle, callback = made("pema")
    args = arguments(tmp_path, save_strategy="steps", save_steps=5)
    with pytest.warns(RuntimeWarning, match="stopped after 5 of 6 steps: the average is over these"):
        train(handle.model, args, 0, callback, At(5, stop))
    assert callback.average.statistics
    saved = tmp_path / "checkpoint-5"
    whole, resumed = made("pema"), made("pema")
    train(whole[0].model, arguments(tmp_path / "whole"), 0, whole[1])
    train(resumed[0].model, args, 0, resumed[1], resume=str(saved))
    assert_equal(values(resumed[0].model), values(whole[0].model))


def test_training_that_stops_too_early_is_refused(tmp_path: Path) -> None:
    handle, callback = made("pema")
    with pytest.raises(
        UserError, match=r"after 2 of 6 steps, too few for pema; .* by train\(resume_from_checkpoint=True\)"
    ):
        train(handle.model, arguments(tmp_path), 0, callback, At(2, stop))


def test_a_number_of_steps_that_changes_is_refused(tmp_path: Path) -> None:
    handle, callback = made()
    change = At(2, lambda control, context: setattr(trainer.state, "max_steps", 9), "on_step_begin")
    trainer = Trainer(handle.model, arguments(tmp_path), train_dataset=rows(0), callbacks=[callback, change])
    with pytest.raises(UserError, match="has seen 3 of 6 steps, and Trainer is at 3 of 9"):
        trainer.train()


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
def test_training_after_an_error_in_a_step(resume: bool, tmp_path: Path) -> None:
    """In the same process, with the same trainer. The error comes where clipping is postponed and branches are read."""
    whole, callback = made("pema-kron")
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    train(whole.model, arguments(tmp_path / "whole"), 0, callback)
    handle, callback = made("pema-kron")
    args, once = arguments(tmp_path, save_strategy="steps", save_steps=2), [fail]
    error = At(4, lambda *given: once.pop()(*given) if once else None, "on_step_begin")
    trainer = Trainer(handle.model, args, train_dataset=rows(0), callbacks=[callback, error])
    with pytest.raises(MemoryError):
        trainer.train()
    if resume:
        trainer.train(resume_from_checkpoint=True)
    else:
        handle.model.load_state_dict(start)
        handle.train_on(*TASKS[0])
        trainer = Trainer(handle.model, args, train_dataset=rows(0), callbacks=[callback])
        with pytest.warns(RuntimeWarning, match="interrupted after 4 of 6"):
            trainer.train()
    assert args.max_grad_norm == 0.05
    assert_equal(values(handle.model), values(whole.model))


@pytest.mark.parametrize("where", ["model", "on_step_begin", "on_pre_optimizer_step"])
@pytest.mark.parametrize("same", [True, False], ids=["the same trainer", "another"])
def test_an_error_in_a_step_changes_no_arguments(where: str, same: bool, tmp_path: Path) -> None:
    """A later training without the callback clips, by the same trainer too."""
    plain, _ = made()
    train(plain.model, arguments(tmp_path), 0)
    (handle, callback), args = made("pema"), arguments(tmp_path)
    start, before = {name: value.clone() for name, value in handle.model.state_dict().items()}, args.to_dict()
    once = [fail]

    def work(*given: Any) -> None:
        if callback.average.step == 1 and once:
            once.pop()(None, None)

    others = [] if where == "model" else [At(1, work, where)]
    trainer = Trainer(handle.model, args, train_dataset=rows(0), callbacks=[*others, callback])
    hook = handle.model.register_forward_pre_hook(work) if where == "model" else None
    with pytest.raises(MemoryError):
        trainer.train()
    assert hook is None or hook.remove() is None
    assert args.to_dict() == before
    assert type(args.max_grad_norm) is float
    handle.model.load_state_dict(start)
    if same:
        trainer.remove_callback(callback)
        trainer.optimizer = trainer.lr_scheduler = None
    else:
        trainer = Trainer(handle.model, args, train_dataset=rows(0))
    trainer.train()
    assert_equal(values(handle.model), values(plain.model))


def test_clipping_by_other_means_is_refused(tmp_path: Path) -> None:
    def replace(*_: Any) -> None:
        trainer.accelerator.clip_grad_norm_ = nn.utils.clip_grad_norm_

    handle, callback = made()
    change = At(0, replace, "on_step_begin")
    trainer = Trainer(handle.model, arguments(tmp_path), train_dataset=rows(0), callbacks=[callback, change])
    with pytest.raises(UserError, match="by other means than accelerate"):
        trainer.train()
    with pytest.raises(UserError, match="expected to be called by transformers' Trainer"):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=handle.model, optimizer=trainer.optimizer
        )


def test_a_pull_needs_the_largest_learning_rate(tmp_path: Path) -> None:
    def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return optimizer, OneCycleLR(optimizer, 1e-2, STEPS + 1)

    handle, callback = made("pema-kron")
    with pytest.raises(UserError, match="pass the schedule's largest as peak_learning_rate"):
        train(handle.model, arguments(tmp_path), 0, callback, optimizers=optimizers(handle.model))
    handle, callback = made("pema-kron", peak_learning_rate=1e-2)
    train(handle.model, arguments(tmp_path), 0, callback, optimizers=optimizers(handle.model))
    handle, callback = made("pema")
    train(handle.model, arguments(tmp_path), 0, callback, optimizers=optimizers(handle.model))


def test_every_parameter_of_a_model_without_branches(tmp_path: Path) -> None:
    model, callback = llama(), AveragingCallback(Constant(beta=0.5))
    model.model.embed_tokens.requires_grad_(False)
    train(model, arguments(tmp_path, save_strategy="steps"), 0, callback)
    train(model, arguments(tmp_path), 1, callback)
    assert (tmp_path / "checkpoint-6" / average_file.NAME).is_file()


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    handle, callback = made("pema")
    handle.merge()
    with pytest.raises(UserError, match=r"AveragingCallback: the branches are merged .*; call unmerge first"):
        train(handle.model, arguments(tmp_path), 0, callback)
    handle.unmerge()
    handle.model.requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model requires a gradient"):
        train(handle.model, arguments(tmp_path), 0, callback)


@pytest.mark.filterwarnings("ignore:You are adding")
def test_one_callback_averages_one_training(tmp_path: Path) -> None:
    handle, callback = made()
    for other in (callback, AveragingCallback("dema")):
        with pytest.raises(UserError, match="the trainer has several"):
            train(handle.model, arguments(tmp_path), 0, callback, other)
    found = []

    def nested(control: Any, context: Any) -> None:
        with pytest.raises(UserError, match="a task is open in an outer trainer") as error:
            train(made()[0].model, arguments(tmp_path), 0, callback)
        found.append(error)

    train(handle.model, arguments(tmp_path), 0, callback, At(2, nested))
    assert found
    alone, once = made()
    train(alone.model, arguments(tmp_path), 0, once)
    assert_equal(values(handle.model), values(alone.model))


def test_an_unrelated_model_of_the_same_names(tmp_path: Path) -> None:
    handle, callback = made("pema")
    train(handle.model, arguments(tmp_path), 0, callback)
    copy = attached()
    copy.model.load_state_dict(handle.model.state_dict())
    copy.train_on(*TASKS[0])
    train(copy.model, arguments(tmp_path), 1, callback)
    with pytest.warns(RuntimeWarning, match="an unrelated model needs a callback of its own"):
        train(made()[0].model, arguments(tmp_path), 1, callback)


def test_what_would_be_wrong_is_refused(tmp_path: Path) -> None:
    handle, callback = made()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 500}
    with pytest.raises(UserError, match="load_best_model_at_end would replace the average"):
        train(handle.model, arguments(tmp_path, **best), 0, callback, eval_dataset=rows(1))
    handle, callback = made(Pema(unit="sample"))
    with pytest.raises(UserError, match="unit 'sample' expects the samples' losses"):
        train(handle.model, arguments(tmp_path), 0, callback)
    with pytest.raises(UserError, match="unknown averaging rule 'ema'; valid: pema, pema-kron"):
        AveragingCallback("ema")
    with pytest.raises(UserError, match="beta: options go with a rule's name"):
        AveragingCallback(Constant(), beta=0.5)
    with pytest.raises(UserError, match="unexpected keyword argument 'beta'; see the arguments of Pema"):
        AveragingCallback("pema", beta=0.5)
    with pytest.raises(UserError, match="unknown averaging rule"):
        AveragingCallback(0.9)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="there is no such folder"):
        AveragingCallback("pema").save(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharded_training_is_refused(kind: str, tmp_path: Path) -> None:
    handle, callback = made()

    class Sharded(Trainer):
        def create_optimizer(self, *given: Any) -> Any:
            from accelerate.utils import DistributedType

            made = super().create_optimizer(*given)
            made.accelerator_state = SimpleNamespace(distributed_type=DistributedType[kind])
            return made

    trainer = Sharded(handle.model, arguments(tmp_path), train_dataset=rows(0), callbacks=[callback])
    trainer.create_optimizer()
    with pytest.raises(UserError, match=f"distributed by {kind}"):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=handle.model, optimizer=trainer.optimizer
        )


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and again from its checkpoints."""
    file = Path(__file__).parents[2] / "docs" / "example_trainer.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [file.name, str(tmp_path)])
    found = [runpy.run_path(str(file)) for _ in range(2)]
    assert {path.name for path in tmp_path.iterdir()} == {"A", "B"}
    once, again = (each["branches"] for each in found)
    once.unmerge()
    again.unmerge()
    assert_equal(values(once.model), values(again.model))
    assert found[0]["callback"].average.statistics
