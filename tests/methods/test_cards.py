"""Cards and hyperparameters: declarations match the classes, and the runner provides what a card asks for."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cnext import RunConfig, adapters, methods, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import main, run_main
from cnext.errors import UserError
from cnext.methods.base import Card, Method
from cnext.methods.lora import Lora
from cnext.methods.replay import Replay
from cnext.methods.zero_shot import ZeroShot
from cnext.tasks import formats, suites
from cnext.training.evaluation import answer
from cnext.training.stages import rehearsal_memory

NAMES = sorted(methods.modules())
TASKS = [suites.load("next-tiny").task(name) for name in ("HQEdit", "VQAv2", "Flickr30k")]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_source_declares_is_what_the_class_has(name: str) -> None:
    declared, kind = methods.declared(name), methods.load(name)
    assert (declared.__name__, declared.__doc__) == (kind.__name__, inspect.getdoc(kind))
    assert [(f.name, f.default) for f in fields(declared)] == [(f.name, f.default) for f in fields(kind)]
    assert all(isinstance(f.default, f.type) for f in fields(declared))
    assert all(f.metadata["help"] for f in fields(declared))


def test_flags_of_all_methods_are_parsed_without_torch() -> None:
    code = (
        "import sys; from cnext.studies import flags; flags.parse(['--method', *sys.argv[1:]])\n"
        "assert not sys.modules.keys() & {'torch', 'numpy'}"
    )
    subprocess.run([sys.executable, "-c", code, *NAMES], cwd=Path(__file__).parent, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_shows_every_claim(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", name]) == 0
    shown = capsys.readouterr().out
    card = methods.load(name)().card
    assert methods.summary(name) in " ".join(shown.split())
    assert re.search(rf"^paper +{re.escape(card.paper)}$", shown, re.MULTILINE)
    assert re.search(rf"^keeps between tasks {re.escape(card.keeps)}$", shown, re.MULTILINE)
    assert all(re.search(rf"^{label} +\S", shown, re.MULTILINE) for label in ("rehearsal", "extra bytes", "learns"))
    assert re.search(rf"^task id at test +{'' if card.task_id_at_test else 'not '}needed$", shown, re.MULTILINE)
    for field in fields(methods.declared(name)):
        flag = re.escape(f"--{name}.{field.name.replace('_', '-')} (default {field.default})")
        assert re.search(rf"^{flag}\n    {re.escape(field.metadata['help'])}$", shown, re.MULTILINE)


def test_the_bytes_of_a_card_are_those_of_its_branches(capsys: pytest.CaptureFixture[str]) -> None:
    """Five more branches of 312,320 parameters than one, and their count; nothing for lora."""
    main(["card", "o-lora", "lora"])
    shown = capsys.readouterr().out
    assert f"\nextra bytes         {4 * 312_320 * 5 + 8:,} at most" in shown
    assert "\nextra bytes         0 " in shown


def test_joint_training_is_not_called_rehearsal_free(capsys: pytest.CaptureFixture[str]) -> None:
    main(["card", "upper-bound"])
    assert "\nrehearsal           every training sample of every task" in capsys.readouterr().out


@pytest.mark.parametrize("asks", [False, True], ids=["no task id", "task id"])
def test_a_method_sees_the_question_and_what_its_card_asks(asks: bool, data: Path) -> None:
    samples = formats.read_samples(TASKS[0], data, "test")
    calls = []

    class Recording(ZeroShot):
        card = Card("none", task_id_at_test=asks)

        def answer(self, questions: list, max_new_tokens: int, task: object) -> list:
            calls.append((questions, task))
            return []

    answer(Recording(), TASKS[0], samples)
    [(questions, task)] = calls
    assert task is (TASKS[0] if asks else None)
    for shown, sample in zip(questions, samples, strict=True):
        assert (shown.id, shown.origin, shown.target_image) == ("", "", None)
        assert [turn.answer for turn in shown.turns] == [""]
        assert shown.turns[0].instruction == (sample.prompt or sample.turns[0].instruction)


@pytest.mark.parametrize("kept", [0, 3, 1000])
def test_the_memory_is_drawn_by_the_seed(kept: int, data: Path) -> None:
    """Of the tasks seen, and all samples where there are fewer."""
    train = {task.name: formats.read_samples(task, data, "train") for task in TASKS}
    seen = ["HQEdit", "VQAv2"]
    found = rehearsal_memory(train, seen, kept, seed=0)
    assert list(found) == (seen if kept else [])
    for name, samples in found.items():
        ids = [sample.id for sample in samples]
        assert len(ids) == len(set(ids)) == min(kept, len(train[name]))
        assert set(ids) <= {sample.id for sample in train[name]}
    assert rehearsal_memory(train, seen, kept, seed=0) == found
    assert kept != 3 or rehearsal_memory(train, seen, kept, seed=1) != found


def test_the_memory_is_as_large_as_the_card_says(
    data: Path, toy_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tasks so far; nothing for lora."""
    options = {"suite": str(toy_suite), "data": data, "order": "HQEdit,VQAv2", "device": "cpu", "out": tmp_path}
    memories = []

    def record(original: object) -> object:
        def before_task(method: Method, parameters: dict, steps: int, memory: dict) -> None:
            memories.append({task: len(kept) for task, kept in memory.items()})
            original(method, parameters, steps, memory)

        return before_task

    for kind in (Lora, Replay):
        monkeypatch.setattr(kind, "before_task", record(kind.before_task))
    run(RunConfig(method="lora", **options))
    assert memories == [{}, {}]
    memories.clear()
    run(RunConfig(method="replay", hyperparameters={"samples": 3}, **options))
    assert memories == [{"HQEdit": 3}, {"HQEdit": 3, "VQAv2": 3}]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_at_most_three_classes_below_method(name: str) -> None:
    own = [kind for kind in methods.load(name).__mro__ if issubclass(kind, Method)]
    assert len(own) - 1 <= 3, [kind.__name__ for kind in own]


@pytest.mark.parametrize("path", sorted(Path(methods.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_method_trains_by_a_loop_of_its_own(path: Path) -> None:
    """Steps are taken by the trainer: no backward pass and no optimizer in a method."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"optim", "backward", "zero_grad"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [("EW+GA", "ew-ga"), ("4-Split", "ew-ga"), ("2-split", "two-split"), ("joint", "upper-bound"), ("MAGE", "mage"),
     ("xyz", "")],
)  # fmt: skip
def test_an_unknown_name_suggests_the_right_one(given: str, meant: str) -> None:
    end = f"zero-shot; perhaps you meant {meant}$" if meant else "zero-shot$"
    with pytest.raises(UserError, match=rf"unknown method '{re.escape(given)}'; valid: attention-lora, .*, {end}"):
        methods.load(given)


def test_a_method_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["--method", "ew-ga", "ew-ga"]) == 2
    assert "--method has ew-ga more than once" in capsys.readouterr().err


WRONG = [
    ("attention-lora", {"rank": 0}, "rank must be at least 1, got 0"),
    ("cia", {"factor": 0.0}, "expected a positive factor and fallback in"),
    ("cia", {"fallback": 1.5}, "expected a positive factor and fallback in"),
    ("distillation", {"weight": -1.0}, "weight must be above 0 and finite, got -1.0"),
    ("distillation", {"temperature": float("nan")}, "temperature must be above 0 and finite, got nan"),
    ("ewc", {"penalty": -1.0}, "penalty of at least 0"),
    ("ewc", {"penalty": float("inf")}, "penalty of at least 0"),
    ("keep-lora", {"principal": 1.5}, "expected shares principal and features from 0 to 1"),
    ("keep-lora", {"features": float("nan")}, "expected shares principal and features from 0 to 1"),
    ("keep-lora", {"estimate": 0}, "estimate and batches of at least 1, got 0.3, 0.9, 0 and 16"),
    ("lae", {"decay": -0.1}, "decay in [0, 1]"),
    ("lora", {"init_std": -0.1}, "init_std must be at least 0 and finite, got -0.1"),
    ("lae", {"decay": float("nan")}, "decay in [0, 1]"),
    ("mage", {"average": "ema"}, "unknown averaging rule 'ema'; valid: pema, pema-kron, pema-step"),
    ("mage", {"c": 0.0}, "expected c > 0, got c=0.0"),
    ("mage", {"c": float("nan")}, "expected c > 0, got c=nan"),
    ("mage", {"average": "dema", "c": 2.0}, "c=2.0 has no effect with the averaging rule dema, only with pema"),
    ("mage-pull", {"pull": -1.0}, "pull must be at least 0 and finite"),
    ("mage-pull", {"pull": float("inf")}, "pull must be at least 0 and finite"),
    ("mage-pull", {"average": "dema"}, "a pull needs the Fisher information of the averaging rule pema, got dema"),
    ("mage-slow", {"slow": 1.5}, "slow must be from 0 to 1, got 1.5"),
    ("mage-slow", {"slow": float("nan")}, "slow must be from 0 to 1, got nan"),
    ("mode", {"distill": float("nan")}, "distill must be at least 0 and finite"),
    ("moelora", {"experts": 0}, "experts must be at least 1, got 0"),
    ("mr-lora", {"samples": 0}, "samples and router_steps must be at least 1, got 0 and 80"),
    ("mr-lora", {"router_steps": 0}, "samples and router_steps must be at least 1, got 20 and 0"),
    ("o-lora", {"penalty": -1.0}, "penalty of at least 0"),
    ("osf", {"rank": 0}, "expected rank of at least 1 and freeze from 0 to 1, got 0, 0.0"),
    ("osf", {"freeze": float("nan")}, "freeze from 0 to 1"),
    ("osf", {"lr_factor": 0.0}, "lr_factor must be positive and finite"),
    ("pgp", {"epsilon": 1.5}, "expected 0 <= epsilon <= 1 <= batches"),
    ("pgp", {"batches": 0}, "expected 0 <= epsilon <= 1 <= batches"),
    ("prompt-pool", {"length": 0}, "expected length and top_k of at least 1"),
    ("prompt-pool", {"top_k": 0}, "expected length and top_k of at least 1"),
    ("prompt-pool", {"scale": float("inf")}, "a finite scale above 0"),
    ("prompt-pool", {"pull": -1.0}, "a finite pull from 0"),
    ("reglora", {"penalty": -1.0}, "expected a finite penalty"),
    ("reglora", {"share": 0.0}, "share in (0, 1]"),
    ("replay", {"samples": 0}, "samples must be at least 1, got 0"),
    ("replay", {"weight": float("nan")}, "weight must be above 0 and finite, got nan"),
    ("sdft", {"ema": 1.5}, "expected 0 <= ema <= 1 <= longest, got 1.5 and 32"),
    ("sdft", {"longest": 0}, "expected 0 <= ema <= 1 <= longest"),
    ("sdft", {"divergence": "jsd"}, "unknown divergence 'jsd'; valid: reverse, forward"),
    ("sdft", {"template": "{question}"}, "template must contain {demonstration}, got '{question}'"),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_an_impossible_value_is_refused(name: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        methods.load(name)(**values)


BRANCHED = [name for name in NAMES if {"independent", "init_std"} <= {f.name for f in fields(methods.declared(name))}]


def test_every_method_with_branches_has_their_dropout_and_initial_values() -> None:
    assert set(NAMES) - set(BRANCHED) == {"osf", "prompt-pool", "zero-shot"}


@pytest.mark.parametrize("name", BRANCHED)
def test_dropout_and_initial_values_reach_the_branches(name: str, tiny: TinyBackbone) -> None:
    method = methods.load(name)(dropout=0.25, independent=True, init_std=0.5)
    method.setup(tiny, TASKS, torch.Generator().manual_seed(0))
    layers = adapters.layers(tiny.language_model).values()
    assert {(layer.dropout, layer.independent) for layer in layers} == {(0.25, True)}
    values = torch.cat([branch.A.detach().flatten() for layer in layers for branch in layer.branches.values()])
    assert float(values.std()) == pytest.approx(0.5, rel=0.02)
    assert float(values.abs().max()) > 1.5, "normal"


@pytest.mark.parametrize("values", [{"average": "dema"}, {"average": "dema", "c": 5.0}, {"average": "none"}], ids=str)
def test_mage_takes_other_averages(values: dict[str, object]) -> None:
    assert methods.load("mage")(**values).rule.name == values["average"]
