"""``--init-from``: a run that starts from another's checkpoint or from an adapter is the run that went there itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training.conftest import ORDER, Make, Runs
from training.faults import damage
from training.toy import change, rows

from cnext import RunConfig, run
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import main
from cnext.config.plan import plan
from cnext.errors import UserError
from cnext.exchange.evaluation import evaluate
from cnext.exchange.export import export
from cnext.exchange.importing import import_adapter
from cnext.report import write_report
from cnext.studies import dry_run, forecast
from cnext.training.trainer import TaskTrainer

FIRST, SECOND = "1_VQAv2", "2_Flickr30k"
pytestmark = [
    pytest.mark.usefixtures("without_reports"),
    # By PEFT, of transformers' newer releases.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def states(found: dict) -> dict[int, str]:
    return {row["stage"]: row["sha256"] for row in found["digests"]}


def assert_it_resumes(made: RunConfig, expected: Path, moment: int, answers: bool) -> None:
    """Interrupts a run at its n-th batch of answers, or step, resumes it, and compares its files to the bit."""
    kind, name = (TinyBackbone, "generate") if answers else (TaskTrainer, "train_step")
    original, calls = getattr(kind, name), []

    def failing(self: object, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, failing)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    run(made)
    for file in ("results.json", "scores.jsonl", "train.jsonl"):
        assert (made.folder / file).read_bytes() == (expected / file).read_bytes(), file


METHODS = {
    "lora": "one branch",
    "ewc": "Fisher information",
    "mage": "Fisher information by role",
    "mage-experts": "branches by task, moments of features",
    "mr-lora": "a branch per task, a router, kept samples",
    "replay": "kept samples",
    "lae": "an average that answers",
    "pgp": "bases of inputs",
    "prompt-pool": "no branches",
}
QUICK, SHORTER = ("lora", "ewc", "mage", "mage-experts", "mr-lora", "replay"), {"router_steps": 2, "samples": 4}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]
)
def test_a_checkpoint_goes_on_as_its_own_run(method: str, runs: Runs, config: Make) -> None:
    """With the method's state, whatever it is: the optimizer starts anew with each task anyway."""
    options = {"method": method, "hyperparameters": SHORTER if method == "mr-lora" else {}}
    before = runs(**options)
    made = config(**options, init_from=before / "checkpoints" / FIRST, init_tasks=("VQAv2",))
    found, expected = run(made), results(before)
    assert found["digests"] == expected["digests"]
    for name in ("score_matrix", "zero_shot", "metrics", "error_matrix", "profiles", "samples"):
        assert found[name] == expected[name], name
    logged = [row for row in rows(before / "train.jsonl") if row["stage"] > 1]
    assert rows(made.folder / "train.jsonl") == logged
    assert found["cost"]["optimizer_steps"] == len(logged) == 8
    source = found["init"]
    assert (source["name"], source["kind"], source["tasks"]) == ("1_VQAv2 of seed-0", "run", ["VQAv2"])
    assert source["notes"] == []


def test_stages_before_the_last_of_the_tasks_have_no_scores(runs: Runs, config: Make) -> None:
    before = runs("lora")
    tasks = ORDER[:2]
    made = config(method="lora", init_from=before / "checkpoints" / SECOND, init_tasks=tasks)
    found, expected = run(made), results(before)
    assert found["score_matrix"] == [[None] * 3, *expected["score_matrix"][1:]]
    assert found["zero_shot"] == expected["zero_shot"]
    assert states(found) == {stage: digest for stage, digest in states(expected).items() if stage != 1}
    metrics = found["metrics"]
    assert metrics["avg_acc"] == expected["metrics"]["avg_acc"]
    # Of the first task the score when it was learnt is not known.
    unknown = ("new_acc", "forgetting", "forgetting_max", "bwt", "maa", "worst_forgetting", "avg_hal", "recovery")
    assert [name for name in unknown if metrics[name] is not None] == []
    assert found["finished"] is True
    assert main(["compare", str(made.folder), "--to", str(before)]) == 0
    assert main(["judge", str(made.folder)]) == 0
    assert main(["analyze", str(made.folder)]) == 0


def test_without_tasks_it_is_where_the_first_one_starts(runs: Runs, config: Make) -> None:
    """Nothing is learnt yet: a run of one task, from the state after another, is that task's second stage."""
    before = runs("ewc", order="VQAv2,Flickr30k")
    found = run(config(method="ewc", order="Flickr30k", init_from=before / "checkpoints" / FIRST))
    expected = results(before)
    assert found["score_matrix"] == [[expected["score_matrix"][1][1]]]
    assert found["zero_shot"] == [expected["zero_shot"][1]]
    assert states(found)[1] == states(expected)[2]
    assert found["init"]["tasks"] == []


def test_the_last_checkpoint_of_a_run_is_taken(runs: Runs, config: Make) -> None:
    before = runs("lora", order="VQAv2,Flickr30k")
    made = config(method="lora", init_from=before, init_tasks=ORDER[:2])
    assert plan(made).source.path.name == SECOND
    assert plan(made).source.learnt == ORDER[:2]
    inside = before.with_name("inside")
    shutil.copytree(before, inside)
    change(inside / "checkpoints" / SECOND / "manifest.json", step=3)
    assert plan(config(method="lora", init_from=inside)).source.path.name == FIRST
    with pytest.raises(UserError, match="is of step 3 of a task; give one of a finished task"):
        plan(config(method="lora", init_from=inside / "checkpoints" / SECOND))


ADAPTERS = {
    "mage, authors": ("mage", "authors", "branches"),
    "mage, authors, all": ("mage", "authors", "released"),
    "mage, PEFT": ("mage", "peft", "branches"),
    "lora, authors, connections": ("lora", "authors", "connections"),
    "lora, PEFT": ("lora", "peft-merged-rank", "branches"),
    "moelora, authors": ("moelora", "authors", "branches"),
}


@pytest.mark.parametrize(("method", "format", "trainable"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_exported_adapter_goes_on_as_its_run(
    method: str, format: str, trainable: str, runs: Runs, config: Make, tmp_path: Path
) -> None:
    """To the bit, but for what the method keeps beside it. The scale of the authors' files is 1."""
    options = {"order": "VQAv2,Flickr30k", "trainable": trainable, "hyperparameters": {"scale": 1.0}}
    before = runs(method, **options)
    export(before, tmp_path / "out", format, FIRST)
    made = config(method=method, init_from=tmp_path / "out", init_tasks=("VQAv2",), **options)
    found, expected = run(made), results(before)
    assert found["score_matrix"][0] == expected["score_matrix"][0]
    assert found["zero_shot"] == expected["zero_shot"]
    assert found["init"]["kind"] == ("released" if format == "authors" else "peft")
    if method == "mage":
        [note] = found["init"]["notes"]
        assert note.startswith("it has none of what mage keeps (the averaging rule's state; of pema-kron the factors")
        adapters = [load_file(run / "checkpoints" / FIRST / "adapters.safetensors") for run in (before, made.folder)]
        assert all(torch.equal(adapters[1][name], tensor) for name, tensor in adapters[0].items())
        assert "What it started from: it has none of what mage keeps" in write_report(made.folder)[1].read_text()
    else:
        assert found["init"]["notes"] == []
        assert found["digests"] == expected["digests"]


def test_an_imported_adapter_is_a_run_that_has_learnt_nothing(runs: Runs, config: Make, tmp_path: Path) -> None:
    options = {"order": "VQAv2,Flickr30k", "trainable": "connections", "hyperparameters": {"scale": 1.0}}
    before = runs("lora", **options)
    export(before, tmp_path / "out", "authors", FIRST)
    import_adapter(tmp_path / "out", tmp_path / "imported", method="lora")
    found = run(config(method="lora", init_from=tmp_path / "imported", init_tasks=("VQAv2",), **options))
    assert found["digests"] == results(before)["digests"]
    with pytest.raises(
        UserError, match=r"does not train \(branches\): image_queries, .*; give --trainable connections"
    ):
        run(config(method="lora", init_from=tmp_path / "imported", hyperparameters={"scale": 1.0}))


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two tasks that also trains connections, and its model after the first, merged."""
    before = runs("ewc", order="VQAv2,Flickr30k", trainable="connections")
    folder = tmp_path_factory.mktemp("merged") / "model"
    export(before, folder, "merged", FIRST)
    return before, folder


MERGED = {"lora": "one branch", "mage": "roles, Fisher information", "replay": "kept samples", "prompt-pool": "prompts"}


@pytest.mark.parametrize("trainable", ["branches", "released"])
@pytest.mark.parametrize("method", MERGED)
def test_a_merged_model_is_the_state_after_a_task(
    method: str, trainable: str, whole: tuple[Path, Path], config: Make
) -> None:
    """Scored as the run that it is of, whether connections are trained again or not; training starts from it."""
    before, folder = whole
    made = config(method=method, init_from=folder, init_tasks=("VQAv2",), order="VQAv2,Flickr30k", trainable=trainable)
    found, expected = run(made), results(before)
    assert found["zero_shot"] == expected["zero_shot"], "of the pretrained model"
    assert found["score_matrix"][0] == expected["score_matrix"][0]
    assert found["score_matrix"][1] != [None, None]
    assert found["init"]["kind"] == "merged"
    held = load_file(made.folder / "checkpoints" / FIRST / "adapters.safetensors")
    assert not any(bool(tensor.any()) for name, tensor in held.items() if name.endswith(".B"))
    if trainable == "released":
        theirs = load_file(before / "checkpoints" / FIRST / "adapters.safetensors")
        assert torch.equal(held["backbone.image_queries"], theirs["backbone.image_queries"])


def test_a_whole_run_from_a_merged_model_is_that_of_its_weights(
    whole: tuple[Path, Path], config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task after the merge, to the bit: as from a backbone that was loaded with these weights in the first place."""
    _, folder = whole
    made = config(method="ewc", init_from=folder, order="Flickr30k")
    found, original = run(made), TinyBackbone.load

    def loaded(*arguments: object, **options: object) -> TinyBackbone:
        backbone = original(*arguments, **options)
        backbone.decoder.load_state_dict(load_file(folder / "model.safetensors"))
        backbone.load_state_dict(load_file(folder / "connection_layers.safetensors"), strict=False)
        return backbone

    with monkeypatch.context() as patch:
        patch.setattr(TinyBackbone, "load", loaded)
        other = run(config(method="ewc", order="Flickr30k"))
    assert states(found)[1] == states(other)[1]
    assert found["score_matrix"] == other["score_matrix"]
    assert found["zero_shot"] != other["zero_shot"]


@pytest.mark.parametrize("answers", [True, False], ids=["while answering", "while training"])
@pytest.mark.parametrize("moment", [1, 3, 4])
def test_a_run_from_a_merged_model_resumes_to_the_same_bits(
    moment: int, answers: bool, whole: tuple[Path, Path], runs: Runs, config: Make
) -> None:
    options = {"init_from": whole[1], "init_tasks": ("VQAv2",), "order": "VQAv2,Flickr30k", "checkpoint_interval": 1}
    expected, made = runs("mage", **options), config(method="mage", **options)
    assert_it_resumes(made, expected, moment, answers)


def test_a_run_from_a_merged_model_goes_further(
    whole: tuple[Path, Path], runs: Runs, config: Make, tmp_path: Path
) -> None:
    """Its checkpoints, exports and evaluations are of the merged model with its branches."""
    _, folder = whole
    options = {"order": "VQAv2,Flickr30k", "hyperparameters": {"scale": 1.0}}
    before = runs("lora", init_from=folder, init_tasks=("VQAv2",), **options)
    expected = results(before)
    again = run(config(method="lora", init_from=before / "checkpoints" / FIRST, init_tasks=("VQAv2",), **options))
    assert again["digests"] == expected["digests"]
    assert again["score_matrix"] == expected["score_matrix"]
    assert again["zero_shot"] == expected["zero_shot"]
    export(before, tmp_path / "out", "merged")
    given = {"suite": config().suite, "data": config().data, "device": "cpu", "tasks": "VQAv2,Flickr30k"}
    for number, path in enumerate((before, tmp_path / "out")):
        scored = evaluate(path, out=tmp_path / str(number), **given)
        assert scored["score_matrix"][-1] == pytest.approx(expected["score_matrix"][-1], rel=1e-5)
    sha256 = plan(config(method="lora", init_from=folder)).source.sha256
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The model without branches is the merged model {folder}, SHA-256 {sha256}." in card
    export(before, tmp_path / "peft", "peft")
    settings = json.loads((tmp_path / "peft" / "lora" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    moved = folder.with_name("moved")
    folder.rename(moved)
    message = r"trained its branches on the merged model .*, and there is none; put it there again"
    try:
        with pytest.raises(UserError, match=message):
            export(before, tmp_path / "no", "peft")
        with pytest.raises(UserError, match=message):
            evaluate(before, out=tmp_path / "3", **given)
    finally:
        moved.rename(folder)


def test_a_merged_model_that_changed_is_refused(whole: tuple[Path, Path], config: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[1], tmp_path / "model")
    (folder / "checksums.json").unlink()  # which names any change
    options = {"method": "lora", "order": "VQAv2,Flickr30k", "init_from": folder, "init_tasks": ("VQAv2",)}
    made = config(**options)
    run(made)
    state = load_file(folder / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"merged model .*, which has changed: SHA-256 \w+ then, \w+ now"):
        export(made.folder, tmp_path / "out", "peft")
    with pytest.raises(UserError, match="holds a run of another configuration"):
        run(made)
    with pytest.raises(UserError, match=r"--init-from .*backbone tiny with it gives other logits than .*e\.json"):
        run(config(**options, out=tmp_path / "anew"))


FOREIGN = {
    "tensor missing": (lambda state: state.pop("lm_head.weight"), r"1 of the weights .* are missing: lm_head\.weight"),
    "another size": (
        lambda state: state.update({"lm_head.weight": torch.zeros(5, 128)}),
        r"have other shapes: lm_head\.weight \(5, 128\), not \(151, 128\)",
    ),
    "more tensors": (lambda state: state.update(more=torch.zeros(1)), "has weights that no LlamaForCausalLM has: more"),
}


@pytest.mark.parametrize(("alter", "message"), FOREIGN.values(), ids=FOREIGN)
def test_another_model_is_refused_before_anything_runs(
    alter: Callable, message: str, whole: tuple[Path, Path], config: Make, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[1], tmp_path / "model")
    (folder / "checksums.json").unlink()  # which names any change
    state = load_file(folder / "model.safetensors")
    alter(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    made = config(method="lora", init_from=folder)
    with pytest.raises(UserError, match=message):
        run(made)
    assert not (made.folder / "scores.jsonl").exists()


def test_a_merged_model_of_another_kind_is_refused(whole: tuple[Path, Path], config: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[1], tmp_path / "model")
    (folder / "checksums.json").unlink()  # which names any change
    change(folder / "config.json", rms_norm_eps=1e-3)
    (folder / "reference.json").unlink()
    [note] = run(config(method="lora", order="VQAv2", init_from=folder))["init"]["notes"]
    assert note == "its config.json differs from the backbone's, which is used: rms_norm_eps: 0.001 there, 1e-06 here"
    save_file({"queries": torch.zeros(2)}, folder / "connection_layers.safetensors")
    with pytest.raises(UserError, match=r"connection_layers\.safetensors is of another backbone: queries \(2,\)"):
        run(config(method="lora", init_from=folder))
    change(folder / "config.json", model_type="qwen2")
    with pytest.raises(UserError, match=r"is of model_type 'qwen2', not 'llama': .* LlamaForCausalLM that branches"):
        run(config(method="lora", init_from=folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights in .*; found pytorch_model\.bin, which is pickled and not read"):
        plan(config(method="lora", init_from=folder))


def test_layers_that_an_adapter_is_not_for_start_at_zero(config: Make, tmp_path: Path) -> None:
    """As PEFT's default target modules have it; and what was left as pretrained is said."""
    from peft import LoraConfig, get_peft_model

    base = TinyBackbone.load().outer_model()
    settings = LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path / "out")
    options = {"method": "lora", "order": "VQAv2", "init_from": tmp_path / "out", "hyperparameters": {"scale": 1.0}}
    made, connected = config(**options, init_tasks=("VQAv2",)), config(**options, trainable="connections")
    zeros, kept = run(connected)["init"]["notes"]
    assert zeros.startswith("it is not for 20 layers, whose branches are zero: model.layers.0.self_attn.k_proj")
    assert kept.startswith("it has no image_queries, ")
    assert kept.endswith(", which start as pretrained")
    run(made)
    held = load_file(made.folder / "checkpoints" / FIRST / "adapters.safetensors")
    assert bool(held["layers.0.self_attn.q_proj.lora.B"].any())
    assert not held["layers.0.self_attn.k_proj.lora.B"].any()


@pytest.fixture(scope="module")
def files(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of finished runs, by method and format."""
    folder = tmp_path_factory.mktemp("exports")
    for method, format in (
        ("lora", "authors"), ("lora", "peft"), ("lora", "merged"), ("mage", "authors"), ("mage", "peft"),
        ("mage", "peft-merged-rank"), ("moelora", "authors"),
    ):  # fmt: skip
        export(runs(method), folder / f"{method}-{format}", format, FIRST)
    return folder


REFUSED = {
    "nothing there": ("lora", "nowhere", {}, r"--init-from .*nowhere: expected a file, or a folder with one of"),
    "plain for roles": ("mage", "lora-authors", {}, r"released adapter of kind mage, the file has one plain branch"),
    "roles for plain": ("lora", "mage-authors", {}, r"of kind lora, the file has numbered branches: kind mage or moe"),
    "roles in one": ("mage", "mage-peft-merged-rank", {}, r"has branches lora \(rank 32\); mage has text-general \(ra"),
    "PEFT for routers": ("moelora", "mage-peft", {}, r"a PEFT adapter holds branches that are always active"),
    "mage for routers": ("mage-routed", "mage-authors", {}, r"found text-general, .* with other routers"),
    "rank": ("lora", "lora-peft", {"rank": 8}, r"branches lora \(rank 32\); lora has lora \(rank 8\): set its rank"),
    "scale": ("lora", "lora-peft", {"scale": 3.0}, r"its scale is 6, here it is 3; give --lora\.scale 6"),
    "scale folded in": ("moelora", "moelora-authors", {}, r"its scale is 1, here it is 12; give --moelora\.scale 1"),
    "experts": (
        "moelora",
        "moelora-authors",
        {"scale": 1.0, "experts": 2},
        r"branches expert-0 .*; moelora has expert-",
    ),
    "branches by task": ("mr-lora", "lora-peft", {}, r"mr-lora has parts for each task, which no adapter file holds"),
    "no branches": ("prompt-pool", "lora-peft", {}, r"prompt-pool has no low-rank branches, and no adapter file holds"),
    "merged for parts": ("mr-lora", "lora-merged", {}, r"mr-lora has parts for each task, which no merged model holds"),
    "nothing trained": ("zero-shot", "lora-peft", {}, r"zero-shot trains nothing and can start from nothing"),
}


@pytest.mark.parametrize(("method", "file", "hyperparameters", "message"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_runs(
    method: str, file: str, hyperparameters: dict, message: str, files: Path, config: Make
) -> None:
    made = config(method=method, hyperparameters=hyperparameters, init_from=files / file)
    with pytest.raises(UserError, match=message):
        run(made)
    assert not (made.folder / "scores.jsonl").exists()


RUNS_REFUSED = {
    "method": ({"method": "ewc"}, r"the run is another: method: lora there, ewc here; cnext export gives its adapter"),
    "scale": ({"hyperparameters": {"scale": 2.0}}, r"lora\.scale: 6\.0 there, 2\.0 here"),
    "rank": ({"hyperparameters": {"rank": 8}}, r"lora\.rank: 32 there, 8 here"),
    "backbone": ({"backbone": "janus"}, r"backbone: tiny there, janus here"),
    "tasks": ({"init_tasks": ORDER[:1]}, r"had learnt VQAv2, Flickr30k, HQEdit, --init-tasks names VQAv2; give the ch"),
}


@pytest.mark.parametrize(("changes", "message"), RUNS_REFUSED.values(), ids=RUNS_REFUSED)
def test_a_run_that_does_not_fit_is_refused(changes: dict, message: str, runs: Runs, config: Make) -> None:
    with pytest.raises(UserError, match=message):
        plan(config(**{"method": "lora", "init_from": runs("lora")} | changes))


def test_parts_of_tasks_are_for_these_tasks_alone(runs: Runs, config: Make) -> None:
    before = runs("mr-lora", hyperparameters=SHORTER)
    with pytest.raises(UserError, match=r"parts for each task, and this run of it has learnt VQAv2 Flickr30k HQEdit"):
        run(config(method="mr-lora", init_from=before, hyperparameters=SHORTER))
    first = before / "checkpoints" / FIRST
    with pytest.raises(UserError, match=r"mr-lora has parts for each task: 3 there, 2 here; give an order of as many"):
        run(config(method="mr-lora", init_from=first, order="VQAv2,HQEdit", hyperparameters=SHORTER))


def test_connections_that_the_run_does_not_train_are_refused(runs: Runs, config: Make) -> None:
    before = runs("lora", order="VQAv2,Flickr30k", trainable="connections")
    with pytest.raises(UserError, match=r"layers that the run does not train \(branches\): image_queries, "):
        run(config(method="lora", init_from=before))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_tasks": ("VQAv2",)}, "--init-tasks needs --init-from"),
        ({"init_tasks": ("HQEdit",)}, "--init-tasks needs --init-from"),
        ({"init_tasks": ("HQEdit",), "init_from": Path()}, "must be the first of the order VQAv2, Flickr30k, HQEdit"),
        (
            {"init_tasks": ("VQAv2",), "init_from": Path(), "method": "upper-bound"},
            "learns all tasks at once; give all",
        ),
    ],
    ids=["alone", "unknown", "not first", "joint"],
)
def test_tasks_that_cannot_be_learnt_are_refused(changes: dict, message: str, config: Make) -> None:
    with pytest.raises(UserError, match=message):
        plan(config(**changes))


def test_another_backbones_adapter_is_refused_by_its_logits(files: Path, config: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(files / "lora-peft", tmp_path / "lora")
    (folder / "checksums.json").unlink()  # which names any change
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    save_file({name: 3 * tensor for name, tensor in tensors.items()}, folder / "lora" / "adapter_model.safetensors")
    made = config(method="lora", init_from=folder)
    with pytest.raises(UserError, match=r"backbone tiny with it gives other logits than .*reference\.json has"):
        run(made)
    (folder / "reference.json").unlink()
    assert run(config(method="lora", order="VQAv2", init_from=folder))["finished"]


def test_a_damaged_checkpoint_is_refused(runs: Runs, config: Make, tmp_path: Path) -> None:
    copy = shutil.copytree(runs("lora"), tmp_path / "copy")
    damage(copy / "checkpoints" / FIRST / "adapters.safetensors", 1.0, cut=False)
    with pytest.raises(UserError, match=r"--init-from .*adapters\.safetensors has changed since it was written"):
        run(config(method="lora", init_from=copy / "checkpoints" / FIRST, init_tasks=("VQAv2",)))


def test_weights_and_rates_may_differ_and_are_named(runs: Runs, config: Make) -> None:
    before = runs("ewc", order="VQAv2,Flickr30k")
    made = config(
        method="ewc", order="VQAv2,HQEdit", init_from=before / "checkpoints" / FIRST, init_tasks=("VQAv2",),
        hyperparameters={"penalty": 0.5},
    )  # fmt: skip
    assert run(made)["init"]["notes"] == ["its run was trained otherwise: ewc.penalty: 0.108 there, 0.5 here"]
    assert "Started from 1_VQAv2 of seed-0 (SHA-256 " in write_report(made.folder)[0].read_text()
    export(made.folder, made.folder / "out", "peft")
    assert "| started from | 1_VQAv2 of seed-0 (SHA-256 " in (made.folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("answers", [True, False], ids=["while answering", "while training"])
@pytest.mark.parametrize("given", [("VQAv2",), ()], ids=["after a task", "before the first"])
@pytest.mark.parametrize("moment", [1, 6])
def test_it_resumes_to_the_same_bits(
    moment: int, given: tuple[str, ...], answers: bool, runs: Runs, config: Make
) -> None:
    options = {"method": "mage", "init_from": runs("mage") / "checkpoints" / FIRST, "init_tasks": given}
    expected, made = runs("mage", **{n: v for n, v in options.items() if n != "method"}), config(**options)
    assert_it_resumes(made, expected, moment, answers)


def test_what_changed_between_stop_and_resume_is_refused(
    files: Path, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pytorch_model.bin"
    shutil.copyfile(files / "lora-authors" / "pytorch_model.bin", file)
    made = config(method="lora", init_from=file, init_tasks=("VQAv2",), hyperparameters={"scale": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(made)
    state = torch.load(file, weights_only=True)
    torch.save({name: 2 * tensor for name, tensor in state.items()}, file)
    with pytest.raises(
        UserError, match=r'holds a run of another configuration:\n  init\.sha256: "\w+" there, "\w+" req'
    ):
        run(made)
    shutil.copyfile(files / "lora-authors" / "pytorch_model.bin", file)
    assert run(made)["finished"]
    with pytest.raises(UserError, match=r"init_tasks: \[\"VQAv2\"\] there, null requested"):
        run(config(method="lora", out=made.out))


def test_the_source_is_in_the_configuration_and_the_command(runs: Runs, config: Make) -> None:
    first = runs("mage") / "checkpoints" / FIRST
    planned = plan(config(method="mage", init_from=first, init_tasks=("VQAv2",)))
    found = planned.as_dict()
    assert (found["init_from"], found["init_tasks"]) == (str(first), ["VQAv2"])
    assert found["init"].keys() == {"name", "kind", "sha256"}
    assert found["recipe"]["steps"] == {"VQAv2": 0, "Flickr30k": 4, "HQEdit": 4}
    assert not plan(config()).as_dict().keys() & {"init", "init_from", "init_tasks"}
    again = runs("mage", seed=0, checkpoint_interval=2) / "checkpoints" / FIRST
    assert plan(config(method="mage", init_from=again)).source.sha256 == planned.source.sha256, "equal to the bit"


def test_the_plan_counts_what_is_left(runs: Runs, config: Make) -> None:
    made = config(method="lora", init_from=runs("lora") / "checkpoints" / SECOND, init_tasks=ORDER[:2])
    planned = plan(made)
    assert planned.evaluated == [3, 0, 2, 3]
    assert plan(config()).evaluated == [3, 1, 2, 3]
    assert plan(config(method="upper-bound")).evaluated == [3, 3]
    text = dry_run.estimate(planned).text
    assert text.splitlines()[2].split()[:5] == ["VQAv2", "text+image", "text", "0", "0"]
    assert "questions" in forecast.text(plan(made, forecast=True), 1, 400.0)
    assert not made.folder.exists()


def test_runs_with_other_tasks_learnt_are_in_no_table(runs: Runs, config: Make, capsys: pytest.CaptureFixture) -> None:
    made = config(method="lora", init_from=runs("lora") / "checkpoints" / FIRST, init_tasks=("VQAv2",), seed=1)
    run(made)
    capsys.readouterr()
    assert main(["table", str(made.folder), str(runs("lora"))]) == 2
    assert 'init_tasks: ["VQAv2"] and null' in capsys.readouterr().err
