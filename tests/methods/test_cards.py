"""Cards: the runner gives a method what its card asks for and no more, and `cnext card` shows every claim."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest

from cnext import methods
from cnext.cli import main
from cnext.methods.base import Card, Method
from cnext.tasks import formats, suites
from cnext.training.evaluation import evaluate
from cnext.training.runner import Runner

SUITE = suites.load("next-tiny")
TASKS = [SUITE.task(name) for name in ("HQEdit", "VQAv2", "Flickr30k")]


@pytest.mark.parametrize("told", [False, True], ids=["no task id", "task id"])
def test_a_method_is_told_the_task_where_its_card_asks_and_shown_the_question_alone(told: bool, data: Path) -> None:
    samples = formats.read(TASKS[0], data, "test")
    asked = []

    def answer(questions: list, max_new_tokens: int, task: object) -> list:
        asked.append((questions, task))
        return [None] * len(questions)

    method = SimpleNamespace(card=Card("none", task_id_at_test=told), answer=answer)
    evaluate(method, TASKS[0], samples, None, None, "1_HQEdit")
    [(questions, task)] = asked
    assert task is (TASKS[0] if told else None)
    for shown, sample in zip(questions, samples, strict=True):
        assert (shown.id, shown.origin, shown.target_image) == ("", "", None)
        assert [turn.answer for turn in shown.turns] == [""]
        assert shown.turns[0].instruction == (sample.prompt or sample.turns[0].instruction)


@pytest.mark.parametrize("kept", [0, 3, 1000])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_memory_is_of_the_tasks_so_far_and_as_large_as_the_card_says(kept: int, stage: int, data: Path) -> None:
    samples = {task.name: formats.read(task, data, "train") for task in TASKS}

    def memory(seed: int) -> dict[str, list]:
        runner = SimpleNamespace(
            tasks=TASKS,
            samples={"train": samples},
            config=SimpleNamespace(seed=seed),
            method=SimpleNamespace(card=Card("none", rehearsal=kept)),
        )
        return Runner._memory(runner, stage)

    found = memory(0)
    assert list(found) == ([task.name for task in TASKS[:stage]] if kept else [])
    for name, drawn in found.items():
        ids = [sample.id for sample in drawn]
        assert len(ids) == len(set(ids)) == min(kept, len(samples[name]))
        assert set(ids) <= {sample.id for sample in samples[name]}
    assert memory(0) == found
    assert kept != 3 or memory(1) != found


@pytest.mark.parametrize("name", sorted(methods.modules()))
def test_the_card_shows_every_claim(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", name]) == 0
    shown = capsys.readouterr().out
    labels = ("paper", "rehearsal", "task id at test", "keeps between tasks", "extra bytes", "learns")
    assert all(re.search(rf"^{label} +\S", shown, re.MULTILINE) for label in labels)
    keeps_nothing = methods.load(name).extra_bytes is Method.extra_bytes
    assert not keeps_nothing or "\nextra bytes         0 at most" in shown


@pytest.mark.parametrize("name", sorted(methods.modules()))
def test_what_the_source_declares_is_what_the_class_has(name: str) -> None:
    outline, kind = methods.declared(name), methods.load(name)
    assert outline is not kind, "it is read, not imported"
    types, texts = get_type_hints(kind), methods.described_fields(kind)
    assert outline.__doc__ == kind.__doc__
    assert [(field.name, field.type, field.default, field.metadata["help"]) for field in fields(outline)] == [
        (field.name, types[field.name], field.default, texts[field.name]) for field in fields(kind)
    ]


def test_the_bytes_of_a_card_are_those_of_its_branches(capsys: pytest.CaptureFixture[str]) -> None:
    """Five more branches of 312,320 parameters than one, and their count; nothing for lora."""
    main(["card", "o-lora", "lora"])
    shown = capsys.readouterr().out
    assert f"\nextra bytes         {4 * 312_320 * 5 + 8:,} at most" in shown
    assert "\nextra bytes         0 " in shown


def test_joint_training_is_not_called_free_of_rehearsal(capsys: pytest.CaptureFixture[str]) -> None:
    main(["card", "upper-bound"])
    assert "\nrehearsal           every training sample of every task" in capsys.readouterr().out
