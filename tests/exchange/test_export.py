"""``cnext export`` and ``cnext import`` of runs of the tiny backbone: exported models give the run's logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from backbones.small_folders import write_janus
from torch import Tensor, nn

from cnext import adapters, backbones, methods
from cnext.adapters import exchange_files
from cnext.backbones.tiny.model import TinyBackbone
from cnext.cli import main
from cnext.config import init_source
from cnext.errors import UserError
from cnext.exchange.export import FORMATS, export, restore, stand_in
from cnext.exchange.importing import import_adapter
from cnext.methods.parts.branches import TaskBranches
from cnext.runs import checkpoint
from cnext.training.setup import trained_beside

TASKS = ["VQAv2", "HQEdit"]
ROLES = [role.name for role in adapters.BRANCH_ROLES]
IDS = torch.arange(5, 37).view(2, 16)
# By PEFT, of transformers' newer releases.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def made(
    folder: Path,
    name: str,
    learnt: int = 2,
    trainable: str = "branches",
    backbone: str = "tiny",
    weights: Path | None = None,
    **hyperparameters: object,
) -> Path:
    """The folder of a run as it is after some tasks, what it trains filled with noise."""
    method, model = methods.load(name)(**hyperparameters), backbones.load(backbone).load("cpu", weights)
    method.setup(model, [stand_in(task) for task in TASKS], torch.Generator().manual_seed(0))
    if isinstance(method, TaskBranches):
        method.activate(learnt)
    held = method.adapter_parameters() | trained_beside(model, trainable)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in held.values():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    config = {"method": name, "hyperparameters": dataclasses.asdict(method), "backbone": backbone, "suite": "next-tiny",
              "order": "paper", "tasks": TASKS, "seed": 3, "recipe": {"trainable": trainable},
              "weights": weights and str(weights)}  # fmt: skip
    results = {"method": name, "suite": "next-tiny", "tasks": TASKS,
               "profile": "strict", "split": "test", "zero_shot": [10.0, 20.0], "finished": True,
               "score_matrix": [[50.0, None], [40.0, 61.5]], "metrics": {"avg_acc": 50.75, "bwt": None}}  # fmt: skip
    run = folder / name
    tensors = {"adapters": held, "method": method.state_dict(), "optimizer": {}}
    label = f"{learnt}_{TASKS[learnt - 1]}"
    checkpoint.save(run / "checkpoints" / label, tensors, {"tasks_done": learnt, "step": 0})
    checkpoint.write_json(run / "config.json", config)
    checkpoint.write_json(run / "results.json", results)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs"), "mage", scale=0.5)


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def loaded(folder: Path, format: str) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if format == "merged":
        return AutoModelForCausalLM.from_pretrained(folder)
    base = TinyBackbone.load().outer_model()
    if format == "peft-merged-rank":
        return PeftModel.from_pretrained(base, folder)
    model = PeftModel.from_pretrained(base, folder / ROLES[0], adapter_name=ROLES[0])
    for name in ROLES[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    model.base_model.set_adapter(ROLES)
    return model


@pytest.mark.parametrize(("format", "error"), [("peft", 1e-6), ("peft-merged-rank", 1e-6), ("merged", 1e-5)])
def test_an_export_gives_the_logits_of_the_run(run: Path, format: str, error: float, tmp_path: Path) -> None:
    export(run, tmp_path / "out", format)
    theirs, ours = loaded(tmp_path / "out", format), restore(run).model
    expected = answers(ours)
    # The tiny backbone's logits reach 15, where one rounding of float32 is 1e-6: they are compared by their size.
    torch.testing.assert_close(answers(theirs), expected, rtol=0, atol=error * float(expected.abs().max()))
    if format != "merged":  # whose weights are rounded to float32
        torch.testing.assert_close(answers(theirs.double()), answers(ours.double()), rtol=0, atol=1e-6)


def test_files_of_two_exports_are_refused(run: Path, tmp_path: Path) -> None:
    """One branch's file is another's, or was left behind. A card may be edited, and logits left out."""
    export(run, tmp_path / "out", "peft")
    out = tmp_path / "out"
    (out / "README.md").write_text("A card of one's own.")
    (out / "reference.json").unlink()
    assert exchange_files.read(out)[0].branches.ranks == dict.fromkeys(ROLES, 8)
    weights = out / ROLES[1] / "adapter_model.safetensors"
    shutil.copy(out / ROLES[0] / "adapter_model.safetensors", weights)
    with pytest.raises(UserError, match=rf"not those of this export: {ROLES[1]}/adapter_model.safetensors; copy the"):
        import_adapter(out, tmp_path / "back", method="mage")
    shutil.rmtree(out / ROLES[1])
    with pytest.raises(UserError, match=rf"missing: {ROLES[1]}/adapter_config.json, .*safetensors; copy the whole"):
        init_source.find(out)
    (out / "checksums.json").unlink()  # as in an export of an earlier version
    assert len(exchange_files.read(out)[0].branches.ranks) == 3


@pytest.mark.parametrize("format", ["peft", "peft-merged-rank", "authors"])
def test_import_restores_the_run(run: Path, format: str, tmp_path: Path) -> None:
    export(run, tmp_path / "out", format)
    told = import_adapter(tmp_path / "out", tmp_path / "back", method="mage")
    assert "28 layers, branches text-general (rank 8), " in told
    assert "reference logits as exported" in told
    again, before = restore(tmp_path / "back"), restore(run)
    torch.testing.assert_close(answers(again.model), answers(before.model), rtol=1e-6, atol=1e-6)
    assert again.method.scale == (1.0 if format == "authors" else 0.5)


def test_released_extras_round_trip(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    (given,) = (p for p in export(run, tmp_path / "released", "authors") if p.name == file.name)
    state = torch.load(given, weights_only=True)
    torch.manual_seed(0)
    state["llm.base_model.model.lm_head.weight"] = torch.randn(151, 128)
    state["llm.base_model.model.model.norm.modules_to_save.default.weight"] = torch.rand(128)
    state["output_resampler.query"] = torch.randn(4, 8)
    torch.save(state, file)
    told = import_adapter(file, tmp_path / "back", method="mage")
    assert "also imported: output_resampler, 1 tensors" in told
    export(tmp_path / "back", tmp_path / "again", "authors")
    again = torch.load(tmp_path / "again" / "pytorch_model.bin", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())

    other = tmp_path / "other.bin"
    torch.save({name: tensor for name, tensor in state.items() if "lora_" not in name}, other)
    with pytest.raises(UserError, match=r"other\.bin: expected a released adapter, .*, found none"):
        import_adapter(other, tmp_path / "other", method="mage")
    torch.save(state | {"llm.base_model.model.lm_head.weight": torch.zeros(9, 128)}, file)
    with pytest.raises(UserError, match=r"do not fit the model: lm_head.weight \(9, 128\), expected \(151, 128\)"):
        import_adapter(file, tmp_path / "other", method="mage")
    with pytest.raises(UserError, match=r"also has head \(1\), norms \(1\), output_resampler \(1\)"):
        export(tmp_path / "back", tmp_path / "peft", "peft")
    export(tmp_path / "back", tmp_path / "peft", "peft", branches_only=True)
    assert "Left out, though trained" in (tmp_path / "peft" / "README.md").read_text()
    export(tmp_path / "back", tmp_path / "merged", "merged")
    merged = loaded(tmp_path / "merged", "merged")
    assert torch.equal(merged.lm_head.weight, state["llm.base_model.model.lm_head.weight"])
    assert (tmp_path / "merged" / "connection_layers.safetensors").is_file()


def test_trained_extras_round_trip(tmp_path: Path) -> None:
    """Embeddings, head, norms and connection layers, in the authors' layout and merged; PEFT has no place for them."""
    run = made(tmp_path / "runs", "mage", trainable="released")
    before = restore(run)
    assert not torch.equal(before.model.lm_head.weight, TinyBackbone.load().outer_model().lm_head.weight)
    export(run, tmp_path / "out", "authors")
    told = import_adapter(tmp_path / "out", tmp_path / "back", method="mage")
    assert "reference logits as exported" in told
    assert "also imported: input_projection, 2 tensors" in told
    export(tmp_path / "back", tmp_path / "again", "authors")
    first, second = (torch.load(tmp_path / name / "pytorch_model.bin", weights_only=True) for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert {"image_queries", "input_projection.weight", "llm.base_model.model.lm_head.weight"} <= first.keys()
    export(run, tmp_path / "merged", "merged")
    torch.testing.assert_close(answers(loaded(tmp_path / "merged", "merged")), answers(before.model), rtol=0, atol=1e-4)
    assert (tmp_path / "merged" / "connection_layers.safetensors").is_file()
    with pytest.raises(UserError, match=r"also has .*embeddings \(1\)"):
        export(run, tmp_path / "peft", "peft")
    wrong = first | {"image_queries": torch.zeros(3, 128)}
    torch.save(wrong, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"connection layers do not fit backbone tiny: image_queries \(3, 128\)"):
        import_adapter(tmp_path / "pytorch_model.bin", tmp_path / "other", method="mage")


def test_model_card(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "peft-merged-rank")
    text = (tmp_path / "out" / "README.md").read_text()
    kept = json.loads((tmp_path / "out" / "reference.json").read_text())
    for part in ("| mage.c | 5.0 |", "| seed | 3 |", "| order | paper: VQAv2, HQEdit |", "| suite | next-tiny |",
                 "| HQEdit | 40.0 | 61.5 |", "| avg_acc | 50.75 |", "| scale | 0.5 |", "torch 2.", kept["sha256"],
                 "text-general (rank 8)"):  # fmt: skip
        assert part in text


def test_metadata_for_the_hub(run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export(run, tmp_path / "out", "peft")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["library_name"], data.get("license")) == ("cnext:tiny", "peft", None)
    assert {"continual-learning", "lora"} <= set(data["tags"])
    for role in ROLES:
        config = json.loads((tmp_path / "out" / role / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "cnext:tiny"
    found = {(one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert found == {("VQAv2", "score"): 40.0, ("HQEdit", "score"): 61.5, ("all tasks", "avg_acc"): 50.75}

    asked = ["export", str(run), "--to", str(tmp_path / "named"), "--format", "peft-merged-rank"]
    assert main([*asked, "--base-model", "org/tiny", "--license", "apache-2.0"]) == 0
    data = ModelCard.load(tmp_path / "named" / "README.md").data.to_dict()
    assert (data["base_model"], data["license"]) == ("org/tiny", "apache-2.0")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"

    export(run, tmp_path / "merged", "merged")
    data = ModelCard.load(tmp_path / "merged" / "README.md").data.to_dict()
    assert (data["library_name"], "lora" in data["tags"]) == ("transformers", False)


def test_the_checksum_tolerates_rounding_errors_only(run: Path) -> None:
    from cnext.adapters.logit_check import agrees, reference

    model = restore(run).model
    kept = reference(model)
    bias = model.lm_head.weight
    with torch.no_grad():
        bias.mul_(1 + 1e-5)
        assert agrees(model, kept)
        bias.mul_(1.02)
        assert not agrees(model, kept)


@torch.no_grad()
def test_a_merged_model_loads_as_backbone_weights(tmp_path: Path) -> None:
    """With the tokenizer and the image processor, without which neither transformers nor a run can use it."""
    weights = write_janus(tmp_path / "janus")
    export(made(tmp_path, "lora", backbone="janus", weights=weights, scale=1.0), tmp_path / "merged", "merged")
    again = backbones.load("janus").load("cpu", tmp_path / "merged")
    ids = torch.arange(10, 30)[None]
    expected = restore(tmp_path / "lora").model(input_ids=ids).logits
    torch.testing.assert_close(again.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    own = backbones.load("janus").load("cpu", weights)
    assert again.text_ids("a red ring") == own.text_ids("a red ring")
    assert not torch.allclose(own.model(input_ids=ids).logits, expected, atol=1e-2)


def test_moelora_round_trip_keeps_routers(tmp_path: Path) -> None:
    run = made(tmp_path, "moelora")
    export(run, tmp_path / "out", "authors")
    assert "reference logits as exported" in import_adapter(tmp_path / "out", tmp_path / "back", method="moelora")
    with pytest.raises(UserError, match=r"several branches; give --method mage or --method moelora"):
        import_adapter(tmp_path / "out", tmp_path / "other")
    for format in ("peft", "peft-merged-rank", "merged"):
        with pytest.raises(UserError, match="routed by their input"):
            export(run, tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_only_branches_of_learnt_tasks_are_exported(tmp_path: Path) -> None:
    run = made(tmp_path, "o-lora", learnt=1)
    export(run, tmp_path / "out", "peft")
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["README.md", "checksums.json", "reference.json", "task-1"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| VQAv2 | 50.0 |  |" in text
    assert "40.0" not in text, "scores of later stages"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("mage-routed", "routed by their input"),
        ("mode", "routed by their input"),
        ("mr-lora", "mr-lora selects parameters by the question"),
        ("prompt-pool", "prompt-pool selects parameters by the question"),
        ("osf", "found none that is active"),
        ("zero-shot", "found none that is active"),
    ],
)
def test_methods_that_are_no_adapter_are_refused(method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(made(tmp_path, method), tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_lae_exports_its_offline_adapter(tmp_path: Path) -> None:
    run = made(tmp_path, "lae")
    folder = run / "checkpoints" / "2_HQEdit"
    tensors, values = checkpoint.load(folder)
    tensors["method"] = {name: 2 * tensor for name, tensor in tensors["adapters"].items()}
    checkpoint.save(folder, tensors, values)
    export(run, tmp_path / "out", "authors")
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    key = "layers.0.self_attn.q_proj"
    offline = tensors["method"][f"{key}.lora.A"]
    assert torch.equal(state[f"llm.base_model.model.model.{key}.lora_A.default.weight"], offline)


def test_the_verbs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    asked = ["export", str(run), "--to", str(out), "--format", "peft-merged-rank"]
    assert main(asked) == 0
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checksums.json", "reference.json"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert main(asked) == 2
    assert f"error: {out} exists and is not empty; give another --to or delete it" in capsys.readouterr().err
    assert main([*asked[:3], str(tmp_path / "x"), *asked[4:], "--checkpoint", "9_X"]) == 2
    assert "unknown checkpoint (of those between tasks) '9_X'; valid: 2_HQEdit" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "--to", str(tmp_path / "x"), "--format", "peft"]) == 2
    assert (
        "expected the folder of a run, such as runs/mage/paper/seed-0, found no config.json in"
        in capsys.readouterr().err
    )
    assert main(["import", str(out), "--to", str(back)]) == 0
    assert "lora on tiny, 28 layers, branches lora (rank 32)" in capsys.readouterr().out
    assert main(["import", str(back), "--to", str(tmp_path / "x")]) == 2
    assert "expected a file, or a folder with one of adapter_config.json" in capsys.readouterr().err
    config = json.loads((out / "reference.json").read_text())
    (out / "reference.json").write_text(json.dumps(config | {"sha256": "0"}))
    assert main(["import", str(out), "--to", str(tmp_path / "x")]) == 2
    assert "not those of this export: reference.json; copy the whole export again" in capsys.readouterr().err
    (out / "checksums.json").unlink()
    assert main(["import", str(out), "--to", str(tmp_path / "x")]) == 2
    assert "the adapter is for another backbone, or was changed" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_lists_all_formats(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert f"{{{','.join(FORMATS)}}}" in capsys.readouterr().out
